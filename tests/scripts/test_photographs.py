"""The photographs script on a few files laid out as in the packages."""

import importlib

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


@pytest.fixture
def photographs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("photographs")


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_each_picture_is_found_once_and_drawings_are_not(photographs, tmp_path):
    files = {
        "usr/share/wallpapers/Path/contents/images/100x80.png": (100, 80),
        "usr/share/wallpapers/Path/contents/images/40x40.png": (40, 40),
        "usr/share/wallpapers/Path/contents/screenshot.png": (200, 200),
        "usr/share/backgrounds/mate/nature/Dune.png": (50, 50),
        "usr/share/backgrounds/mate/abstract/Waves.png": (50, 50),
        "usr/share/tuxpaint/stamps/animals/cartoon/cat.png": (50, 50),
        "usr/share/tuxpaint/stamps/animals/cat_mirror.png": (50, 50),
        "usr/share/backgrounds/Picture_0B_by_somebody.png": (50, 50),
        "usr/share/palapeli/collection/castle.jpg": (50, 50),
    }
    for name, size in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(*size).save(tmp_path / name)
    found = photographs.find_pictures(tmp_path)
    more = ["train/Picture_0B_by_somebody", "train/castle"]
    assert list(found) == ["Path", "animals/cat", "nature/Dune", *more] and found["Path"].name == "100x80.png"
    assert {photographs.split_of(name) for name in more} == {"train"}


def test_crops_are_the_same_each_time_and_have_details(photographs):
    size = photographs.SIZE
    crops = photographs.crops_of("a", noise(2 * size, 2 * size))
    again = photographs.crops_of("a", noise(2 * size, 2 * size))
    assert len(crops) == photographs.CROPS_OF_SMALL and all(crop.size == (size, size) for crop in crops)
    assert [crop.tobytes() for crop in crops] == [crop.tobytes() for crop in again]
    assert photographs.crops_of("a", Image.new("RGB", (2 * size, 2 * size))) == []
    assert photographs.crops_of("a", noise(size, size - 1)) == []


def test_large_pictures_have_more_crops_in_training(photographs, monkeypatch):
    monkeypatch.setattr(photographs, "LARGE", photographs.SIZE)
    picture = noise(photographs.SIZE, photographs.SIZE)
    names = {
        split: next(n for n in map(str, range(100)) if photographs.split_of(n) == split)
        for split in ("heldout", "train")
    }
    crops = {split: photographs.crops_of(name, picture) for split, name in names.items()}
    assert len(crops["heldout"]) == photographs.CROPS_OF_LARGE
    assert len(crops["train"]) == photographs.CROPS_IN_TRAINING > len(crops["heldout"])


def test_a_picture_is_in_one_split(photographs):
    splits = [photographs.split_of(f"picture {i}") for i in range(1000)]
    assert {"train", "validation", "heldout"} == set(splits) and splits.count("train") > 600


def test_what_is_no_package_is_one_line(photographs, tmp_path):
    (tmp_path / "a.deb").write_text("no package")
    with pytest.raises(SystemExit, match="error: .*a.deb cannot be unpacked"):
        photographs.main(["--output", str(tmp_path / "out"), "--archives", str(tmp_path / "a.deb")])
    assert not (tmp_path / "out").exists()
