#!/usr/bin/env python
"""Writes pictures of letters and digits in a few hundred font families: a set on which small models learn fast.

    python scripts/glyphs.py --output glyphs                       (apt-get download fetches Debian's fonts, 170 MB)
    python scripts/glyphs.py --output glyphs --archives fonts-lato_2.0-2.1_all.deb ...

Writes train.parquet, validation.parquet and heldout.parquet, whole families in one of them, and combinations.parquet,
with families of the first and pairs of color and character that no other file has. A picture has 32 x 32 pixels: one
character, in color on a ground of another color. Columns: image, label (the character), caption ("large red bold
italic letter Q on a green ground", "small blue digit 7 on a white ground, top left"), and each attribute by itself.

The characters are the 47 that EMNIST calls balanced: capital and small letters of the same shape are one. Fonts are
free and have the licenses of their packages; pictures are data and not part of favae.
"""

import argparse
import colorsys
import io
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from favae.errors import DataError, FavaeError

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
SIZE = 32
SUPERSAMPLING = 4
LARGEST_PACKAGE = 3_000_000  # bytes; larger ones are mostly Chinese, Japanese and Korean
MIN_FAMILIES = 100
SPLITS = {"validation": range(10, 20), "heldout": range(20, 30)}  # of 100 numbers that families are hashed to
HEIGHTS = {"large": (0.62, 0.78), "small": (0.3, 0.4)}  # of a capital, relative to the picture
POSITIONS = {"top left": (0.3, 0.3), "top right": (0.7, 0.3), "bottom left": (0.3, 0.7), "bottom right": (0.7, 0.7)}
COLORS = {  # hue, saturation, value
    "red": (0.0, 0.85, 0.8), "orange": (0.08, 0.9, 0.95), "yellow": (0.155, 0.75, 0.95), "green": (0.35, 0.75, 0.6),
    "blue": (0.62, 0.8, 0.8), "purple": (0.78, 0.65, 0.65), "pink": (0.92, 0.4, 0.95), "brown": (0.07, 0.65, 0.4),
    "white": (0.0, 0.0, 0.96), "gray": (0.0, 0.0, 0.5), "black": (0.0, 0.0, 0.08),
}  # fmt: skip
JITTER = (0.015, 0.08, 0.06)  # of hue, saturation and value
MIN_CONTRAST = 0.3  # between the luminances of character and ground
TEMPLATE_SIZE = 16
MIN_LIKENESS = 0.35  # mean correlation of a font's characters with the median font's, below which it is no text font


@dataclass(frozen=True)
class Font:
    """A font file of one weight and slant."""

    file: Path
    family: str
    bold: bool
    italic: bool


def fetch_archives(folder: Path) -> list[Path]:
    """Downloads the font packages of the distribution into a folder.

    Raises:
        DataError: if apt is missing or fails.
    """
    try:
        found = subprocess.run(["apt-cache", "search", "--names-only", "^fonts-"], check=True, capture_output=True)
        names = sorted(line.split()[0] for line in found.stdout.decode().splitlines())
        about = subprocess.run(["apt-cache", "show", "--no-all-versions", *names], check=True, capture_output=True)
        sizes = re.findall(r"^Package: (\S+)$.*?^Size: (\d+)$", about.stdout.decode(), re.MULTILINE | re.DOTALL)
        small = [name for name, size in sizes if int(size) <= LARGEST_PACKAGE]
        subprocess.run(["apt-get", "download", *small], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        raise DataError("apt is not installed; fetch fonts-*.deb elsewhere and use --archives") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode().strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"{' '.join(error.cmd[:2])} failed ({reason}); --archives takes local files") from error
    return sorted(folder.glob("*.deb"))


def unpack(archive: Path, folder: Path) -> None:
    """Raises `DataError` if the file is no Debian package."""
    try:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise DataError(f"{archive} cannot be unpacked by dpkg-deb ({error})") from error


def find_fonts(folder: Path) -> list[Font]:
    """The fonts below a folder that have all characters, each family's weights and slants once, in a fixed order."""
    found: dict[tuple, Font] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in (".ttf", ".otf", ".pfb") or file.is_symlink():
            continue
        try:
            opened = ImageFont.truetype(str(file), 32)
            missing = bytes(opened.getmask("\uffff"))
            masks = [bytes(opened.getmask(character)) for character in CHARACTERS]
        except OSError:
            continue
        if missing in masks or not all(map(any, masks)) or len(set(masks)) < len(masks) - 2:
            continue
        family, style = (str(name or "").lower() for name in opened.getname())
        name = f"{family} {style}"
        bold = bool(re.search(r"bold|black|heavy|ultra(?!light)", name))
        italic = bool(re.search(r"ital|obli|slanted", name))
        found.setdefault((family, bold, italic), Font(file, family, bold, italic))
    return [found[key] for key in sorted(found)]


def text_fonts(fonts: list[Font]) -> list[Font]:
    """Those whose characters look like the median font's: pictograms and other scripts on letters' keys do not."""
    opened = [ImageFont.truetype(str(font.file), 64) for font in fonts]
    templates = np.stack([[template(font, character) for character in CHARACTERS] for font in opened])
    median = np.median(templates, axis=0)
    likeness = (normalized(templates) * normalized(median)).sum(axis=(2, 3)).mean(axis=1)
    return [font for font, value in zip(fonts, likeness) if value >= MIN_LIKENESS]


