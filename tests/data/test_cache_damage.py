"""What is not as it was written is found: when a cache is opened, when it is read, or by `favae verify`."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    TINY_FAVAE,
    TINY_VQ,
    command,
    command_error,
    make_tiny_kl,
    refusal,
    tiny_generator_recipe,
    write_images,
)
from safetensors.torch import load_file, save_file
from tiny_text import save_bert

from favae import AutoencoderKLFA, VQModelFA
from favae.data.captions import first_captions
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import MomentsDataset, open_latents
from favae.data.sharded_cache import open_shard, quick_checksum, read_manifest, shard_file, write_manifest
from favae.data.sources import open_source
from favae.data.text_embeddings import TextEmbeddings, write_text_embeddings
from favae.errors import CacheError
from favae.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Images with captions, and cache/ with its text embeddings, in shards of 5, 5 and 2 images."""
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    source = open_source(str(write_images(folder / "images")))
    for i, file in enumerate(source.files):
        file.with_suffix(".txt").write_text(f"the cat {i}")
    write_latent_cache(make_tiny_kl(), ImageDataset(source, 16), folder / "cache", shard_size=5)
    write_text_embeddings(TextEncoder(str(save_bert(folder / "bert"))), folder / "cache")
    return folder


@pytest.fixture
def cache(written, tmp_path):
    """A copy of the cache, for tests that damage it."""
    return shutil.copytree(written / "cache", tmp_path / "cache")


def rewrite(folder, **changes):
    """A manifest that agrees with the shards, as another writer might leave it, but for the changes."""
    manifest = read_manifest(folder, "cache")
    sums = []
    for number in range(len(manifest["counts"])):
        with open_shard(shard_file(folder, number)) as shard:
            sums.append(quick_checksum(shard))
    write_manifest(folder, manifest | {"quick_checksums": sums} | changes)


def change(file, **changes):
    """Replaces tensors of a shard by what functions make of them."""
    tensors = load_file(file)
    save_file(tensors | {name: function(tensors[name]) for name, function in changes.items()}, file)


def with_nan(values):
    values[1].flatten()[3] = torch.nan
    return values


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_any_flipped_bit_is_found(written, cache):
    """In any file that belongs to the cache, at any place."""
    files = [file for file in cache.rglob("*") if file.is_file() and file.name not in ("plan.json", ".lock")]
    assert len(files) == 12
    rng = np.random.default_rng(0)
    for file in files:
        content = file.read_bytes()
        for position in rng.integers(len(content), size=3):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            assert file.name in command_error("verify", cache)
        file.write_bytes(content)
    command("verify", cache)


def test_what_is_right_is_said_and_all_that_is_damaged_is_named(written, cache, capsys):
    command("verify", cache)
    assert "as it was written: 12 images, with text embeddings" in capsys.readouterr().out
    command("verify", cache / "text_embeddings")
    command("verify", cache, "--data", written / "images")
    (cache / "shard-00000.safetensors").unlink()
    change(cache / "shard-00002.safetensors", mean=torch.neg)
    (cache / "captions-00001.json").write_text("[]")
    (cache / "text_embeddings/shard-00001.safetensors").write_bytes(b"")
    message = command_error("verify", cache)
    assert f"{cache}/shard-00000.safetensors is missing" in message and "text_embeddings/shard-00001" in message
    assert all(f"{cache}/{name} is not as" in message for name in ("shard-00002.safetensors", "captions-00001.json"))
    assert "no finished cache" in command_error("verify", written / "images")


