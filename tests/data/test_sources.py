"""One picture and one set of pictures mean the same, whatever they are stored in."""

import io
import logging
import struct
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import command, command_error, write_images
from picture_files import SIZE, encoded, odd_pictures, smooth, turned
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from favae.data import decoding
from favae.data.decoding import UnusableImage, image_extensions, read_image, to_channels, upright_size
from favae.data.folders import FolderSource
from favae.data.images import ImageDataset, skip_missing
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import MomentsDataset
from favae.data.sources import Selection, has_splits, open_source
from favae.errors import ConfigError, DataError
from favae.eval.extraction import image_statistics
from favae.eval.image_sets import CroppedImages, SampleFolder, open_samples
from favae.eval.side_by_side import find_images


@pytest.fixture(scope="module")
def pictures():
    return odd_pictures()


def test_a_picture_means_the_same_in_every_source(tmp_path, pictures):
    names = sorted(pictures)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(pictures[name][0])
    rows = [{"bytes": pictures[name][0], "path": None} for name in names]
    table = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "set.parquet")
    table.save_to_disk(tmp_path / "saved")
    sources = [open_source(str(tmp_path / name)) for name in ("folder", "set.parquet", "saved")]
    assert [Path(sources[0].name(i)).name for i in range(len(sources[0]))] == names
    for i, name in enumerate(names):
        first, *others = [source.read(i) for source in sources]
        assert first.size == SIZE == upright_size(folder / name), name
        assert np.array_equal(np.array(to_channels(first)), np.array(first)), name  # nothing is done twice
        for other in others:
            assert np.array_equal(np.array(first), np.array(other)), name
        expected = pictures[name][1]
        if expected is not None:
            assert np.array_equal(np.array(first), expected), name
        elif name[:4] in ("JPEG", "WEBP"):
            assert np.abs(np.array(first).astype(int) - np.array(smooth())).mean() < 12, name
    assert SampleFolder(folder).size == SIZE[::-1]


def test_shards_are_read_in_their_splits(tmp_path):
    images = [smooth(), ImageOps.mirror(smooth())]
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(image), "path": None} for image in images], "label": ["b", "a"]}
    ).cast_column("image", datasets.Image())
    for split in ("train", "test"):
        for number in range(2):
            path = tmp_path / f"shards/data/{split}-{number:05}-of-00002.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_parquet(path)
    (tmp_path / "shards/README.md").write_text("notes")
    source = open_source(str(tmp_path / "shards"))
    assert len(source) == 4 and source.classes == ["a", "b"] and source.label(2) == 1
    with pytest.raises(DataError, match="validation.*train.*test"):
        open_source(str(tmp_path / "shards"), "validation")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "saved")
    assert len(open_source(str(tmp_path / "saved"), "test")) == 1
    with pytest.raises(DataError, match="no split 'validation', there are train, test"):
        open_source(str(tmp_path / "saved"), "validation")

    folder = tmp_path / "odd [1-2] names"
    folder.mkdir()
    table.to_parquet(folder / "set[0-9]*.parquet")
    source = open_source(str(folder / "set[0-9]*.parquet"))
    assert np.array_equal(np.array(source.read(1)), np.array(images[1]))
    with pytest.raises(DataError, match=r"odd \[1-2\] names.*rename"):
        open_source(str(folder))
    table.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(DataError, match="empty.parquet is empty"):
        open_source(str(tmp_path / "empty.parquet"))


@pytest.mark.parametrize("hidden", [".cache/seen.png", ".seen.png"])
@pytest.mark.parametrize("ending", ["parquet", "tar"])
def test_hidden_images_change_no_set(hidden, ending, tmp_path):
    picture = encoded(smooth())
    (tmp_path / hidden).parent.mkdir(exist_ok=True)
    (tmp_path / hidden).write_bytes(picture)
    if ending == "parquet":
        features = datasets.Features({"image": datasets.Image()})
        rows = datasets.Dataset.from_list([{"image": {"bytes": picture, "path": None}}] * 2, features=features)
        rows.to_parquet(tmp_path / "shard.parquet")
    else:
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            for i in range(2):
                info = tarfile.TarInfo(f"{i}.png")
                info.size = len(picture)
                archive.addfile(info, io.BytesIO(picture))
    assert len(open_source(str(tmp_path))) == 2


