import json
import logging

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_FAVAE
from safetensors import safe_open

from favae import AutoencoderKLFA
from favae.autoencoders import AutoencoderError
from favae.data.images import ImageDataset, open_source
from favae.data.latents import CacheError, LatentDataset, load_tokenizer, tokenizer_hash, write_cache


@pytest.fixture
def images(image_folder):
    return ImageDataset(open_source(str(image_folder)), 16)  # 12 images, 3 classes


@pytest.fixture
def cache(tiny_favae, images, tmp_path):
    write_cache(tiny_favae, images, tmp_path / "cache", shard_size=5, batch_size=2)
    return tmp_path / "cache"


def test_reading_equals_encoding_again(tiny_favae, images, cache):
    dataset = LatentDataset(cache, tiny_favae)
    assert len(dataset) == 12 and dataset.latent_shape == (6, 4, 4) and dataset.classes == images.classes
    assert len(list(cache.glob("shard-*"))) == 3
    for index in (0, 4, 5, 11):
        image = images[index]["image"].unsqueeze(0)
        for view, picture in enumerate((image, image.flip(-1))):
            mean, logvar, label = dataset.moments(index, view)
            posterior = tiny_favae.encode(picture).latent_dist
            assert torch.allclose(mean, posterior.mean[0], atol=1e-5)
            assert torch.allclose(logvar, posterior.logvar[0], atol=1e-4)
            assert label == images.source.label(index)


def test_statistics_against_numpy(cache):
    dataset = LatentDataset(cache)
    stored = [dataset.moments(i, view)[:2] for i in range(12) for view in range(2)]
    mean = np.stack([m.numpy() for m, _ in stored]).astype(np.float64)
    variance = np.exp(np.stack([v.numpy() for _, v in stored]).astype(np.float64))
    assert np.allclose(dataset.manifest["latents_mean"], mean.mean((0, 2, 3)), rtol=1e-6)
    expected = np.sqrt(mean.var((0, 2, 3)) + variance.mean((0, 2, 3)))
    assert np.allclose(dataset.manifest["latents_std"], expected, rtol=1e-6)


def test_samples_are_normalised_draws_from_the_posterior(cache):
    dataset = LatentDataset(cache)
    draws = torch.stack([dataset.sample(i % 12, np.random.default_rng(i))["latent"] for i in range(2400)])
    assert draws.mean((0, 2, 3)).abs().max() < 0.1
    assert (draws.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert torch.equal(
        dataset.sample(3, np.random.default_rng(1))["latent"], dataset.sample(3, np.random.default_rng(1))["latent"]
    )
    mean, logvar, _ = dataset.moments(3, 0)
    unflipped = LatentDataset(cache, flip=False)
    many = torch.stack([unflipped.sample(3, np.random.default_rng(i))["latent"] for i in range(2000)])
    expected = (mean - dataset.mean) / dataset.std
    spread = (0.5 * logvar).exp() / dataset.std
    assert ((many.mean(0) - expected) / spread).abs().max() < 0.15
    assert (many.std(0) / spread - 1).abs().max() < 0.15


def test_a_killed_run_fills_the_gaps(tiny_favae, images, cache):
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    (cache / "shard-00001.safetensors").unlink()
    with pytest.raises(CacheError, match="shard-00001.safetensors is missing"):
        LatentDataset(cache)
    untouched = (cache / "shard-00000.safetensors").stat().st_mtime_ns
    write_cache(tiny_favae, images, cache, shard_size=5, batch_size=2)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    assert (cache / "shard-00000.safetensors").stat().st_mtime_ns == untouched


def test_another_tokenizer_or_plan_is_refused_and_nothing_written_over(tiny_favae, images, cache, tmp_path):
    torch.manual_seed(1)
    other = AutoencoderKLFA(**TINY_FAVAE)
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    with pytest.raises(CacheError, match="another tokenizer"):
        LatentDataset(cache, other)
    with pytest.raises(CacheError, match="another tokenizer"):
        write_cache(other, images, cache, shard_size=5)
    with pytest.raises(CacheError, match="another shard_size"):
        write_cache(tiny_favae, images, cache, shard_size=6)
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before
    with pytest.raises(CacheError, match="not empty and not a latent cache"):
        write_cache(tiny_favae, images, images.source.path)


@pytest.mark.parametrize("keep", [10, 300])
def test_truncated_shard(tiny_favae, images, cache, keep):
    shard = cache / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CacheError, match="shard-00002.safetensors is damaged"):
        LatentDataset(cache)
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="shard-00002.safetensors is damaged"):
        write_cache(tiny_favae, images, cache, shard_size=5)


def test_unfinished_cache(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheError, match="no finished latent cache"):
        LatentDataset(cache)


def test_unreadable_images_are_left_out(tiny_favae, images, tmp_path, caplog):
    files = images.source.files
    for broken in (files[1], *files[5:10]):  # one of the first shard, all of the second
        broken.write_bytes(broken.read_bytes()[:300])
    with caplog.at_level(logging.WARNING):
        manifest = write_cache(tiny_favae, images, tmp_path / "cache", shard_size=5, batch_size=2)
    assert manifest["counts"] == [4, 0, 2]
    assert str(files[1]) in caplog.text
    dataset = LatentDataset(tmp_path / "cache")
    expected = tiny_favae.encode(images[10]["image"].unsqueeze(0)).latent_dist.mean[0]
    assert len(dataset) == 6 and torch.allclose(dataset.moments(4)[0], expected, atol=1e-5)
    with safe_open(tmp_path / "cache/shard-00000.safetensors", "pt") as shard:
        assert shard.get_tensor("indices").tolist() == [0, 2, 3, 4]


def test_hash_is_about_latents_only(tiny_favae, tmp_path):
    digest = tokenizer_hash(tiny_favae)
    tiny_favae.register_to_config(latents_mean=[0.0] * 6, latents_std=[1.0] * 6, scaling_factor=2.0)
    tiny_favae.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(str(tmp_path))) == digest
    with torch.no_grad():
        tiny_favae.quant_conv.bias[0] += 1e-3
    assert tokenizer_hash(tiny_favae) != digest


def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(tiny_kl, image_folder, tmp_path):
    images = ImageDataset(open_source(str(image_folder)), 18)
    with pytest.raises(AutoencoderError, match="18 px back at 16 px; the resolution must be a multiple of 4"):
        write_cache(tiny_kl, images, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_stock_autoencoders_can_be_cached(tiny_kl, images, tmp_path):
    tiny_kl.save_pretrained(tmp_path / "vae")
    loaded = load_tokenizer(str(tmp_path / "vae"))
    write_cache(loaded, images, tmp_path / "cache")
    assert LatentDataset(tmp_path / "cache", loaded).latent_shape == (6, 4, 4)
    with pytest.raises(AutoencoderError, match="no autoencoder"):
        load_tokenizer(str(tmp_path / "cache"))
    diffusers.AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        tmp_path / "tiny"
    )
    with pytest.raises(CacheError, match="a AutoencoderTiny has no posterior"):
        load_tokenizer(str(tmp_path / "tiny"))
    assert json.loads((tmp_path / "cache/manifest.json").read_text())["dtype"] == "float32"
