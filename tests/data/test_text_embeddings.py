import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, command_error, make_tiny_kl, write_images
from safetensors.torch import load_file
from tiny_text import save_bert

from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import open_latents
from favae.data.sources import open_source
from favae.data.stream import TrainingStream
from favae.data.text_embeddings import TextEmbeddings, write_text_embeddings
from favae.errors import CacheError
from favae.text_encoder import TextEncoder

CAPTIONS = {0: ["a cat", "the red cat"], 1: ["a dog"], 3: ["the apple of the cat", "a dog", "an apple"]}  # else none


def write_captioned_images(folder) -> ImageDataset:
    source = open_source(str(write_images(folder)))  # 12 images
    for i, captions in CAPTIONS.items():
        source.files[i].with_suffix(".txt").write_text("\n".join(captions))
    return ImageDataset(source, 16)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A text encoder and a cache with its text embeddings, in shards of 3, 3, 3 and 3 images, for tests that only read.

    Two of the shards have no captions.
    """
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    encoder = TextEncoder(str(save_bert(folder / "bert")))
    write_latent_cache(make_tiny_kl(), write_captioned_images(folder / "images"), folder / "cache", shard_size=3)
    write_text_embeddings(encoder, folder / "cache", batch_size=2, dtype=torch.float32)
    return encoder, folder / "cache"


@pytest.fixture
def encoder(written) -> TextEncoder:
    return written[0]


@pytest.fixture
def cache(written, tmp_path):
    """A copy of the cache, for tests that change it."""
    return shutil.copytree(written[1], tmp_path / "cache")


def read(embeddings: TextEmbeddings, indices: list[int], choices: list[int]):
    return embeddings.read(np.array(indices), np.array(choices))


def test_reading_equals_encoding_again(written):
    encoder, cache = written
    embeddings = TextEmbeddings(cache / "text_embeddings")
    assert len(embeddings) == 12 and (embeddings.encoder, embeddings.hash) == (encoder.name, encoder.hash)
    assert (embeddings.dim, embeddings.max_length) == (8, 12)
    for index, captions in CAPTIONS.items():
        for choice in range(7):
            found, mask = read(embeddings, [index], [choice])
            expected, _ = encoder.encode([captions[choice % len(captions)]])
            assert found.dtype == torch.float32 and mask.sum() == mask[0, : len(expected[0])].sum() == len(expected[0])
            assert torch.allclose(found[mask], expected[0], atol=1e-6)


def test_a_batch_is_padded_to_a_multiple_of_16_and_nothing_is_masked_out(written):
    _, cache = written
    embeddings = TextEmbeddings(cache / "text_embeddings")
    found, mask = read(embeddings, [3, 2, 1, 3], [0, 5, 0, 1])
    assert found.shape == (4, 16, 8) and mask.sum(1).tolist() == [7, 0, 4, 4]  # an image without captions: none
    assert not found[~mask].any()
    assert torch.equal(found[2], found[3])  # the same caption of two images
    found, mask = read(embeddings, [2, 11], [0, 1])
    assert found.shape == (2, 16, 8) and not mask.any()
    with pytest.raises(IndexError, match=r"0 \.\.\. 11"):
        read(embeddings, [12], [0])


def test_files_and_manifest(written):
    _, cache = written
    manifest = json.loads((cache / "text_embeddings/manifest.json").read_text())
    assert manifest["counts"] == [3, 3, 3, 3] and manifest["count"] == 6 and manifest["images_without"] == 9
    shard = load_file(cache / "text_embeddings/shard-00000.safetensors")
    assert shard["embeddings"].shape == (3, 5, 8) and shard["lengths"].tolist() == [4, 5, 4]
    assert shard["offsets"].tolist() == [0, 2, 3, 3]
    assert load_file(cache / "text_embeddings/shard-00002.safetensors")["embeddings"].shape == (0, 1, 8)


def test_half_precision_is_the_default_and_what_it_cannot_hold_is_refused(written, tmp_path):
    encoder, cache = written
    assert write_text_embeddings(encoder, cache, tmp_path / "half")["dtype"] == "float16"
    half, whole = (
        read(TextEmbeddings(folder), [3], [0])[0] for folder in (tmp_path / "half", cache / "text_embeddings")
    )
    assert half.dtype == torch.float32 and torch.allclose(half, whole, atol=2e-3)
    encoder = TextEncoder(encoder.name)
    encoder.model.embeddings.LayerNorm.weight.fill_(1e9)
    encoder.model.encoder.layer[0].output.LayerNorm.weight.fill_(1e9)
    with pytest.raises(CacheError, match="overflow in torch.float16.* float32"):
        write_text_embeddings(encoder, cache, tmp_path / "large")


def test_training_reads_text_in_a_reproducible_order(written):
    _, cache = written
    plain, text = open_latents(cache), open_latents(cache, text_embeddings=TextEmbeddings(cache / "text_embeddings"))
    order = plain.epoch(np.random.default_rng(5))
    with_text = text.epoch(np.random.default_rng(5))
    assert all(np.array_equal(a, b) for a, b in zip(order, with_text)) and len(order) == 2 and len(with_text) == 3
    stream = TrainingStream(text, seed=3)

    def take(count, **arguments):
        return [batch for _, batch in zip(range(count), stream.batches(**arguments))]

    whole = take(6, batch_size=4, first_batch=0)
    assert sorted(whole[0]) == ["label", "logvar", "mean", "text_embeddings", "text_mask"]
    for first, count in ((0, 6), (2, 4)):
        for batch, expected in zip(take(count, batch_size=4, first_batch=first), whole[first:]):
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
    halves = [take(6, batch_size=2, first_batch=0, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves):
        for row, other in zip(batch["text_embeddings"], [row for part in parts for row in part["text_embeddings"]]):
            assert torch.equal(row[: len(other)], other)  # each half is padded to its own longest
    (worker,) = take(1, batch_size=4, first_batch=0, num_workers=1)
    assert torch.equal(worker["text_embeddings"], whole[0]["text_embeddings"])
    lengths = {k: set() for k in range(12)}
    for epoch in range(12):
        indices, views, choices = text.epoch(np.random.default_rng(epoch))
        for index, length in zip(indices, text.read(indices, views, choices)["text_mask"].sum(1).tolist()):
            lengths[index].add(length)
    assert lengths[0] == {4, 5} and lengths[3] == {7, 4} and lengths[1] == {4} and lengths[2] == {0}
    first = text.read(np.array([3]), np.array([0]))  # without choices
    assert first["text_mask"].sum() == 7


def test_a_killed_run_fills_the_gaps(encoder, cache):
    before = {path.name: path.read_bytes() for path in (cache / "text_embeddings").iterdir()}
    untouched = (cache / "text_embeddings/shard-00000.safetensors").stat().st_mtime_ns
    (cache / "text_embeddings/shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match="shard-00001.safetensors is missing"):
        TextEmbeddings(cache / "text_embeddings")
    write_text_embeddings(encoder, cache, batch_size=2, dtype=torch.float32)
    assert {path.name: path.read_bytes() for path in (cache / "text_embeddings").iterdir()} == before
    assert (cache / "text_embeddings/shard-00000.safetensors").stat().st_mtime_ns == untouched
    (cache / "text_embeddings/manifest.json").unlink()
    with pytest.raises(CacheError, match="no finished folder of text embeddings"):
        TextEmbeddings(cache / "text_embeddings")


def test_another_kind_of_cache_is_named(cache):
    for wrong, right in ((open_latents, cache / "text_embeddings"), (TextEmbeddings, cache)):
        with pytest.raises(CacheError, match="another kind of cache"):
            wrong(right)


def test_text_embeddings_have_no_captions(encoder, cache, tmp_path):
    with pytest.raises(CacheError, match="another kind of cache.* no tokenizer"):
        write_text_embeddings(encoder, cache / "text_embeddings", tmp_path / "texts")
    assert not (tmp_path / "texts").exists()


def test_another_encoder_is_refused(encoder, cache, tmp_path):
    torch.manual_seed(1)
    other = TextEncoder(str(save_bert(tmp_path / "other")))
    before = {path.name: path.read_bytes() for path in (cache / "text_embeddings").iterdir()}
    with pytest.raises(CacheError, match="made with another encoder, hash"):
        write_text_embeddings(other, cache, dtype=torch.float32)
    with pytest.raises(CacheError, match="another dtype"):
        write_text_embeddings(encoder, cache)
    with pytest.raises(CacheError, match="another max_length"):
        write_text_embeddings(TextEncoder(encoder.name, 5), cache, dtype=torch.float32)
    with pytest.raises(CacheError, match="not empty and not a folder of text embeddings"):
        write_text_embeddings(encoder, cache, tmp_path / "other")
    assert {path.name: path.read_bytes() for path in (cache / "text_embeddings").iterdir()} == before


def test_an_encoder_is_the_same_by_any_path(encoder, cache, monkeypatch):
    monkeypatch.chdir(Path(encoder.name).parent)
    write_text_embeddings(TextEncoder("bert"), cache, dtype=torch.float32)
    assert TextEmbeddings(cache / "text_embeddings").encoder == "bert"


@pytest.mark.parametrize("keep", [10, 200])
def test_truncated_shard(encoder, cache, keep):
    shard = cache / "text_embeddings/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CacheError, match="shard-00001.safetensors is damaged"):
        TextEmbeddings(cache / "text_embeddings")
    with pytest.raises(CacheError, match="shard-00001.safetensors is damaged"):
        write_text_embeddings(encoder, cache, dtype=torch.float32)
    shard.write_bytes((cache / "shard-00001.safetensors").read_bytes())
    with pytest.raises(CacheError, match="shard-00001.safetensors is no such shard, without proper embeddings"):
        TextEmbeddings(cache / "text_embeddings")
    shard.write_bytes((cache / "text_embeddings/shard-00000.safetensors").read_bytes())
    with pytest.raises(CacheError, match="shard-00001.safetensors is not as it was written"):
        TextEmbeddings(cache / "text_embeddings")
    shard.unlink()
    with pytest.raises(CacheError, match="shard-00001.safetensors is missing"):
        TextEmbeddings(cache / "text_embeddings")


def test_text_of_other_latents_is_refused(written, tiny_kl, tmp_path):
    encoder, cache = written
    images = write_captioned_images(tmp_path / "images")
    embeddings = TextEmbeddings(cache / "text_embeddings")
    write_latent_cache(tiny_kl, images, tmp_path / "shards", shard_size=4)
    with pytest.raises(CacheError, match="was made of other captions than those of .*shards"):
        open_latents(tmp_path / "shards", text_embeddings=embeddings)
    images.source.files[0].with_suffix(".txt").write_text("another caption")
    write_latent_cache(tiny_kl, images, tmp_path / "captions", shard_size=3)
    with pytest.raises(CacheError, match="made of other captions"):
        open_latents(tmp_path / "captions", text_embeddings=embeddings)
    shutil.copytree(cache / "text_embeddings", tmp_path / "captions/text_embeddings")
    with pytest.raises(CacheError, match="made with another captions"):
        write_text_embeddings(encoder, tmp_path / "captions", dtype=torch.float32)


def test_latents_without_captions(tiny_kl, image_folder, encoder, tmp_path):
    write_latent_cache(tiny_kl, ImageDataset(open_source(str(image_folder)), 16), tmp_path / "cache")
    with pytest.raises(CacheError, match="cache has no captions"):
        write_text_embeddings(encoder, tmp_path / "cache")
    assert not (tmp_path / "cache/text_embeddings").exists()


def test_the_command(written, tmp_path, capsys, caplog):
    encoder, cache = written
    arguments = ["embed-captions", "--latents", cache, "--output", tmp_path / "embeddings", "--encoder"]
    with caplog.at_level(logging.WARNING):
        command(*arguments, encoder.name, "--max-length", "5", "--dtype", "float32")
    assert "6 captions of 12 images" in capsys.readouterr().out and "cut to 5 tokens" in caplog.text
    embeddings = TextEmbeddings(tmp_path / "embeddings")
    assert read(embeddings, [3], [0])[1].sum() == 5
    assert torch.equal(read(pickle.loads(pickle.dumps(embeddings)), [3], [0])[0], read(embeddings, [3], [0])[0])
    message = command_error(*arguments, "/no/encoder")
    assert "/no/encoder" in message and "--encoder FOLDER" in message
    assert "nothing" in command_error("embed-captions", "--latents", tmp_path / "nothing", "--encoder", encoder.name)
    assert "max_length" in command_error(*arguments, encoder.name, "--max-length", "100")