def test_a_split_may_follow_a_name_on_the_hub(monkeypatch):
    asked = []

    def load(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_dict({"image": [smooth()]}).cast_column("image", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path in ("hf:owner/set", "hf:owner/set:test"):
        assert len(open_source(path, "validation")) == 1
    assert asked == [("owner/set", "validation"), ("owner/set", "test")]
    assert has_splits("hf:owner/set") and not has_splits("hf:owner/set:test")


def test_links_are_followed_and_end_at_loops(tmp_path, caplog):
    real = write_images(tmp_path / "real", classes=3, per_class=2)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("class0", "class2"):
        (linked / name).symlink_to(real / name)
    (linked / "class1").mkdir()
    (linked / "class1/0.png").symlink_to(real / "class1/0.png")
    (linked / "class1/gone.png").symlink_to(real / "class1/gone.png")
    (linked / "class1/loop").symlink_to(linked)
    (linked / "itself").symlink_to("itself")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(linked)
    assert source.classes == ["class0", "class1", "class2"] and len(source) == 5
    assert [source.label(i) for i in range(5)] == [0, 0, 1, 2, 2]
    assert "2 links that lead nowhere" in caplog.text and "class1/gone.png" in caplog.text and "itself" in caplog.text
    assert "1 links to a folder that they are in (class1/loop)" in caplog.text


def test_nothing_in_a_folder_vanishes(tmp_path, caplog):
    folder = write_images(tmp_path / "images", classes=2, per_class=2)
    for name in (".ipynb_checkpoints", "class0/.cache"):
        (folder / name).mkdir()
        smooth().save(folder / name / "a.png")
    (folder / "annotations").mkdir()
    (folder / "class1/deep").mkdir()
    for name, format in (("a.avif", "AVIF"), ("b.jfif", "JPEG"), ("c.jp2", "JPEG2000"), ("d.JPE", "JPEG")):
        (folder / "class1/deep" / name).write_bytes(encoded(smooth(), format))
    for name in ("class0/a.heic", "class0/b.heic", "notes", "class0/9.txt", "class0/0.txt"):
        (folder / name).write_text("a caption")
    (folder / "tiny").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "tiny/a.png")
    with caplog.at_level(logging.WARNING):
        source = FolderSource(folder)
    assert source.classes == ["class0", "class1", "tiny"] and len(source) == 8
    for said in (
        "2 names that begin with '.' (.ipynb_checkpoints, class0/.cache)",
        "1 folders without an image (annotations)",
        "3 files that are no images (2 .heic, 1 without an ending)",
        "1 texts without an image of their name (class0/9.txt)",
        "several depths below the class folders class1",
        "classes without a usable image: tiny",
    ):
        assert said in caplog.text
    assert {".avif", ".jfif", ".jp2", ".qoi"} <= image_extensions() and not {".eps", ".pdf"} & image_extensions()


def test_splits_and_mixtures_are_no_classes(tmp_path):
    images = write_images(tmp_path / "images", classes=2, per_class=1)
    for splits in (["train"], ["train", "val"], ["train", "validation", "class0"]):
        folder = tmp_path / "-".join(splits)
        folder.mkdir()
        for split in splits:
            (folder / split).symlink_to(images)
        with pytest.raises(DataError, match=f"splits train.*{splits[-1] if len(splits) == 2 else ''}.*none"):
            open_source(str(folder))
        assert len(open_source(str(folder), label_column="none")) == 2 * len(splits)
    smooth().save(images / "a.png")
    with pytest.raises(DataError, match=r"class0/ and a\.png"):
        open_source(str(images))
    with pytest.raises(DataError, match=r"several depths.*a\.png.*class1/0\.png"):
        open_samples(images)
    assert open_source(str(images), label_column="none").classes == ["image"]


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(write_images(tmp_path / "images"))
    for open_images in (open_source, open_samples, lambda path: find_images([path])):
        with pytest.raises(DataError, match="empty|no such"):
            open_images(name)


def test_files_that_are_no_set_are_refused_in_one_line(tmp_path):
    for name in ("a.zip", "a.npy", "a.png", "a.tar.gz"):
        (tmp_path / name).write_text("")
        with pytest.raises(DataError, match=rf"{name} is a file; .*unpack") as error:
            open_source(str(tmp_path / name))
        assert "\n" not in str(error.value)
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(DataError, match="a.tar.* cannot be opened"):
        open_source(str(tmp_path / "a.tar"))
    tarfile.open(tmp_path / "empty.tar", "w").close()
    with pytest.raises(DataError, match="empty.tar is empty"):
        open_source(str(tmp_path / "empty.tar"))
    with pytest.raises(DataError, match="has no columns, so none is called 'breed'"):
        open_source("photos", label_column="breed")
    assert open_source("photos", label_column="label").classes == open_source("photos").classes


def test_columns_that_hold_no_images(tmp_path):
    image = {"bytes": encoded(smooth()), "path": None}
    for values, said in (
        ([["a"], ["b"]], "List of string"),
        ([[image], [image]], "List of "),
        ([3, 4], "int64"),
        (["https://example.org/a.png"] * 2, "addresses.*download"),
    ):
        datasets.Dataset.from_dict({"image": values}).to_parquet(tmp_path / "set.parquet")
        with pytest.raises(DataError, match=said):
            open_source(str(tmp_path / "set.parquet"))
    for bytes_column in ([encoded(smooth())] * 2, [image, {"bytes": None, "path": None}]):
        datasets.Dataset.from_dict({"img": bytes_column}).to_parquet(tmp_path / "set.parquet")
        assert open_source(str(tmp_path / "set.parquet"), image_column="img").read(0).size == SIZE
    with pytest.raises(UnusableImage, match="no image in this row"):
        open_source(str(tmp_path / "set.parquet"), image_column="img").read(1)
    table = datasets.Dataset.from_dict({"img": [image]}).cast_column("img", datasets.Image())
    table.to_parquet(tmp_path / "set.parquet")
    assert open_source(str(tmp_path / "set.parquet")).read(0).size == SIZE  # the only column of images
    with pytest.raises(UnusableImage, match="must have at least 32"):  # as in a folder
        open_source(str(tmp_path / "set.parquet"), min_size=32).read(0)


@pytest.mark.parametrize(
    "labels",
    [[[[1]], [[2]]], [[1], [2]], [{"a": 1}, {"a": 2}], [1, None], [1.5, 2.5], [{"bytes": b"", "path": None}] * 2],
    ids=["arrays", "lists", "structs", "half null", "floats", "masks"],
)
def test_labels_that_are_no_classes_matter_to_those_who_ask(tmp_path, labels):
    image = {"bytes": encoded(smooth()), "path": None}
    table = datasets.Dataset.from_dict({"image": [image, image], "label": labels})
    if isinstance(labels[0], dict) and "bytes" in labels[0]:
        table = table.cast_column("label", datasets.Image())
    if labels == [[[1]], [[2]]]:
        table = table.cast_column("label", datasets.Array2D((1, 1), "int64"))
    table.to_parquet(tmp_path / "set.parquet")
    file = str(tmp_path / "set.parquet")
    assert ImageDataset(open_source(file), 16)[1]["image"].shape == (3, 16, 16)
    with pytest.raises(DataError, match="label column 'label'.*'none'"):
        open_source(file).label(0)
    assert open_source(file, label_column="none").label(1) == 0


def test_captions_that_are_no_texts_matter_to_those_who_ask(tmp_path):
    image = {"bytes": encoded(smooth()), "path": None}
    datasets.Dataset.from_dict({"image": [image], "caption": [{"raw": "a"}]}).to_parquet(tmp_path / "set.parquet")
    file = str(tmp_path / "set.parquet")
    assert ImageDataset(open_source(file), 16)[0] is not None
    with pytest.raises(DataError, match="'caption' must be strings.*struct of raw.*'none'"):
        open_source(file).has_captions  # noqa: B018
    assert not open_source(file, caption_column="none").has_captions


def test_a_default_label_column_that_is_absent_is_said(tmp_path, caplog):
    image = {"bytes": encoded(smooth()), "path": None}
    datasets.Dataset.from_dict({"image": [image, image], "breed": ["b", "a"]}).to_parquet(tmp_path / "set.parquet")
    file = str(tmp_path / "set.parquet")
    with caplog.at_level(logging.WARNING):
        assert open_source(file, label_column="none").classes == ["image"]
        assert not caplog.text
        assert open_source(file).classes == ["image"]
    assert "no column 'label', only image, breed" in caplog.text
    assert open_source(file, label_column="breed").classes == ["a", "b"]
    with pytest.raises(DataError, match="no column 'bread', there are image, breed"):
        open_source(file, label_column="bread")


def test_whatever_a_decoder_raises_is_an_unusable_image(tmp_path, monkeypatch):
    file = tmp_path / "a.tif"
    file.write_bytes(encoded(smooth(), "TIFF"))
    for error in (TypeError("a"), struct.error("b"), IndexError(), KeyError("c"), ZeroDivisionError(), MemoryError()):

        def fail(image, channels, error=error):
            raise error

        monkeypatch.setattr(decoding, "to_channels", fail)
        with pytest.raises(UnusableImage, match=str(error) or type(error).__name__):
            read_image(file)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["TIFF", "PNG", "JPEG", "GIF", "WEBP", "BMP", "JPEG2000", "AVIF"])
