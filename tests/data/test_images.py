import argparse
import logging
import zlib

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

from favae.cli_options import add_data_options, open_data
from favae.data.decoding import UnusableImage, to_channels
from favae.data.folders import FolderSource
from favae.data.images import (
    ImageDataset,
    center_crop,
    jitter_colors,
    random_crop,
    random_window,
    shorter_side_to,
    skip_missing,
    to_uint8,
)
from favae.data.photos import PhotoSource
from favae.data.sources import open_source
from favae.errors import DataError


def test_conversions():
    assert to_channels(Image.new("L", (2, 2), 100)).getpixel((0, 0)) == (100, 100, 100)
    assert to_channels(Image.new("CMYK", (2, 2), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)
    assert to_channels(Image.new("RGBA", (2, 2), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_channels(Image.new("LA", (2, 2), (10, 255))).getpixel((0, 0)) == (10, 10, 10)
    assert to_channels(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    sixteen = Image.fromarray(np.array([[0, 65535], [257 * 7, 257 * 9]], dtype=np.uint16))
    assert [to_channels(sixteen).getpixel(xy)[0] for xy in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 255, 7, 9]
    for image in (Image.new("F", (2, 2)), Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32))):
        with pytest.raises(UnusableImage):
            to_channels(image)


def test_saved_oddities_are_read_and_broken_files_are_named(tmp_path, caplog):
    folder = write_images(tmp_path / "images", classes=2, per_class=1) / "class0"
    Image.new("CMYK", (20, 20)).save(folder / "cmyk.jpg")
    Image.fromarray(np.zeros((20, 20), dtype=np.uint16)).save(folder / "sixteen.png")
    Image.new("LA", (20, 20)).save(folder / "alpha.png")
    Image.new("RGB", (5, 50)).save(folder / "tiny.png")
    (folder / "text.png").write_text("not an image")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image, and not called one")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(tmp_path / "images")
    assert len(source) == 5 and source.classes == ["class0", "class1"]
    assert [source.label(i) for i in range(5)] == [0, 0, 0, 0, 1]
    assert all(source.read(i).mode == "RGB" for i in range(5))
    for name in ("tiny.png", "text.png", "empty.jpg"):
        assert name in caplog.text
    assert "skipped 3 of 8" in caplog.text


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable image"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(DataError, match=r"1 image files found, 1 skipped"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no split 'tset'"):
        open_source("photos:tset")


def test_truncated_file_is_skipped_with_a_warning(image_folder, caplog):
    file = sorted(image_folder.rglob("*.png"))[1]
    file.write_bytes(file.read_bytes()[:300])  # the header is whole, the pixels are not
    dataset = ImageDataset(open_source(str(image_folder)), 16)
    with caplog.at_level(logging.WARNING):
        assert dataset[1] is None
    assert str(file) in caplog.text
    batch = skip_missing([dataset[0], dataset[1], dataset[2]])
    assert batch["index"].tolist() == [0, 2]
    assert dataset.random_view(1, np.random.default_rng(0))["index"] == 2  # training takes the next one
    assert skip_missing([None]) is None


def test_center_crop_scales_the_shorter_side():
    image = Image.new("RGB", (100, 40))
    image.paste((255, 0, 0), (30, 0, 70, 40))
    crop = center_crop(image, 16)
    assert crop.size == (16, 16)
    assert np.array(crop)[:, 2:14, 0].min() > 200  # the red middle fills it
    assert center_crop(Image.new("RGB", (7, 9)), 16).size == (16, 16)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_jitter_changes_colors_and_nothing_else(mode):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8), "RGBA")
    image = picture.convert(mode) if mode != "RGBA" else picture
    same, again, other = (jitter_colors(image, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert same.mode == mode and same.size == image.size and np.array_equal(same, again)
    assert not np.array_equal(same, other) and not np.array_equal(same, image)
    if mode == "RGBA":
        assert np.array_equal(same.getchannel("A"), image.getchannel("A"))
    unchanged = np.asarray(jitter_colors(image, 0.0, np.random.default_rng(1)), int)
    assert np.abs(unchanged - np.asarray(image, int)).max() <= 6  # the way through hue and back rounds


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_training_views_are_jittered_alike_for_one_seed(mode, image_folder):
    source, channels = open_source(str(image_folder)), {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    plain, jittered = (ImageDataset(source, 16, color_jitter=j, channels=channels) for j in (0.0, 0.5))
    views = [data.random_view(0, np.random.default_rng(3))["image"] for data in (plain, jittered, jittered)]
    assert torch.equal(views[1], views[2]) and not torch.equal(views[0], views[1])


@pytest.mark.parametrize("shape", [(40, 3), (3, 40), (67, 5), (160, 5)])
def test_only_the_window_of_a_strip_is_scaled(shape, monkeypatch):
    # No extremes, because Pillow clips between its two passes, whose order it chooses by the shape.
    strip = Image.fromarray(np.random.default_rng(0).integers(90, 160, (*shape, 3), dtype=np.uint8))
    whole = np.array(shorter_side_to(strip, 16)).astype(int)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: sizes.append(size) or resize(self, size, *a, **k)
    )
    top, left = ((side - 16) // 2 for side in whole.shape[:2])
    crop = np.array(center_crop(strip, 16))
    assert np.abs(crop - whole[top : top + 16, left : left + 16]).max() <= 2
    for seed in range(8):
        crop = np.array(random_crop(strip, 16, np.random.default_rng(seed)))
        rng = np.random.default_rng(seed)
        left, top = (int(rng.integers(side - 15)) for side in whole.shape[1::-1])
        assert np.abs(crop - whole[top : top + 16, left : left + 16]).max() <= 2
        assert (np.array(random_window(strip, 16, np.random.default_rng(seed))) == crop).all()
    assert set(sizes) == {(16, 16)}


def test_tensors_and_bytes():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    source = type("S", (), {"__len__": lambda s: 1, "read": lambda s, i, channels: image, "label": lambda s, i: 0})()
    tensor = ImageDataset(source, 16)[0]["image"]
    assert tensor.min() == -1 and tensor.max() == 1
    assert torch.equal(to_uint8(tensor), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_photos_split_without_overlap():
    train, validation, heldout, test = (PhotoSource(split) for split in PhotoSource.NUM_CROPS_BY_SPLIT)
    assert train.classes == validation.classes and len(heldout.classes) == 2 and len(test.classes) == 3
    apart = [*train.classes, *heldout.classes, *test.classes]
    assert len(set(apart)) == len(apart) == len(PhotoSource.PHOTOS)
    assert test.read(0).width >= 64
    for name, left, right in zip(train.classes, train._regions, validation._regions):
        whole = PhotoSource("heldout")
        full = whole._region(name)  # the heldout split does not cut
        assert left.width + right.width == full.width, name
        assert np.array_equal(np.array(full)[:, : left.width], np.array(left))
        assert np.array_equal(np.array(full)[:, left.width :], np.array(right))
    assert np.array_equal(np.array(train.read(5)), np.array(PhotoSource("train").read(5)))
    assert min(train.read(i).width for i in range(40)) >= 64


def test_photos_of_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(PhotoSource.PHOTOS, "dahlia", ("no_such_package/flower.jpg", ""))
    with pytest.raises(DataError, match=r"photos:test .* no_such_package; pip install favae\[offline\]"):
        PhotoSource("test")


def test_parquet_and_missing_columns(tmp_path):
    import datasets

    images = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(4)]
    data = datasets.Dataset.from_dict(
        {"image": images, "label": [7, 3, 7, 3]},
        features=datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    data.to_parquet(tmp_path / "images.parquet")
    source = open_source(str(tmp_path / "images.parquet"))
    assert len(source) == 4 and source.classes == ["3", "7"]
    assert [source.label(i) for i in range(4)] == [1, 0, 1, 0]
    assert source.read(2).getpixel((0, 0)) == (2, 0, 0)
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="broken.parquet .*cannot be opened"):
        open_source(str(tmp_path / "broken.parquet"))
    with pytest.raises(DataError, match="no column 'picture'.*image, label"):
        open_source(str(tmp_path / "images.parquet"), image_column="picture")
    with pytest.raises(DataError, match="nowhere.parquet"):
        open_source(str(tmp_path / "nowhere.parquet"))
    classes = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for wrong in (None, -1):
        labels = datasets.Dataset.from_dict({"image": images, "label": [1, 0, 1, wrong]}, features=classes)
        labels.to_parquet(tmp_path / "labels.parquet")
        source = open_source(str(tmp_path / "labels.parquet"))  # who does not ask for labels needs none
        with pytest.raises(DataError, match=f"label column 'label' .* {wrong}"):
            source.label(0)


def test_captions_beside_images(image_folder, caplog):
    source = FolderSource(image_folder)
    source.files[0].with_suffix(".txt").write_text("a cat \n\n \t\nune pomme verte, dorée\n", encoding="utf-8-sig")
    source.files[1].with_suffix(".txt").write_text(" \n")
    assert source.captions(0) == ["a cat", "une pomme verte, dorée"]  # without empty ones
    assert source.captions(1) == source.captions(2) == []
    source.files[2].with_suffix(".txt").write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.WARNING):
        assert source.captions(2) == []  # it costs the captions of this image alone
    assert "2.txt: captions must be UTF-8" in caplog.text and "1 so far" in caplog.text


def test_captions_of_photos(monkeypatch):
    source = PhotoSource("heldout")
    assert source.captions(2) == ["the face of a tabby cat"] and source.classes[source.label(2)] == "cat"
    file, _ = PhotoSource.PHOTOS["cat"]
    monkeypatch.setitem(PhotoSource.PHOTOS, "cat", (file, " "))
    assert source.captions(0) == []


def test_captions_of_columns(tmp_path):
    import datasets

    columns = {
        "caption": [["a cat", " ", "an animal "], [], ["a dog"]],
        "text": ["a cat", None, " "],
        "views": [1, 2, 3],
    }
    images = {"image": [Image.new("RGB", (20, 20))] * 3}
    data = datasets.Dataset.from_dict(images | columns).cast_column("image", datasets.Image())
    file = str(tmp_path / "images.parquet")
    data.to_parquet(file)

    def captions(source):
        return [source.captions(i) for i in range(3)]

    assert captions(open_source(file)) == [["a cat", "an animal"], [], ["a dog"]]
    assert captions(open_source(file, caption_column="text")) == [["a cat"], [], []]
    with pytest.raises(DataError, match=r"no column 'nothing', there are image, caption"):
        open_source(file, caption_column="nothing")
    data.remove_columns("caption").to_parquet(tmp_path / "without.parquet")
    without = open_source(str(tmp_path / "without.parquet"))
    assert captions(without) == [[], [], []] and not without.has_captions
    with pytest.raises(DataError, match=r"'views' must be strings or lists of strings, not int64"):
        open_source(file, caption_column="views").captions(0)
    parser = argparse.ArgumentParser()
    add_data_options(parser, "--data", split="train", captions=True)
    arguments = parser.parse_args(["--data", file, "--caption-column", "text"])
    assert captions(open_data(arguments)) == [["a cat"], [], []]


def test_identities_tell_images_apart_and_survive_a_move(tmp_path):
    folder = write_images(tmp_path / "images", classes=2, per_class=2)
    before = [FolderSource(folder).identity(i) for i in range(4)]
    assert len(set(before)) == 4
    moved = folder.rename(tmp_path / "moved")
    source = FolderSource(moved)
    assert [source.identity(i) for i in range(4)] == before
    Image.new("RGB", (24, 20)).save(source.files[1])
    after = [FolderSource(moved).identity(i) for i in range(4)]
    assert [a == b for a, b in zip(before, after)] == [True, False, True, True]
    assert len({split.identity(i) for split in map(PhotoSource, ("train", "test")) for i in range(3)}) == 6


def test_one_picture_has_one_checksum_and_one_size_in_every_source(tmp_path):
    import datasets

    folder = FolderSource(write_images(tmp_path / "images", classes=2, per_class=2))
    rows = [{"bytes": file.read_bytes(), "path": None} for file in folder.files]
    table = tmp_path / "images.parquet"
    datasets.Dataset.from_dict({"image": rows}).to_parquet(table)
    parquet = open_source(str(table))
    for i, row in enumerate(rows):
        assert folder.checksum(i) == parquet.checksum(i) == zlib.crc32(row["bytes"])
        assert folder.identity(i).size == parquet.identity(i).size == len(row["bytes"])
    assert len({parquet.identity(i) for i in range(4)}) == 4
    photos = PhotoSource()
    assert photos.checksum(0) == PhotoSource().checksum(0) != photos.checksum(1)
