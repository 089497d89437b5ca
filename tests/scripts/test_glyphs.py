"""The glyphs script on the fonts in matplotlib's wheel."""

import importlib
from pathlib import Path

import datasets
import matplotlib
import numpy as np
import pytest
from conftest import ROOT

FONTS = Path(matplotlib.get_data_path()) / "fonts"


@pytest.fixture
def glyphs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("glyphs")


def test_fonts_of_text_are_found_once_with_their_style(glyphs):
    fonts = glyphs.find_fonts(FONTS)
    styles = {(font.family, font.bold, font.italic) for font in fonts}
    assert len(styles) == len(fonts) and {("dejavu sans", b, i) for b in (False, True) for i in (False, True)} <= styles
    families = {font.family for font in glyphs.text_fonts(fonts)}
    assert "dejavu serif" in families and "cmsy10" not in families  # symbols on letters' keys


def test_pictures_are_the_same_each_time_and_what_they_are_called(glyphs):
    (font,) = [f for f in glyphs.find_fonts(FONTS) if (f.family, f.bold, f.italic) == ("dejavu sans", True, False)]
    pictures, again = list(glyphs.pictures_of(font, "train")), list(glyphs.pictures_of(font, "train"))
    assert [row["image"].tobytes() for _, row in pictures] == [row["image"].tobytes() for _, row in again]
    assert [row["label"] for _, row in pictures] == list(glyphs.CHARACTERS)
    for split, row in pictures:
        pixels = np.asarray(row["image"], np.float64) / 255
        assert pixels.shape == (32, 32, 3)
        assert (split == "combinations") == glyphs.is_new_combination(row["color"], row["label"])
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        ink = np.abs(pixels - ground).sum(axis=2) > 0.2
        rows, columns = np.nonzero(ink)
        assert ink.any() and not ink[[0, -1]].any()  # nothing is cut off
        if row["position"]:
            vertical, horizontal = row["position"].split()
            assert (rows.mean() < 16) == (vertical == "top") and (columns.mean() < 16) == (horizontal == "left")
            assert row["size"] == "small" and row["caption"].endswith(row["position"])
        assert "bold" in row["caption"] and "italic" not in row["caption"]
    held_out = dict(glyphs.pictures_of(font, "heldout"))
    assert "combinations" not in held_out  # these are of families in training alone


def test_relatives_are_in_one_split(glyphs):
    assert glyphs.split_of("dejavu sans") == glyphs.split_of("dejavu serif condensed")
    splits = [glyphs.split_of(f"family{i} x") for i in range(1000)]
    assert {"train", "validation", "heldout"} == set(splits) and splits.count("train") > 600


def test_files_hold_labels_and_captions(glyphs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glyphs, "MIN_FAMILIES", 3)
    monkeypatch.setattr(glyphs, "unpack", lambda archive, folder: None)
    monkeypatch.setattr(glyphs, "find_fonts", lambda folder, find=glyphs.find_fonts: find(FONTS)[:12])
    splits, seen = ("train", "validation", "heldout"), {}
    monkeypatch.setattr(glyphs, "split_of", lambda family: splits[seen.setdefault(family, len(seen)) % 3])
    glyphs.main(["--output", str(tmp_path), "--archives", "none.deb"])
    read = {split: datasets.Dataset.from_parquet(str(tmp_path / f"{split}.parquet")) for split in ("train", "heldout")}
    assert read["train"].features["label"].names == list(glyphs.CHARACTERS)
    assert not set(read["train"]["family"]) & set(read["heldout"]["family"])
    assert "train: " in capsys.readouterr().out
    pairs = {(row["color"], glyphs.CHARACTERS[row["label"]]) for row in read["train"]}
    assert not any(glyphs.is_new_combination(*pair) for pair in pairs)


def test_too_few_fonts_are_one_line(glyphs, tmp_path):
    (tmp_path / "a.deb").write_text("no package")
    with pytest.raises(SystemExit, match="error: .*a.deb cannot be unpacked"):
        glyphs.main(["--output", str(tmp_path / "out"), "--archives", str(tmp_path / "a.deb")])