def test_damaged_files_are_images_or_unusable(format):
    rng = np.random.default_rng(0)
    whole = np.frombuffer(
        turned(smooth(), 6, format) if format in ("TIFF", "PNG") else encoded(smooth(), format), np.uint8
    )
    for _ in range(60):
        data = whole.copy()
        places = rng.integers(0, min(len(data), 300), 4)
        data[places] = rng.integers(0, 256, 4)
        try:
            assert read_image(io.BytesIO(data.tobytes())).mode == "RGB"
        except UnusableImage as error:
            assert "\n" not in str(error)


def test_pixels_above_pillows_limit_can_be_allowed(tmp_path, monkeypatch):
    smooth().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableImage, match=decoding.MAX_PIXELS_VARIABLE):
        read_image(tmp_path / "a.png")
    monkeypatch.setenv(decoding.MAX_PIXELS_VARIABLE, "1000")
    assert read_image(tmp_path / "a.png").size == SIZE
    monkeypatch.setenv(decoding.MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(ConfigError, match="many"):
        read_image(tmp_path / "a.png")


def test_skipped_images_are_counted_over_all_workers(tmp_path):
    folder = write_images(tmp_path / "images", classes=2, per_class=6)
    files = FolderSource(folder).files
    for file in files[::3]:
        file.write_bytes(file.read_bytes()[:200])
    dataset = ImageDataset(open_source(str(folder)), 16)
    loader = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=skip_missing)
    kept = [batch["index"].tolist() for _ in range(2) for batch in loader if batch is not None]
    assert sum(map(len, kept)) == 16
    assert dataset.unreadable.nonzero().flatten().tolist() == [0, 3, 6, 9]


