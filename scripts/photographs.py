#!/usr/bin/env python
"""Writes crops of the photographs in six Debian packages: a few hundred pictures, for experiments without a network
beyond apt's.

    python scripts/photographs.py --output photographs           (apt-get download fetches the packages)
    python scripts/photographs.py --output photographs --archives plasma-workspace-wallpapers_5.27.5-2_all.deb ...

Writes train.parquet, validation.parquet and heldout.parquet into the folder; all crops of one picture are in one of
them. A crop is square, of 128 px, from a picture that was made smaller by a factor between 1 and what leaves one crop;
crops without details are left out. Large pictures have more crops than pictures of single things, and in train three
times as many as elsewhere. Columns: image, label (the picture's name).

The pictures have the licenses of their packages (CC-BY-SA, GPL and others); they are data and not part of favae.
"""

import argparse
import io
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm import tqdm

from favae.data.decoding import read_image
from favae.data.images import shorter_side_to
from favae.errors import DataError, FavaeError

PACKAGES = (
    "plasma-workspace-wallpapers", "mate-backgrounds", "tuxpaint-stamps-default", "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04", "palapeli-data",
)  # fmt: skip
FOLDERS = ("usr/share/wallpapers", "usr/share/backgrounds/mate", "usr/share/tuxpaint/stamps")
TRAINING_FILES = ("usr/share/backgrounds/*_by_*", "usr/share/palapeli/collection/*.jpg")  # of pictures for training
DRAWINGS = ("symbols", "cartoon", "/desktop/", "screenshot", "/abstract/")  # in the paths of what is no photograph
SIZE = 128
LARGE = 1000  # pixels along the shorter side, from which on a picture has many crops
CROPS_OF_LARGE, CROPS_OF_SMALL = 80, 6
CROPS_IN_TRAINING = 240  # of a large picture
TRIES = 3  # as many crops are looked at, for each that may be taken
MIN_DETAIL = 2.5  # of 255: the mean difference of neighboring pixels
TRAINING = "train"
SPLITS = {"validation": range(10, 20), "heldout": range(20, 35)}  # of 100 numbers that names are hashed to
MIN_PICTURES = 300


def fetch_archives(folder: Path) -> list[Path]:
    """Downloads the packages into a folder.

    Raises:
        DataError: if apt-get is missing or fails.
    """
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        raise DataError("apt-get is not installed; fetch the packages elsewhere and use --archives") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode().strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"apt-get download failed ({reason}); --archives takes local files") from error
    return sorted(folder.glob("*.deb"))


def unpack(archive: Path, folder: Path) -> None:
    """Raises `DataError` if the file is no Debian package."""
    try:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise DataError(f"{archive} cannot be unpacked by dpkg-deb ({error})") from error


def find_pictures(folder: Path) -> dict[str, Path]:
    """The largest file of each picture in unpacked packages, by the picture's name."""
    found: dict[str, tuple[int, Path]] = {}
    for root in FOLDERS:
        for file in sorted((folder / root).rglob("*")):
            parts = file.relative_to(folder / root).parts
            if file.suffix.lower() not in (".png", ".jpg", ".jpeg") or any(w in str(file) for w in DRAWINGS):
                continue
            # A wallpaper is a folder with one picture in several sizes; elsewhere, sizes follow an underscore.
            name = parts[0] if root == FOLDERS[0] else "/".join([*parts[:-1], file.stem.partition("_")[0]])
            size = file.stat().st_size
            if name not in found or size > found[name][0]:
                found[name] = size, file
    pictures = {name: file for name, (_, file) in sorted(found.items())}
    more = [file for pattern in TRAINING_FILES for file in sorted(folder.glob(pattern))]
    return pictures | {f"{TRAINING}/{file.stem}": file for file in more}


def split_of(name: str) -> str:
    """The split of a picture: a function of its name alone."""
    if name.startswith(f"{TRAINING}/"):
        return TRAINING
    number = zlib.crc32(name.encode()) % 100
    return next((split for split, numbers in SPLITS.items() if number in numbers), TRAINING)


def crops_of(name: str, picture: Image.Image) -> list[Image.Image]:
    """Square crops of a picture, the same at each call; none of one that is too small."""
    longest = min(picture.size)
    if longest < SIZE:
        return []
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    crops = []
    count = CROPS_OF_SMALL
    if longest >= LARGE:
        count = CROPS_IN_TRAINING if split_of(name) == TRAINING else CROPS_OF_LARGE
    for _ in range(TRIES * count):
        side = round(SIZE * (longest / SIZE) ** rng.random())  # in the picture's own pixels, log-uniform
        left, top = int(rng.integers(picture.width - side + 1)), int(rng.integers(picture.height - side + 1))
        crop = shorter_side_to(picture.crop((left, top, left + side, top + side)), SIZE)
        if np.abs(np.diff(np.asarray(crop, np.float32), axis=1)).mean() >= MIN_DETAIL:
            crops.append(crop)
    return crops[:count]


def encode(crop: Image.Image) -> bytes:
    stream = io.BytesIO()
    crop.save(stream, "PNG")
    return stream.getvalue()


def write_parquet(rows: list[tuple[str, bytes]], file: Path) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    columns = {
        "image": [{"bytes": data, "path": None} for _, data in rows],
        "label": [name for name, _ in rows],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    parser.add_argument("--archives", type=Path, nargs="+", help="local files of the packages (default: apt-get)")
    arguments = parser.parse_args(argv)
    rows: dict[str, list[tuple[str, bytes]]] = {split: [] for split in (TRAINING, *SPLITS)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for archive in arguments.archives or fetch_archives(Path(folder)):
                unpack(archive, Path(folder) / "unpacked")
            pictures = find_pictures(Path(folder) / "unpacked")
            if len(pictures) < MIN_PICTURES:
                raise DataError(f"{len(pictures)} pictures where the packages have at least {MIN_PICTURES}")
            for name, file in tqdm(pictures.items(), desc="pictures"):
                rows[split_of(name)] += [(name, encode(crop)) for crop in crops_of(name, read_image(file))]
    except FavaeError as error:
        sys.exit(f"error: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        write_parquet(found, arguments.output / f"{split}.parquet")
        print(f"{split}: {len(found):,} crops of {len({name for name, _ in found})} pictures")


if __name__ == "__main__":
    main()