def template(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """The character's own box, scaled to a square of 16 pixels: (16, 16) in [0, 1]."""
    mask = font.getmask(character)
    box = Image.frombytes("L", mask.size, bytes(mask))
    return np.asarray(box.resize((TEMPLATE_SIZE, TEMPLATE_SIZE), Image.Resampling.BOX), np.float32) / 255


def normalized(images: np.ndarray) -> np.ndarray:
    centered = images - images.mean(axis=(-2, -1), keepdims=True)
    return centered / np.maximum(np.sqrt(np.square(centered).sum(axis=(-2, -1), keepdims=True)), 1e-6)


def split_of(family: str) -> str:
    """The split of a family: a function of the first word of its name, which relatives share."""
    number = zlib.crc32(family.split()[0].encode()) % 100 if family.split() else 99
    return next((split for split, numbers in SPLITS.items() if number in numbers), "train")


def is_new_combination(color: str, character: str) -> bool:
    """Whether this pair is in combinations.parquet alone."""
    return zlib.crc32(f"{color} {character}".encode()) % 10 == 0


def pictures_of(font: Font, split: str) -> Iterator[tuple[str, dict]]:
    """The file and the row of each picture of a font, the same at each call."""
    rng = np.random.default_rng(zlib.crc32(f"{font.family} {font.bold} {font.italic}".encode()))
    opened = ImageFont.truetype(str(font.file), 200)
    for character in CHARACTERS:
        size = str(rng.choice(list(HEIGHTS)))
        position = str(rng.choice(list(POSITIONS))) if size == "small" else ""
        color, ground, colors = draw_colors(rng)
        new = is_new_combination(color, character)
        if new and split != "train":
            continue
        image = draw(opened, character, size, position, colors, rng)
        attributes = {"size": size, "color": color, "bold": font.bold, "italic": font.italic, "ground": ground}
        attributes |= {"position": position, "family": font.family}
        row = {"image": image, "label": character, "caption": caption(character, attributes), **attributes}
        yield ("combinations" if new else split), row


def draw_colors(rng: np.random.Generator) -> tuple[str, str, tuple[np.ndarray, np.ndarray]]:
    """Names and RGB values, (3,) in [0, 1], of the colors of a character and its ground."""
    while True:
        names = [str(name) for name in rng.choice(list(COLORS), 2, replace=False)]
        values = [np.array(COLORS[name]) + rng.uniform(-1, 1, 3) * JITTER for name in names]
        for name, value in zip(names, values):
            if name in ("white", "gray", "black"):
                value[1] = 0
        first, second = (np.array(colorsys.hsv_to_rgb(h % 1, *np.clip((s, v), 0, 1))) for h, s, v in values)
        if abs((first - second) @ (0.299, 0.587, 0.114)) >= MIN_CONTRAST:
            return names[0], names[1], (first, second)


def draw(
    font: ImageFont.FreeTypeFont,
    character: str,
    size: str,
    position: str,
    colors: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> Image.Image:
    """A character whose capital height, and place, are drawn at random within what `size` and `position` say."""
    side = SIZE * SUPERSAMPLING
    height = rng.uniform(*HEIGHTS[size]) * side
    x, y = (np.array(POSITIONS.get(position, (0.5, 0.5))) + rng.uniform(-0.03, 0.03, 2)) * side
    top, bottom = font.getbbox("H", anchor="ls")[1::2]
    opened = font.font_variant(size=max(4, round(font.size * height / (bottom - top))))
    left, top, right, bottom = opened.getbbox(character, anchor="ls")
    widest = max(right - left, bottom - top)
    if widest > 0.9 * side:
        opened = opened.font_variant(size=int(opened.size * 0.9 * side / widest))
        left, top, right, bottom = opened.getbbox(character, anchor="ls")
    mask = Image.new("L", (side, side))
    middle = (x - (left + right) / 2, y - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(middle, character, fill=255, font=opened, anchor="ls")
    cover = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64)[..., None] / 255
    return Image.fromarray((255 * (cover * colors[0] + (1 - cover) * colors[1])).round().astype(np.uint8))


def caption(character: str, attributes: dict) -> str:
    kind = "digit" if character.isdigit() else "letter"
    style = [word for word in ("bold", "italic") if attributes[word]]
    place = f", {attributes['position']}" if attributes["position"] else ""
    words = [attributes["size"], attributes["color"], *style, kind, character]
    article = "an" if attributes["ground"] == "orange" else "a"
    return f"{' '.join(words)} on {article} {attributes['ground']} ground{place}"


def write_parquet(rows: list[dict], file: Path) -> None:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["image"] = [{"bytes": encode(image), "path": None} for image in columns["image"]]
    kinds = dict.fromkeys(columns, datasets.Value("string"))
    kinds |= {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CHARACTERS))}
    kinds |= dict.fromkeys(("bold", "italic"), datasets.Value("bool"))
    columns["label"] = [CHARACTERS.index(character) for character in columns["label"]]
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).to_parquet(file)


def encode(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--archives", type=Path, nargs="+", help="local font packages (default: apt-get)")
    arguments = parser.parse_args(argv)
    rows: dict[str, list[dict]] = {split: [] for split in ("train", *SPLITS, "combinations")}
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for archive in tqdm(arguments.archives or fetch_archives(folder), desc="packages"):
                unpack(archive, folder / "unpacked")
            fonts = text_fonts(find_fonts(folder / "unpacked"))
            families = {font.family for font in fonts}
            if len(families) < MIN_FAMILIES:
                raise DataError(f"{len(families)} font families, where at least {MIN_FAMILIES} are needed")
            for font in tqdm(fonts, desc="fonts"):
                for split, row in pictures_of(font, split_of(font.family)):
                    rows[split].append(row)
    except FavaeError as error:
        sys.exit(f"error: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        write_parquet(found, arguments.output / f"{split}.parquet")
        print(f"{split}: {len(found):,} pictures, {len({row['family'] for row in found})} families")


if __name__ == "__main__":
    main()
