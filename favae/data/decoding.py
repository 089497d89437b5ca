"""From a stored picture to pixels of 1, 3 or 4 channels: the one way, whatever the picture is stored in."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from favae.channels import MODES
from favae.errors import ConfigError

# Formats of Pillow that are not opened: they need other programs (EPS runs Ghostscript), or hold no pixels.
NOT_OPENED = {"EPS", "PDF", "MPEG", "WMF", "BUFR", "GRIB", "HDF5"}
MAX_PIXELS_VARIABLE = "FAVAE_MAX_IMAGE_PIXELS"

# What turns an image upright, for each value of the EXIF tag "Orientation" but 1.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnusableImage(ValueError):
    """An image cannot be used. The message says why."""


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NOT_OPENED)


@cache
def image_extensions() -> frozenset[str]:
    """How names of image files end, such as ".jpg", in lower case."""
    return frozenset(end for end, name in Image.registered_extensions().items() if name not in NOT_OPENED)


def read_image(file: str | Path | BinaryIO, channels: int = 3) -> Image.Image:
    """The picture in a file, upright, with so many channels; of several frames the first.

    Raises:
        UnusableImage: if it cannot be read, or for the reasons that `to_channels` names.
    """
    with _opened(file) as image:
        return to_channels(image, channels)


def stored_size(file: str | Path) -> tuple[int, int]:
    """Width and height of a picture as it is stored, from the header alone. Raises `UnusableImage`."""
    with _opened(file) as image:
        return image.size


def upright_size(file: str | Path) -> tuple[int, int]:
    """Width and height of a picture as `read_image` gives it. Raises `UnusableImage`."""
    with _opened(file) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFF, and their sizes, by itself
        return image.size[::-1] if turned else image.size


def set_largest_image() -> None:
    """Tells Pillow how many pixels an image may have, if the environment says so."""
    if limit := os.environ.get(MAX_PIXELS_VARIABLE):
        if not limit.isdecimal():
            raise ConfigError(f"{MAX_PIXELS_VARIABLE}={limit}: expected a number of pixels")
        Image.MAX_IMAGE_PIXELS = int(limit) // 2  # beyond which Pillow warns; it refuses twice as many


@contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Whatever Pillow raises inside the block is an `UnusableImage`: its decoders of damaged files raise OSError,
    SyntaxError, TypeError, struct.error and a dozen others."""
    set_largest_image()
    try:
        with Image.open(file, formats=image_formats()) as image:
            yield image
    except UnusableImage:
        raise
    except Image.DecompressionBombError as error:
        raise UnusableImage(f"{error} Set {MAX_PIXELS_VARIABLE} in the environment to allow more pixels.") from error
    except UnidentifiedImageError as error:
        raise UnusableImage("not an image, or of a format that is not read") from error
    except Exception as error:
        raise UnusableImage(str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata say nothing about the pixels
        return 1


def to_channels(image: Image.Image, channels: int = 3) -> Image.Image:
    """Turns an image upright and converts it: grayscale of 8 or 16 bits, palettes and CMYK as well.

    Args:
        channels: 1 (gray), 3 (RGB) or 4 (RGBA). What is transparent is put over white, unless the opacity is kept.
    Raises:
        UnusableImage: if the range of pixel values is unknown (floating point, or integers of more than 16 bits).
    """
    _match_transparent_color(image)
    image.load()  # a damaged file fails here, and not later
    transposition = TRANSPOSITIONS.get(_orientation(image))
    if transposition is not None:
        image = image.transpose(transposition)
    if image.mode == "F":
        raise UnusableImage("floating-point pixels of unknown range")
    if image.mode.startswith("I"):  # 16-bit grayscale is opened as "I;16" or as "I"
        image = _from_integers(image)
    if not image.has_transparency_data:
        image = image.convert("RGB")
    else:
        image = image.convert("RGBA")
        if channels < 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    image.info = {}  # what it says about orientation and transparency is done
    return image


def _match_transparent_color(image: Image.Image) -> None:
    """Scales the transparent color of a PNG image as Pillow scales its pixels, which it forgets.

    Pixels of 2 and 4 bits become 8 bits. So do colors of 16 bits, after which neighbors of the color are transparent.
    """
    color, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    stored = tiles[0].args if tiles else None
    if isinstance(color, int) and stored in ("L;2", "L;4"):
        image.info["transparency"] = color * {"L;2": 85, "L;4": 17}[stored]
    elif isinstance(color, tuple) and stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _from_integers(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UnusableImage(f"integer pixels from {values.min()} to {values.max()}; at most 16 bits are supported")
    gray = (values / 257).round().astype(np.uint8)
    opaque = values != image.info.get("transparency", -1)
    return Image.merge("LA", (Image.fromarray(gray), Image.fromarray(opaque.astype(np.uint8) * 255)))