def swap(cache):
    first, second = (cache / f"shard-0000{number}.safetensors" for number in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def take_another_tokenizers(cache):
    torch.manual_seed(1)
    source = open_source(str(cache.parent / "images"))
    write_latent_cache(make_tiny_kl(), ImageDataset(source, 16), cache.parent / "other", shard_size=5)
    shutil.copy(cache.parent / "other/shard-00000.safetensors", cache)


@pytest.mark.parametrize(
    "damage, name",
    [
        (lambda cache: change(cache / "shard-00001.safetensors", labels=lambda labels: labels.flip(0)), "shard-00001"),
        (lambda cache: change(cache / "shard-00001.safetensors", indices=lambda i: i + 1), "shard-00001"),
        (lambda cache: change(cache / "shard-00001.safetensors", mean=torch.Tensor.half), "shard-00001"),
        (swap, "shard-00000"),
        (take_another_tokenizers, "shard-00000"),
        (lambda cache: change(cache / "text_embeddings/shard-00001.safetensors", offsets=torch.neg), "shard-00001"),
        (lambda cache: edit(cache / "manifest.json", latents_std=[2.0] * 6), "manifest.json"),
        (lambda cache: edit(cache / "manifest.json", counts=[5, 2, 5]), "manifest.json"),
        (lambda cache: (cache / "manifest.json").write_text('{"counts": [5, 5'), "manifest.json is damaged"),
        (lambda cache: (cache / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda cache: (cache / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda cache: (cache / "text_embeddings/manifest.json").write_text(""), "manifest.json is damaged"),
    ],
)
def test_refused_when_it_is_opened(damage, name, written, cache):
    shutil.copytree(written / "images", cache.parent / "images")
    damage(cache)
    with pytest.raises(CacheError, match=name):
        open_latents(cache, text_embeddings=TextEmbeddings(cache / "text_embeddings"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents_std": [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]}, "latents_std.1"),
        ({"latents_std": [1.0] * 5 + [float("nan")]}, "latents_std.5"),
        ({"latents_std": [1e-50] * 6}, "latents_std.0"),
        ({"latents_mean": [float("inf")] * 6}, "latents_mean.0"),
        ({"latents_mean": [1e300] * 6}, "latents_mean.0"),
        ({"latents_mean": None}, "latents_mean"),
        ({"latents_std": [1.0] * 4}, "6 channels"),
        ({"latent_shape": "large"}, "latent_shape"),
        ({"stores": "pixels"}, "stores"),
        ({"counts": [5, 5, 3]}, "shard-00002.* holds 2 images"),
        ({"counts": [5, -5]}, "counts.1"),
    ],
)
def test_impossible_manifests_are_refused(changes, message, cache):
    rewrite(cache, **changes)
    with pytest.raises(CacheError, match=message):
        open_latents(cache)


def first(values):
    return values[:1].clone()


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("shard-00001", {"mean": None}, "proper mean"),
        ("shard-00001", {"indices": torch.Tensor.float}, "proper indices"),
        ("shard-00001", {"logvar": torch.Tensor.int}, "proper logvar"),
        ("shard-00001", {"labels": first}, "different lengths"),
        ("shard-00001", {"mean": first}, "different lengths"),
        ("shard-00001", {"mean": lambda mean: mean[:, :, :3].clone()}, "another shape"),
        ("shard-00001", {"labels": lambda labels: labels + 2}, "labels without a class"),
        ("text_embeddings/shard-00001", {"lengths": None}, "proper lengths"),
        ("text_embeddings/shard-00001", {"lengths": lambda lengths: lengths + 90}, "lengths or offsets"),
        ("text_embeddings/shard-00001", {"embeddings": first}, "lengths or offsets"),
        ("text_embeddings/shard-00001", {"offsets": lambda offsets: offsets.flip(0)}, "lengths or offsets"),
    ],
)
def test_impossible_shards_are_refused(file, changes, message, cache):
    path = cache / f"{file}.safetensors"
    tensors = load_file(path)
    for name, function in changes.items():
        value = tensors.pop(name)
        if function is not None:
            tensors[name] = function(value)
    save_file(tensors, path)
    rewrite(path.parent)
    with pytest.raises(CacheError, match=f"{file}.* {message}"):
        latents = open_latents(cache, text_embeddings=TextEmbeddings(cache / "text_embeddings"))
        latents.read(np.arange(12), np.zeros(12, np.int64))


def test_numbers_that_are_not_finite_are_refused_when_they_are_read(written, cache, tmp_path):
    change(cache / "shard-00001.safetensors", logvar=with_nan)
    change(cache / "text_embeddings/shard-00002.safetensors", embeddings=with_nan)
    latents = open_latents(cache, text_embeddings=TextEmbeddings(cache / "text_embeddings"))
    views = np.zeros(1, np.int64)
    latents.read(np.array([5]), views)
    for index, name in ((6, f"{cache}/shard-00001"), (11, f"{cache}/text_embeddings/shard-00002")):
        with pytest.raises(CacheError, match=f"{name}.*not finite"):
            latents.read(np.array([index]), views)
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="shard-00001.*not finite"):
        write_latent_cache(make_tiny_kl(), ImageDataset(open_source(str(written / "images")), 16), cache, shard_size=5)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_training_ends_well_on_them(workers, tiny_cache):
    recipe = tiny_generator_recipe(tiny_cache, tiny_cache / "cache", tiny_cache / "tokenizer")
    words = (recipe, f"output={tiny_cache / 'run'}", f"train.num_workers={workers}")
    shard = tiny_cache / "cache/shard-00000.safetensors"
    change(shard, mean=with_nan)
    assert f"{shard} has numbers that are not finite" in refusal("train_generator", *words)
    edit(tiny_cache / "cache/manifest.json", latents_std=[0.0] * 6)
    assert "manifest.json is not as it was written" in refusal("train_generator", *words)
    assert not (tiny_cache / "run/final").exists()


