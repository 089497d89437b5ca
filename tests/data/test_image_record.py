"""A cache knows which images it was made of, wherever they are, and takes no others: to go on, or to pair them with."""

import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import command, command_error, make_tiny_kl, write_images
from PIL import Image

from favae.data import image_record
from favae.data.image_record import ImageRecord
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import open_latents
from favae.data.latents_with_images import LatentsWithImages
from favae.data.sources import FolderSource, PhotoSource, open_source
from favae.errors import CacheError


def write(source, cache):
    torch.manual_seed(0)
    return write_latent_cache(make_tiny_kl(), ImageDataset(source, 16), cache, shard_size=5)


@pytest.fixture
def folder(tmp_path):
    """Images of which all files are equally large, with the cache/ of the first two of its three shards."""
    images = write_images(tmp_path / "images")
    for file in images.rglob("*.png"):
        Image.open(file).save(file.with_suffix(".bmp"))
        file.unlink()
    write(FolderSource(images), tmp_path / "cache")
    (tmp_path / "cache/manifest.json").unlink()
    (tmp_path / "cache/shard-00002.safetensors").unlink()
    return tmp_path


def invert(file):
    """Other pixels in as many bytes."""
    image = Image.fromarray(255 - np.asarray(Image.open(file)))
    image.save(file)


def one_byte_more(images):
    with open(images / "class1/2.bmp", "ab") as file:
        file.write(b"0")


def another_class(images):
    (images / "class1").rename(images / "dogs")


def all_inverted(images):
    for file in images.rglob("*.bmp"):
        invert(file)


