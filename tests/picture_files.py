"""Files of small pictures as cameras and programs write them, and the pixels that they mean."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from favae.data.decoding import TRANSPOSITIONS

SIZE = (24, 20)
ORIENTATION = 0x112


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def smooth(mode: str = "RGB") -> Image.Image:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize(SIZE, Image.Resampling.BICUBIC).convert(mode)


def turned(image: Image.Image, orientation: int, format: str) -> bytes:
    """A file that stores an image as a camera does that was held in another way."""
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = image.transpose(TRANSPOSITIONS[inverse]) if inverse in TRANSPOSITIONS else image
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(stored, format, exif=exif)


def png(depth: int, color: int, rows: np.ndarray, key: tuple[int, ...]) -> bytes:
    """A PNG file of raw rows with a transparent color (tRNS), which Pillow does not write for all depths."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    if depth == 16:
        raw = [row.astype(">u2").tobytes() for row in rows]
    elif depth == 8:
        raw = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        raw = [np.packbits(row.reshape(-1).astype(np.uint8)).tobytes() for row in bits]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in raw))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
            chunk(b"IDAT", body),
            chunk(b"IEND", b""),
        ]
    )


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray | None]]:
    """Files, and the RGB pixels that they mean (within 2 levels for JPEG and 16 bits)."""
    upright = np.array(smooth())
    pictures = {}
    for orientation in range(1, 9):
        for format, ending in (("PNG", "png"), ("TIFF", "tif"), ("WEBP", "webp"), ("JPEG", "jpg")):
            exact = None if format in ("WEBP", "JPEG") else upright
            pictures[f"{format}{orientation}.{ending}"] = (turned(smooth(), orientation, format), exact)
    rgba = smooth("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(SIZE))
    over_white = np.array(Image.alpha_composite(Image.new("RGBA", SIZE, "white"), rgba).convert("RGB"))
    pictures["rgba.png"] = (encoded(rgba), over_white)
    pictures["la.png"] = (encoded(rgba.convert("LA")), None)
    pictures["cmyk.jpg"] = (encoded(smooth("CMYK"), "JPEG"), None)
    palette = smooth().quantize(8)
    key = palette.getpixel((0, 0))
    expected = np.array(palette.convert("RGB"))
    expected[np.array(palette) == key] = 255
    pictures["palette.png"] = (encoded(palette, transparency=key), expected)
    for depth in (1, 2, 4, 8, 16):
        top = 2**depth - 1
        rows = np.random.default_rng(depth).integers(0, top + 1, SIZE[::-1])
        rows[:4] = rows[0, 0]
        gray = np.round(rows * (255 / top))
        gray[rows == rows[0, 0]] = 255
        gray = np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
        pictures[f"gray{depth}.png"] = (png(depth, 0, rows, (int(rows[0, 0]),)), gray)
    for depth in (8, 16):
        rows = upright.astype(np.int64) * (257 if depth == 16 else 1)
        white = upright.copy()
        white[(upright == upright[0, 0]).all(axis=2)] = 255
        pictures[f"rgb{depth}.png"] = (png(depth, 2, rows, tuple(rows[0, 0].tolist())), white)
    pictures["plain16.png"] = (encoded(Image.fromarray(np.array(smooth("L"), dtype=np.uint16) * 257)), None)
    return pictures