@pytest.mark.parametrize("key", ["manifest_checksum", "checksums", "quick_checksums"])
def test_a_manifest_without_a_checksum_is_refused(key, cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    del manifest[key]
    (cache / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="not as it was written"):
        open_latents(cache)


def test_writing_again_does_not_make_damage_right(written, cache):
    """A complete cache keeps the checksums that it had; a shard that was deleted is written as it was."""
    source = open_source(str(written / "images"))
    torch.manual_seed(0)
    arguments = (make_tiny_kl(), ImageDataset(source, 16), cache)
    edit(cache / "plan.json", tokenizer=read_manifest(cache, "cache")["tokenizer"])
    change(cache / "shard-00001.safetensors", labels=lambda labels: labels.flip(0))
    write_latent_cache(*arguments, shard_size=5)
    with pytest.raises(CacheError, match="shard-00001.* is not as it was written"):
        open_latents(cache)
    (cache / "shard-00001.safetensors").unlink()
    write_latent_cache(*arguments, shard_size=5)
    command("verify", cache)
    assert (cache / "shard-00001.safetensors").read_bytes() == (written / "cache/shard-00001.safetensors").read_bytes()


def test_a_damaged_plan_is_named_and_a_lost_one_is_in_the_manifest(written, cache):
    torch.manual_seed(0)
    arguments = (make_tiny_kl(), ImageDataset(open_source(str(written / "images")), 16), cache)
    plan = (cache / "plan.json").read_text()
    (cache / "plan.json").write_text(plan[:-9])
    with pytest.raises(CacheError, match="plan.json is damaged"):
        write_latent_cache(*arguments, shard_size=5)
    (cache / "plan.json").unlink()
    with pytest.raises(CacheError, match="another shard_size"):
        write_latent_cache(*arguments, shard_size=4)
    write_latent_cache(*arguments, shard_size=5)
    assert (cache / "plan.json").read_text() == plan


def test_changed_captions_are_not_encoded(written, cache):
    file = cache / "captions-00000.json"
    file.write_text(file.read_text().replace("cat", "dog"))
    shutil.rmtree(cache / "text_embeddings")
    with pytest.raises(CacheError, match="captions-00000.json is not as it was written"):
        write_text_embeddings(TextEncoder(str(written / "bert")), cache)
    with pytest.raises(CacheError, match="captions-00000.json is not as it was written"):
        first_captions(cache, read_manifest(cache, "cache"), 3)


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_tiny_kl, lambda: VQModelFA(**TINY_VQ).eval()])
def test_latents_that_are_not_finite_are_never_written(make, image_folder, tmp_path):
    """The message names the image, and the shards that were whole stay."""
    images = ImageDataset(open_source(str(image_folder)), 16)
    tokenizer, seen = make(), []
    encode = tokenizer.encode

    def encode_with_nan(view):
        seen.append(len(view))
        if len(seen) == 6:  # after a black image and a shard: the second one's first batch
            view[1] = torch.nan
        return encode(view)

    tokenizer.encode = encode_with_nan
    with pytest.raises(CacheError, match="class1/1.png: .*not finite in torch.float32"):
        write_latent_cache(tokenizer, images, tmp_path / "cache", shard_size=4, batch_size=2)
    assert [file.name for file in (tmp_path / "cache").glob("shard-*")] == ["shard-00000.safetensors"]