def test_a_caption_that_is_no_text_costs_its_image_alone(tmp_path, tiny_favae, caplog):
    source = open_source(str(write_images(tmp_path / "images", classes=1, per_class=3)))
    for i, text in enumerate((b"a cat", b"\xff\xfe\x00", b"a dog")):
        source.files[i].with_suffix(".txt").write_bytes(text)
    with caplog.at_level(logging.WARNING):
        manifest = write_latent_cache(tiny_favae, ImageDataset(source, 16), tmp_path / "cache")
    assert manifest["counts"] == [3] and manifest["captions"]["count"] == 2
    without = open_source(str(tmp_path / "images"), caption_column="none")
    assert not without.has_captions and without.captions(0) == []
    assert manifest["captions"]["images_without"] == 1 and "1.txt" in caplog.text


def test_labels_are_refused_before_a_cache_is_begun(tmp_path, tiny_favae):
    image = {"bytes": encoded(smooth()), "path": None}
    datasets.Dataset.from_dict({"image": [image, image], "label": [1, None]}).to_parquet(tmp_path / "set.parquet")
    tiny_favae.save_pretrained(tmp_path / "tokenizer")
    options = ("--tokenizer", tmp_path / "tokenizer", "--resolution", 16, "--output", tmp_path / "cache")
    words = ("cache-latents", "--data", tmp_path / "set.parquet", *options)
    assert "'label'" in command_error(*words) and not (tmp_path / "cache").exists()
    command(*words, "--label-column", "none")
    assert MomentsDataset(tmp_path / "cache").classes == ["image"]


def test_a_loader_is_started_once(tmp_path, monkeypatch):
    started = []
    begin = DataLoader.__iter__
    monkeypatch.setattr(DataLoader, "__iter__", lambda loader: started.append(loader) or begin(loader))
    images = ImageDataset(open_source(str(write_images(tmp_path / "images"))), 16)
    image_statistics(CroppedImages(images), [], keep=0)
    assert len(started) == 1


def test_photos_are_the_built_in_ones(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos")
    assert len(open_source("photos")) == 1024 and "./photos is the folder" in caplog.text
    assert len(open_source("./photos")) == 12


def test_a_selection_is_at_even_distances(tmp_path):
    source = open_source(str(write_images(tmp_path / "images", classes=3, per_class=4)))
    some = Selection(source, 4)
    assert len(some) == 4 and some.classes == source.classes and some.has_captions == source.has_captions
    for place, index in enumerate((0, 3, 7, 11)):
        assert some.name(place) == source.name(index) and some.label(place) == source.label(index)
        assert some.identity(place) == source.identity(index) and some.checksum(place) == source.checksum(index)
        assert some.read(place).tobytes() == source.read(index).tobytes()
        assert some.captions(place) == source.captions(index)
    assert Selection(source, 100).indices == list(range(12))
