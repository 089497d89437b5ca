"""Tar shards in webdataset's format as a source of images."""

import io
import os
import tarfile
import zlib

import numpy as np
import pytest
import torch
from conftest import command, tiny_tokenizer_recipe, train_whole_and_in_parts, write_images
from picture_files import SIZE, encoded, smooth
from tiny_text import save_bert

from favae.autoencoders import load_autoencoder
from favae.data.decoding import UnusableImage
from favae.data.images import ImageDataset
from favae.data.latents import open_latents
from favae.data.sources import open_source
from favae.data.stream import TrainingStream
from favae.data.text_embeddings import FOLDER, TextEmbeddings
from favae.errors import DataError


def write_shard(path, rows: dict[str, dict[str, bytes]]) -> None:
    """Rows by their keys, members by what their names end in."""
    with tarfile.open(path, "w") as tar:
        for key, members in rows.items():
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_texts_that_are_not_utf_8(tmp_path, caplog):
    rows = {"0": {"png": encoded(smooth(), "PNG"), "txt": "Café".encode("latin-1"), "cls": b"\xe9"}}
    write_shard(tmp_path / "a.TAR", rows)
    source = open_source(str(tmp_path / "a.TAR"))
    assert source.captions(0) == [] and "UTF-8" in caplog.text
    with pytest.raises(DataError, match="the class of .*a.TAR/0 is not UTF-8"):
        _ = source.classes


