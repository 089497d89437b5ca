import inspect
import json
import logging
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_FAVAE, TINY_VQ, write_images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_autoencoders import autoencoders

from favae import AutoencoderKLFA, VQModelFA
from favae.autoencoders import encode
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import MomentsDataset, TokenDataset, load_tokenizer, open_latents, tokenizer_hash
from favae.data.packing import pack, unpack
from favae.data.sharded_cache import open_shard, quick_checksum, read_manifest, write_manifest
from favae.data.sources import open_source
from favae.data.stream import TrainingStream
from favae.errors import CacheError, ModelError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tokenizer, images and their cache in shards of 5, 5 and 2 images, for tests that only read."""
    folder = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    tokenizer = AutoencoderKLFA(**TINY_FAVAE).eval()
    images = ImageDataset(open_source(str(write_images(folder / "images"))), 16)  # 12 images, 3 classes
    write_latent_cache(tokenizer, images, folder / "cache", shard_size=5, batch_size=2)
    return tokenizer, images, folder / "cache"


@pytest.fixture
def cache(written, tmp_path):
    """A copy of the cache, for tests that change it."""
    return shutil.copytree(written[2], tmp_path / "cache")


@pytest.fixture
def images(image_folder):
    """The same images, for tests that change them."""
    return ImageDataset(open_source(str(image_folder)), 16)


def read(
    dataset: MomentsDataset | TokenDataset, indices: list[int], views: list[int] | int = 0
) -> dict[str, torch.Tensor]:
    return dataset.read(np.array(indices), np.broadcast_to(np.array(views), len(indices)).copy())


def test_reading_equals_encoding_again(written):
    tokenizer, images, cache = written
    dataset = open_latents(cache, tokenizer)
    assert len(dataset) == 12 and dataset.latent_shape == (6, 4, 4) and dataset.classes == images.classes
    assert len(list(cache.glob("shard-*"))) == 3
    for index in (0, 4, 5, 11):
        image = images[index]["image"].unsqueeze(0)
        for view, picture in enumerate((image, image.flip(-1))):
            batch, posterior = read(dataset, [index], view), tokenizer.encode(picture).latent_dist
            assert torch.allclose(batch["mean"], posterior.mean, atol=1e-5)
            assert torch.allclose(batch["logvar"], posterior.logvar, atol=1e-4)
            assert batch["label"].tolist() == [images.source.label(index)]


def test_statistics_against_numpy(written):
    dataset = open_latents(written[2])
    stored = [read(dataset, list(range(12)), view) for view in range(2)]
    mean = np.concatenate([batch["mean"].numpy() for batch in stored]).astype(np.float64)
    variance = np.exp(np.concatenate([batch["logvar"].numpy() for batch in stored]).astype(np.float64))
    assert np.allclose(dataset.manifest["latents_mean"], mean.mean((0, 2, 3)), rtol=1e-6)
    expected = np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3)))
    assert np.allclose(dataset.manifest["latents_std"], expected, rtol=1e-6)


def test_compressed_latents(written, tmp_path):
    tokenizer, images, cache = written
    manifest = write_latent_cache(tokenizer, images, tmp_path / "packed", shard_size=5, batch_size=2, compress=True)
    assert manifest["dtype"] == "int6" and manifest["counts"] == [5, 5, 2]
    dataset, exact = open_latents(tmp_path / "packed", tokenizer), open_latents(cache)
    assert isinstance(dataset, MomentsDataset) and dataset.latent_shape == (6, 4, 4)
    for view in (0, 1):
        packed, whole = read(dataset, [11, 0, 7], view), read(exact, [11, 0, 7], view)
        span = whole["mean"].amax((2, 3), keepdim=True) - whole["mean"].amin((2, 3), keepdim=True)
        assert ((packed["mean"] - whole["mean"]).abs() <= 0.51 * span / 63 + 1e-3).all()
        variance = whole["logvar"].exp().mean((2, 3), keepdim=True)
        assert torch.allclose(packed["logvar"].exp(), variance, rtol=0.02)
        assert torch.equal(packed["label"], whole["label"])
    assert torch.allclose(dataset.std, exact.std, rtol=0.05)
    samples = dataset.sample(read(dataset, list(range(12)) * 20))
    assert samples.shape == (240, 6, 4, 4) and (samples.std((0, 2, 3)) - 1).abs().max() < 0.2

    with pytest.raises(CacheError, match="another dtype"):
        write_latent_cache(tokenizer, images, tmp_path / "packed", shard_size=5)
    with pytest.raises(CacheError, match="integers already"):
        write_latent_cache(VQModelFA(**TINY_VQ).eval(), images, tmp_path / "tokens", compress=True)
    shard = tmp_path / "packed/shard-00000.safetensors"
    assert sum(value.nbytes for name, value in load_file(shard).items() if name == "codes") == 5 * 2 * 6 * 4 * 3
    save_file(load_file(shard) | {"step": torch.zeros(5, 2, 6, 1, 2, dtype=torch.float16)}, shard)
    manifest = read_manifest(tmp_path / "packed", "cache")
    with open_shard(shard) as changed:
        manifest["quick_checksums"][0] = quick_checksum(changed)
    write_manifest(tmp_path / "packed", manifest)
    with pytest.raises(CacheError, match="another shape"):
        read(open_latents(tmp_path / "packed"), [0])


@pytest.mark.parametrize("width", [1, 4, 5])
def test_packing(width):
    latents = torch.randn(2, 3, 4, width) * torch.tensor([0.0, 1.0, 100.0]).view(3, 1, 1) + 5
    codes, offset, step = pack(latents)
    assert codes.shape == (2, 3, 4, 3 * -(-width // 4)) and codes.dtype == torch.uint8
    unpacked = unpack(codes, offset, step, width)
    assert unpacked.shape == latents.shape
    span = latents.amax((2, 3), keepdim=True) - latents.amin((2, 3), keepdim=True)
    assert ((unpacked - latents).abs() <= span / 126 * 1.05 + 0.01 * (span > 50) + 0.002).all()
    near = torch.linspace(0, 1e-3, 16).view(1, 4, 4)
    assert (unpack(*pack(near), 4) - near).abs().max() < 1e-3 / 63
    again = unpack(*pack(unpacked), width)
    assert (again - unpacked).abs().max() < 0.2 and torch.equal(unpacked[:, 0], torch.full_like(unpacked[:, 0], 5))


def test_samples_are_normalized_and_from_the_posterior(written):
    dataset = open_latents(written[2])
    samples = dataset.sample(read(dataset, [i % 12 for i in range(2400)], [i // 12 % 2 for i in range(2400)]))
    assert samples.dtype == torch.float32 and samples.mean((0, 2, 3)).abs().max() < 0.1
    assert (samples.std((0, 2, 3)) - 1).abs().max() < 0.1
    batch = read(dataset, [3] * 2000)
    again = [dataset.sample(batch, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1]) and not torch.equal(again[0], again[2])
    expected = (batch["mean"][0] - dataset.mean) / dataset.std
    spread = (0.5 * batch["logvar"][0]).exp() / dataset.std
    assert ((again[0].mean(0) - expected) / spread).abs().max() < 0.15
    assert (again[0].std(0) / spread - 1).abs().max() < 0.15


def test_a_batch_is_its_images_in_order(written):
    """Across shards of five, and with repetitions."""
    dataset = open_latents(written[2])
    indices, views = [11, 0, 4, 5, 4, 9], [0, 1, 0, 0, 1, 1]
    batch = read(dataset, indices, views)
    for place, (index, view) in enumerate(zip(indices, views)):
        alone = read(dataset, [index], view)
        assert all(torch.equal(values[place], alone[name][0]) for name, values in batch.items())
    assert batch["label"].tolist() == [index // 4 for index in indices]
    with pytest.raises(IndexError, match="0 ... 11"):
        read(dataset, [12])


def test_an_epoch_has_every_image_once(written):
    dataset = open_latents(written[2])
    order, views = dataset.epoch(np.random.default_rng(0))
    assert sorted(order) == list(range(12)) and set(views) == {0, 1} and list(order) != list(range(12))
    assert set(open_latents(written[2], flip=False).epoch(np.random.default_rng(0))[1]) == {0}


def test_the_training_stream_reads_batches(written):
    dataset = open_latents(written[2])
    stream = TrainingStream(dataset, seed=3)

    def take(count, **arguments):
        return [batch for _, batch in zip(range(count), stream.batches(**arguments))]

    whole = take(6, batch_size=4, first_batch=0)  # two epochs
    halves = [take(6, batch_size=2, first_batch=0, rank=rank, world_size=2) for rank in range(2)]
    for batch, *parts in zip(whole, *halves):
        assert all(torch.equal(batch[name], torch.cat([part[name] for part in parts])) for name in batch)
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(take(4, batch_size=4, first_batch=2), whole[2:]))
    (odd,) = take(1, batch_size=9, first_batch=1)  # across the end of an epoch
    assert torch.equal(odd["mean"], torch.cat([batch["mean"] for batch in whole])[9:18])
    labels = torch.cat([batch["label"] for batch in whole])
    assert labels[:12].bincount().tolist() == labels[12:].bincount().tolist() == [4, 4, 4]
    (worker,) = take(1, batch_size=4, first_batch=0, num_workers=1)
    assert torch.equal(worker["mean"], whole[0]["mean"])


def test_a_killed_run_fills_the_gaps(written, cache):
    tokenizer, images, _ = written
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    (cache / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match="shard-00001.safetensors is missing"):
        open_latents(cache)
    untouched = (cache / "shard-00000.safetensors").stat().st_mtime_ns
    write_latent_cache(tokenizer, images, cache, shard_size=5, batch_size=2)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    assert (cache / "shard-00000.safetensors").stat().st_mtime_ns == untouched


def test_another_tokenizer_or_plan_is_refused_and_nothing_written_over(written, cache, monkeypatch):
    tokenizer, images, _ = written
    torch.manual_seed(1)
    other = AutoencoderKLFA(**TINY_FAVAE)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(CacheError, match="another tokenizer"):
        open_latents(cache, other)
    with pytest.raises(CacheError, match="another tokenizer"):
        write_latent_cache(other, images, cache, shard_size=5)
    with pytest.raises(CacheError, match="another shard_size"):
        write_latent_cache(tokenizer, images, cache, shard_size=6)
    # Tables and archives leave out small images when they read them.
    monkeypatch.setattr(images.source, "min_size", 20, raising=False)
    with pytest.raises(CacheError, match="another min_size"):
        write_latent_cache(tokenizer, images, cache, shard_size=5)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    with pytest.raises(CacheError, match="not empty and not a latent cache"):
        write_latent_cache(tokenizer, images, images.source.path)


@pytest.mark.parametrize("keep", [10, 300])
def test_truncated_shard(written, cache, keep):
    tokenizer, images, _ = written
    shard = cache / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CacheError, match="shard-00002.safetensors is damaged"):
        open_latents(cache)
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="shard-00002.safetensors is damaged"):
        write_latent_cache(tokenizer, images, cache, shard_size=5)


def test_unfinished_cache(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no finished latent cache"):
        open_latents(cache)


def test_unreadable_images_are_left_out(tiny_favae, images, tmp_path, caplog):
    files = images.source.files
    for broken in (files[1], *files[5:10]):  # one of the first shard, all of the second
        broken.write_bytes(broken.read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        manifest = write_latent_cache(tiny_favae, images, tmp_path / "cache", shard_size=5, batch_size=2)
    assert manifest["counts"] == [4, 0, 2]
    assert str(files[1]) in caplog.text
    dataset = open_latents(tmp_path / "cache")
    expected = tiny_favae.encode(images[10]["image"].unsqueeze(0)).latent_dist.mean[0]
    assert len(dataset) == 6 and torch.allclose(read(dataset, [4])["mean"][0], expected, atol=1e-5)
    with safe_open(tmp_path / "cache/shard-00000.safetensors", "pt") as shard:
        assert shard.get_tensor("indices").tolist() == [0, 2, 3, 4]


def test_hash_is_about_latents_only(tiny_favae, tmp_path):
    digest = tokenizer_hash(tiny_favae)
    tiny_favae.register_to_config(latents_mean=[0.0] * 6, latents_std=[1.0] * 6, scaling_factor=2.0)
    tiny_favae.register_to_config(latent_rgb_factors=[[0.1] * 3] * 6, latent_rgb_factors_bias=[0.0] * 3)
    tiny_favae.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == digest
    with torch.no_grad():
        tiny_favae.quant_conv.bias[0] += 1e-3
    assert tokenizer_hash(tiny_favae) != digest


def test_hash_outlives_a_version_with_more_settings(tiny_kl, monkeypatch):
    digest, arguments = tokenizer_hash(tiny_kl), list(inspect.signature(type(tiny_kl).__init__).parameters.values())
    new = inspect.Parameter("new", inspect.Parameter.KEYWORD_ONLY, default=(1, 2))
    monkeypatch.setattr(type(tiny_kl).__init__, "__signature__", inspect.Signature([*arguments, new]), raising=False)
    for value, is_same in ([1, 2], True), ([2, 1], False):
        tiny_kl.register_to_config(new=value)
        assert (tokenizer_hash(tiny_kl) == digest) == is_same


def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(tiny_kl, written, tmp_path):
    images = ImageDataset(written[1].source, 18)
    with pytest.raises(ModelError, match="18 px back at 16 px; the resolution must be a multiple of 4"):
        write_latent_cache(tiny_kl, images, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_stock_autoencoders_can_be_cached(tiny_kl, written, tmp_path):
    _, images, _ = written
    tiny_kl.save_pretrained(tmp_path / "vae")
    loaded = load_tokenizer(str(tmp_path / "vae"))
    write_latent_cache(loaded, images, tmp_path / "cache")
    assert open_latents(tmp_path / "cache", loaded).latent_shape == (6, 4, 4)
    with pytest.raises(ModelError, match="no autoencoder"):
        load_tokenizer(str(tmp_path / "cache"))
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    flux2 = autoencoders()["AutoencoderKLFlux2"]
    flux2.save_pretrained(tmp_path / "flux2")
    with pytest.raises(CacheError, match="no generator .* AutoencoderKLFlux2; they can be teacher.latents"):
        load_tokenizer(str(tmp_path / "flux2"))
    tiny = diffusers.AutoencoderTiny(**widths).eval()
    write_latent_cache(tiny, images, tmp_path / "of_tiny")
    batch = open_latents(tmp_path / "of_tiny", tiny).read(np.array([0]), np.array([0]))
    assert torch.allclose(batch["mean"], encode(tiny, images[0]["image"][None]), atol=1e-5)
    assert batch["logvar"].unique().tolist() == [-30]
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({}, (4, 4)),
        ({"quantizer": "residual", "num_quantizers": 2}, (4, 4, 2)),
        ({"quantizer": "next_band", "scales": (1, 2, 4)}, (16,)),
    ],
)
def test_tokens_equal_quantizing_again(settings, shape, written, tmp_path):
    _, images, _ = written
    tokenizer = VQModelFA(**TINY_VQ, **settings).eval()
    tokenizer.save_pretrained(tmp_path / "vq")
    tokenizer = load_tokenizer(str(tmp_path / "vq"))
    manifest = write_latent_cache(tokenizer, images, tmp_path / "cache", shard_size=5, batch_size=2)
    assert manifest["stores"] == "tokens" and manifest["codebook_size"] == 32 and manifest["dtype"] == "int32"
    assert not any(name.startswith("latents_") for name in manifest)
    dataset = open_latents(tmp_path / "cache", tokenizer)
    assert type(dataset) is TokenDataset and dataset.codebook_size == 32
    assert dataset.latent_shape == shape
    for index in (0, 4, 5, 11):
        image = images[index]["image"].unsqueeze(0)
        for view, picture in enumerate((image, image.flip(-1))):
            batch = read(dataset, [index], view)
            expected = tokenizer.quantize(tokenizer.encode(picture).latents).indices
            assert batch["tokens"].dtype == torch.int64 and torch.equal(batch["tokens"], expected)
            assert batch["label"].tolist() == [images.source.label(index)]
    with safe_open(tmp_path / "cache/shard-00001.safetensors", "pt") as shard:
        assert shard.get_tensor("tokens").dtype == torch.int32
        assert shard.get_tensor("tokens").shape == (5, 2, *dataset.latent_shape)
    (batch,) = [batch for _, batch in zip(range(1), TrainingStream(dataset, seed=0).batches(4, 0))]
    assert sorted(batch) == ["label", "tokens"]


@pytest.mark.parametrize("wrong", [32, -1])
def test_tokens_outside_the_codebook(wrong, written, tmp_path):
    write_latent_cache(VQModelFA(**TINY_VQ).eval(), written[1], tmp_path / "cache")
    file = tmp_path / "cache/shard-00000.safetensors"
    tensors = load_file(file)
    tensors["tokens"][3, 1, 2, 2] = wrong
    save_file(tensors, file)
    with pytest.raises(CacheError, match=f"shard-00000.*tokens in .*{wrong}.* the codebook ends at 31"):
        read(open_latents(tmp_path / "cache"), [0])


@pytest.fixture
def captioned(images):
    """Image 0 has two captions, image 2 none, the others one."""
    for i, file in enumerate(images.source.files):
        lines = ["image zero", " ", "the first"] if i == 0 else [f"image {i}"]
        file.with_suffix(".txt").write_text("\n".join(lines) if i != 2 else " \n")
    return images


def test_captions_are_written_beside_the_shards(tiny_favae, captioned, tmp_path):
    broken = captioned.source.files[1]
    broken.write_bytes(broken.read_bytes()[:300])
    manifest = write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)
    assert manifest["captions"]["count"] == 11 and manifest["captions"]["images_without"] == 1
    captions = [json.loads(file.read_text()) for file in sorted((tmp_path / "cache").glob("captions-*.json"))]
    assert captions[0] == [["image zero", "the first"], [], ["image 3"], ["image 4"]]  # as many as the shard's images
    assert list(map(len, captions)) == manifest["counts"] == [4, 5, 2]


def test_captions_that_come_later_are_added_without_encoding(tiny_favae, captioned, tmp_path, monkeypatch):
    texts = {file: file.read_text() for file in captioned.source.path.rglob("*.txt")}
    for file in texts:
        file.unlink()
    assert write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)["captions"] is None
    assert not list((tmp_path / "cache").glob("captions-*"))
    for file, text in texts.items():
        file.write_text(text)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("shard-*")}
    first = write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)
    assert first["captions"]["count"] == 12 and len(list((tmp_path / "cache").glob("captions-*"))) == 3
    (tmp_path / "cache/captions-00001.json").unlink()  # as after a changed caption
    captioned.source.files[5].with_suffix(".txt").write_text("another caption")
    second = write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)
    assert second["captions"]["hash"] != first["captions"]["hash"]
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("shard-*")} == times
    for file in texts:
        file.unlink()
    with pytest.raises(CacheError, match="has captions, and the images given have none"):
        write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)


def test_damaged_captions(tiny_favae, captioned, tmp_path):
    write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)
    file = tmp_path / "cache/captions-00001.json"
    whole = file.read_text()
    for text, message in (
        (whole[:-5], "captions-00001.json is damaged"),
        ("[[]]", "captions-00001.json is of 1 images, its shard of 5"),
    ):
        file.write_text(text)
        with pytest.raises(CacheError, match=message):
            write_latent_cache(tiny_favae, captioned, tmp_path / "cache", shard_size=5)