CHANGES = [
    (lambda images: (images / "class0/0.bmp").rename(images / "class2/9.bmp"), "image 0 was class0/0.bmp"),
    (lambda images: shutil.copy(images / "class0/0.bmp", images / "class2/9.bmp"), "there were 12 images and are 13"),
    (lambda images: (images / "class2/3.bmp").unlink(), "there were 12 images and are 11"),
    (one_byte_more, "class1/2.bmp had 1,494 bytes and has 1,495"),
    (another_class, "image 4 was class1/0.bmp"),
    (lambda images: invert(images / "class1/2.bmp"), "class1/2.bmp has other bytes than before"),
    (all_inverted, "class0/0.bmp has other bytes than before"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_other_images_are_refused_whether_to_go_on_or_to_pair_them(change, message, folder):
    before = {path.name: path.read_bytes() for path in (folder / "cache").iterdir()}
    finished = shutil.copytree(folder / "cache", folder / "finished")
    write(FolderSource(folder / "images"), finished)
    change(folder / "images")
    images = FolderSource(folder / "images")
    with pytest.raises(CacheError, match=message):
        LatentsWithImages(open_latents(finished), ImageDataset(images, 16))
    assert "made of" in command_error("verify", finished, "--data", folder / "images")
    with pytest.raises(CacheError, match=message):
        write(images, folder / "cache")
    assert {path.name: path.read_bytes() for path in (folder / "cache").iterdir()} == before


def test_the_same_images_are_taken_by_any_path_and_from_copies(folder, monkeypatch):
    """A copy has other times, and other shards are written from it; a path may be relative."""
    copy = shutil.copytree(folder / "images", folder / "copy", copy_function=shutil.copyfile)
    for number, file in enumerate(copy.rglob("*.bmp")):
        os.utime(file, (number, number))
    write(FolderSource(copy), folder / "cache")
    monkeypatch.chdir(folder)
    LatentsWithImages(open_latents("cache"), ImageDataset(open_source("copy"), 16))
    command("verify", "cache", "--data", "images")
    (folder / "tokenizer").mkdir()
    make_tiny_kl().save_pretrained("tokenizer")
    words = ["cache-latents", "--tokenizer", "tokenizer", "--resolution", 16, "--shard-size", 5, "--output"]
    for path in ("images", folder / "images", "./copy/"):
        command(*words, "commanded", "--data", path)


def test_names_may_be_any_bytes(folder):
    odd = os.fsencode(folder / "images") + b"/\xff"
    os.mkdir(odd)
    shutil.copy(folder / "images/class0/0.bmp", odd + b"/\xfe\n.bmp")
    for _ in range(2):
        write(FolderSource(folder / "images"), folder / "odd")
    assert open_latents(folder / "odd").classes[-1] == r"\xff"
    shutil.rmtree(odd)
    with pytest.raises(CacheError, match="there were 13 images and are 12"):
        write(FolderSource(folder / "images"), folder / "odd")


def test_few_of_many_images_are_read(folder, monkeypatch):
    """Of a copy, so that going on costs seconds; `favae verify` reads all."""
    read = []
    checksum = FolderSource.checksum
    monkeypatch.setattr(FolderSource, "checksum", lambda self, i: read.append(i) or checksum(self, i))
    monkeypatch.setattr(image_record, "MAX_READ", 3)
    cache = shutil.copytree(folder / "cache", folder / "whole")
    write(FolderSource(folder / "images"), cache)
    read.clear()
    for file in (folder / "images").rglob("*.bmp"):
        os.utime(file, (1, 1))
    write(FolderSource(folder / "images"), cache)
    assert read == [0, 5, 11]
    all_but_the_read = [FolderSource(folder / "images").files[i] for i in range(12) if i not in read]
    for file in all_but_the_read:
        invert(file)
        os.utime(file, (1, 1))
    write(FolderSource(folder / "images"), cache)
    assert "class0/1.bmp has other bytes" in command_error("verify", cache, "--data", folder / "images")


def test_labels_of_tables_are_compared(tmp_path):
    import datasets

    images = FolderSource(write_images(tmp_path / "images", classes=2, per_class=2))
    columns = {"image": [{"bytes": file.read_bytes(), "path": None} for file in images.files]}
    columns |= {"label": [0, 0, 1, 1], "other": [0, 1, 1, 1]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "images.parquet")
    write(open_source(str(tmp_path / "images.parquet")), tmp_path / "cache")
    write(open_source(str(tmp_path / "images.parquet")), tmp_path / "cache")
    with pytest.raises(CacheError, match="1 was of class 0 and is of class 1"):
        write(open_source(str(tmp_path / "images.parquet"), label_column="other"), tmp_path / "cache")


def test_files_that_a_table_names_are_looked_at(tmp_path):
    files = FolderSource(write_images(tmp_path / "images")).files
    datasets.Dataset.from_dict({"image": list(map(str, files))}).to_parquet(tmp_path / "table.parquet")
    before = ImageRecord.of(open_source(str(tmp_path / "table.parquet")))
    assert before.sizes == [file.stat().st_size for file in files]
    files[0].write_bytes(files[0].read_bytes() + b"more")
    assert "bytes and has" in before.difference(ImageRecord.of(open_source(str(tmp_path / "table.parquet"))))


def test_another_split_is_another_set(tmp_path):
    write(PhotoSource("train", 6), tmp_path / "cache")
    with pytest.raises(CacheError, match=r"image 0 was photos:train\[0\] and is photos:validation"):
        write(PhotoSource("validation", 6), tmp_path / "cache")


def test_a_lost_record_is_written_again_for_the_same_images_alone(folder):
    record = folder / "cache/images.json.gz"
    before, images = record.read_bytes(), folder / "images"
    record.unlink()
    write(FolderSource(images), folder / "cache")
    assert record.read_bytes() == before
    command("verify", folder / "cache", "--data", images)
    record.unlink()
    assert "images.json.gz is missing" in command_error("verify", folder / "cache")
    LatentsWithImages(open_latents(folder / "cache"), ImageDataset(FolderSource(images), 16))
    invert(images / "class1/2.bmp")
    with pytest.raises(CacheError, match="class1/2.bmp has other bytes"):
        LatentsWithImages(open_latents(folder / "cache"), ImageDataset(FolderSource(images), 16))
    with pytest.raises(CacheError, match="class1/2.bmp has other bytes"):
        write(FolderSource(images), folder / "cache")
    assert not record.exists() and "images.json.gz is missing" in command_error("verify", folder / "cache")


def test_without_its_record_a_cache_knows_how_many_images_it_has(folder):
    write(FolderSource(folder / "images"), folder / "cache")
    (folder / "cache/images.json.gz").unlink()
    LatentsWithImages(open_latents(folder / "cache"), ImageDataset(FolderSource(folder / "images"), 16))
    with pytest.raises(CacheError, match="there were 12 images and are 6"):
        LatentsWithImages(open_latents(folder / "cache"), ImageDataset(PhotoSource("train", 6), 16))


def test_changed_captions_are_noticed(folder):
    caption = folder / "images/class0/1.txt"
    caption.write_text("one")
    write(FolderSource(folder / "images"), folder / "cache")
    caption.write_text("another")
    with pytest.raises(CacheError, match="captions-00000.json holds other captions than the images have now; delete"):
        write(FolderSource(folder / "images"), folder / "cache")
    for file in (folder / "cache").glob("captions-*"):
        file.unlink()
    write(FolderSource(folder / "images"), folder / "cache")
    command("verify", folder / "cache")