def test_webdataset_shards(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        rows = {
            f"{number}{i:05}": {
                "JPG": encoded(smooth(), "JPEG"),
                "txt": f"caption {i}\nanother\n".encode(),
                "cls": b"%d" % (10 - i),
            }
            for i in range(2)
        }
        write_shard(shards / f"{number:05}.tar", rows)
    for path, count in ((shards, 4), (shards / "00001.tar", 2), (shards / "*.tar", 4)):
        source = open_source(str(path))
        assert len(source) == count and source.classes == ["9", "10"] and source.label(1) == 0  # numbers, not texts
        assert source.read(0).size == SIZE and source.captions(1) == ["caption 1", "another"]
        assert source.name(1).endswith("00001") and source.checksum(1) == zlib.crc32(encoded(smooth(), "JPEG"))
    identities = [source.identity(i) for i in range(4)]
    assert len({identity.name for identity in identities}) == 4
    assert all(identity.size == len(encoded(smooth(), "JPEG")) for identity in identities)
    assert open_source(str(shards), caption_column="cls", label_column="none").captions(0) == ["10"]
    with pytest.raises(DataError, match=r"no member ends in \.json"):
        open_source(str(shards), label_column="json")
    with pytest.raises(DataError, match="no split 'validation', there are train"):
        open_source(str(shards), "validation")
    (shards / "val").mkdir()
    (shards / "00001.tar").rename(shards / "val/00001.TAR")
    (shards / "._00000.tar").write_bytes(b"of another system")
    assert len(open_source(str(shards), image_column="JPG")) == 2
    assert len(open_source(str(shards))) == len(open_source(str(shards), "validation")) == 2
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/set").symlink_to(shards)
    (shards / "loop").symlink_to(shards)
    assert len(open_source(str(tmp_path / "linked"))) == 2


def test_hard_links_are_files_and_other_links_are_named(tmp_path, caplog):
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        (tmp_path / "0.png").write_bytes(encoded(smooth(), "PNG"))
        os.link(tmp_path / "0.png", tmp_path / "1.png")
        (tmp_path / "2.png").symlink_to("0.png")
        for number in range(3):
            tar.add(tmp_path / f"{number}.png", f"{number}.png")
    source = open_source(str(tmp_path / "links.tar"))
    checksum = zlib.crc32((tmp_path / "0.png").read_bytes())
    assert len(source) == 2 and source.checksum(0) == source.checksum(1) == checksum
    assert "1 symbolic links (2.png)" in caplog.text

    # Places are those of this file, not of an older one of its name.
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for number in (2, 0, 1):
            tar.add(tmp_path / f"{number}.png", f"{number}.png")
    again = open_source(str(tmp_path / "links.tar"))
    assert [again.checksum(index) for index in range(2)] == [checksum] * 2
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.png"))
        dangling = tarfile.TarInfo("1.png")
        dangling.type, dangling.linkname = tarfile.LNKTYPE, "9.png"
        tar.addfile(dangling)
    with pytest.raises(DataError, match="1.png is a link to nothing"):
        open_source(str(tmp_path / "links.tar"))


def test_damaged_shards_and_rows(tmp_path, caplog):
    image, whole = encoded(smooth()), tmp_path / "whole.tar"
    write_shard(
        whole, {"a": {"png": image, "cls": b"cat"}, "b": {"json": b"{}"}, "c": {"png": image}, "d": {"png": b""}}
    )
    source = open_source(str(whole))
    assert len(source) == 3 and "left out 1 rows without an image (b)" in caplog.text
    with pytest.raises(DataError, match=r"whole.tar/c has no class"):
        source.label(0)
    with pytest.raises(UnusableImage):
        source.read(2)
    with pytest.raises(UnusableImage, match="at least 1000"):
        open_source(str(whole), min_size=1000).read(0)
    member = 512 * (1 + -(-len(image) // 512))  # header and content, which fill blocks
    for length in (512 + len(image) // 2, member, member + 100):  # inside a member, after one, in the next header
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:length])
        with pytest.raises(DataError, match="cut.tar cannot be opened: .*(cut off|unexpected end)"):
            open_source(str(tmp_path / "cut.tar"))
    write_shard(tmp_path / "texts.tar", {"a": {"txt": b"cat"}})
    with pytest.raises(DataError, match="no image in its 1 rows, such as a"):
        open_source(str(tmp_path / "texts.tar"))
    with pytest.raises(DataError, match="gone.tar: no such file"):
        open_source(str(tmp_path / "gone.tar"))


def test_training_data_from_shards_is_that_of_a_folder(tmp_path):
    folder = write_images(tmp_path / "images", classes=2, per_class=3)
    rows = {f"{i:03}": {"png": file.read_bytes()} for i, file in enumerate(sorted(folder.rglob("*.png")))}
    write_shard(tmp_path / "a.tar", dict(list(rows.items())[:4]))
    write_shard(tmp_path / "b.tar", dict(list(rows.items())[4:]))
    streams = [
        TrainingStream(ImageDataset(open_source(str(path), label_column="none"), 16), seed=0)
        for path in (folder, tmp_path / "*.tar")
    ]
    parts = [list(zip(range(3), stream.batches(4, 1, rank=1, world_size=2))) for stream in streams]
    assert all(torch.equal(a["image"], b["image"]) for (_, a), (_, b) in zip(*parts))


def test_a_tokenizer_a_cache_and_captions_from_shards(tmp_path):
    """The cache has the shards' order, and each text its image."""
    files = sorted(write_images(tmp_path / "images", classes=2, per_class=6).rglob("*.png"))
    for number in range(2):
        rows = {
            f"{number}{i}": {"png": files[6 * number + i].read_bytes(), "txt": b"the dog" if i % 2 else b"a red apple"}
            for i in range(6)
        }
        write_shard(tmp_path / f"{number}.tar", rows)
    shards = tmp_path / "*.tar"
    recipe = tiny_tokenizer_recipe(tmp_path, shards)
    more = ("data.label_column=none", "train.sample_every=0", "train.lr_scheduler=constant", "train.lr_warmup_steps=0")
    train_whole_and_in_parts("train_tokenizer", tmp_path, recipe, *more, steps=4, first=2)

    data = ("--tokenizer", tmp_path / "whole/final", "--data", shards, "--resolution", "16")
    command("cache-latents", *data, "--label-column", "none", "--output", tmp_path / "cache")
    command("embed-captions", "--latents", tmp_path / "cache", "--encoder", save_bert(tmp_path / "bert"))
    embeddings = TextEmbeddings(tmp_path / "cache" / FOLDER)
    dataset = open_latents(tmp_path / "cache", flip=False, text_embeddings=embeddings)
    source, vae = open_source(str(shards), label_column="none"), load_autoencoder(str(tmp_path / "whole/final"))
    for index in (3, 8):
        batch = dataset.read(np.array([index]), np.zeros(1, int), np.zeros(1, int))
        with torch.no_grad():
            mean = vae.encode(ImageDataset(source, 16)[index]["image"][None]).latent_dist.mean
        assert torch.allclose(batch["mean"], mean, atol=1e-2)
        assert int(batch["text_mask"].sum()) == 2 + len(source.captions(index)[0].split())