def test_latents_that_overflow_are_never_written(tiny_favae, image_folder, tmp_path):
    with torch.no_grad():
        tiny_favae.quant_conv.weight.zero_()
        tiny_favae.quant_conv.bias[:6] = 1e5
    images = ImageDataset(open_source(str(image_folder)), 16)
    with pytest.raises(CacheError, match="class0/0.png: latents of up to 1e.05 overflow in torch.float16; float32"):
        write_latent_cache(tiny_favae, images, tmp_path / "half", dtype=torch.float16)
    write_latent_cache(tiny_favae, images, tmp_path / "whole", dtype=torch.bfloat16)


def test_embeddings_that_are_not_finite_are_never_written(written, tmp_path):
    encoder = TextEncoder(str(written / "bert"))
    encoder.model.embeddings.word_embeddings.weight.data.fill_(torch.nan)
    with pytest.raises(CacheError, match="'the cat 0' that are not finite"):
        write_text_embeddings(encoder, written / "cache", tmp_path / "embeddings")


def test_statistics_of_constant_channels_can_be_divided_by(image_folder, tmp_path, caplog):
    """Also of large constants, where the mean of squares minus the square of the mean would be below 0."""
    tokenizer = AutoencoderKLFA(**TINY_FAVAE).eval()
    with torch.no_grad():
        tokenizer.quant_conv.weight[:3] = 0
        tokenizer.quant_conv.weight[6:] = 0
        tokenizer.quant_conv.bias[:3] = torch.tensor([0.0, 1e4, -123.456])
        tokenizer.quant_conv.bias[6:] = -100.0
    images = ImageDataset(open_source(str(image_folder)), 16)
    manifest = write_latent_cache(tokenizer, images, tmp_path / "cache", shard_size=5)
    assert manifest["latents_std"][:3] == [1.0, 1.0, 1.0] and "[0, 1, 2]" in caplog.text
    assert np.allclose(manifest["latents_mean"][:3], [0.0, 1e4, -123.456]) and min(manifest["latents_std"]) > 0
    dataset = open_latents(tmp_path / "cache")
    assert isinstance(dataset, MomentsDataset)
    assert dataset.sample(dataset.read(np.arange(12), np.zeros(12, np.int64))).isfinite().all()


def test_a_damaged_record_is_named(written, cache):
    file = cache / "images.json.gz"
    whole = file.read_bytes()
    for content in (whole[:30], b"", gzip.compress(b"[1]"), gzip.compress(b'{"names": 3}'), whole[:40] + b"x" * 40):
        file.write_bytes(content)
        torch.manual_seed(0)
        with pytest.raises(CacheError, match="images.json.gz is damaged"):
            write_latent_cache(
                make_tiny_kl(), ImageDataset(open_source(str(written / "images")), 16), cache, shard_size=5
            )
