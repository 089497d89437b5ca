"""Meters of latents against values that are known."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_VQ, command, command_error, write_images
from scipy.fft import idctn

from favae import VQModelFA
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import load_tokenizer
from favae.data.sources import Selection, open_source
from favae.errors import DataError
from favae.eval import latent_evaluation
from favae.eval.latent_meters import (
    high_frequency_share,
    interpolated,
    neighbor_consistency,
    power_spectrum,
    standardized,
    velocity_variance,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_white_noise_reaches_the_bound_of_viv():
    """Also if the classes have means: these take their share of the variance, and the shape stays white."""
    labels = torch.arange(4).repeat_interleave(60)
    measured = velocity_variance(noise(240, 16, 4, 4), labels)
    assert measured.viv == pytest.approx(math.pi / 2 * math.sqrt(measured.rho), rel=0.03)
    assert measured.phi == pytest.approx(1, abs=0.03) and measured.rho == pytest.approx(59 / 60, abs=0.01)
    with_means = velocity_variance(noise(240, 16, 4, 4) + 2 * noise(4, 16, 4, 4, seed=1)[labels], labels)
    assert with_means.rho < 0.4 and with_means.phi == pytest.approx(1, abs=0.03)
    assert with_means.viv == pytest.approx(math.pi / 2 * math.sqrt(with_means.rho), rel=0.03)


def test_viv_does_not_depend_on_the_channels_scale_and_is_small_for_few_directions():
    labels = torch.arange(2).repeat_interleave(60)
    latents = noise(120, 16, 4, 4)
    scaled = latents * torch.linspace(0.1, 10, 16).view(-1, 1, 1) + 3
    assert velocity_variance(scaled, labels).viv == pytest.approx(velocity_variance(latents, labels).viv)
    one_direction = noise(120, 1, 1, 1) * noise(16, 1, 1, seed=2) * noise(1, 4, 4, seed=3)
    assert velocity_variance(one_direction, labels).phi < 0.2


def test_viv_is_too_low_for_channels_of_different_spectra():
    """As docs/evaluation.md warns; the true one is the mean over both halves, whose covariances are known."""
    frequency = 1 + torch.hypot(*torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    amplitude = frequency**-2 / (frequency**-4).mean().sqrt()  # power 1/f^4, of mean 1
    coefficients = (noise(3000, 4, 8, 8) * amplitude).numpy()
    smooth = torch.from_numpy(idctn(coefficients, axes=(2, 3), norm="ortho"))
    measured = velocity_variance(torch.cat([smooth, noise(3000, 4, 8, 8, seed=1)], dim=1), torch.zeros(3000))
    true = math.pi / 2 * (amplitude.mean().item() + 1) / 2
    assert measured.viv < 0.6 * true
    assert velocity_variance(smooth, torch.zeros(3000)).viv == pytest.approx(true * 2 - math.pi / 2, rel=0.05)


def test_viv_refuses_what_would_bias_it():
    with pytest.raises(DataError, match="needs 20 images of each class, and one has 19"):
        velocity_variance(noise(39, 4, 4, 4), torch.arange(39) // 20)


@pytest.mark.parametrize("side, quarter, half", [(8, 0.844, 0.438), (16, 0.859, 0.469), (32, 0.867, 0.484)])
def test_energy_of_white_noise_at_high_frequencies(side, quarter, half):
    latents = noise(64, 4, side, side)
    assert high_frequency_share(power_spectrum(latents), 0.25) == pytest.approx(quarter, abs=0.01)
    assert high_frequency_share(power_spectrum(latents), 0.5) == pytest.approx(half, abs=0.01)
    smooth = torch.nn.functional.interpolate(noise(64, 4, 2, 2), scale_factor=side // 2, mode="bilinear")
    assert high_frequency_share(power_spectrum(smooth), 0.25) < 0.1


def test_the_spectrum_keeps_the_energy_and_finds_a_wave():
    latents = noise(8, 3, 8, 8)
    assert power_spectrum(latents).mean() == pytest.approx(1)  # of standardized latents
    wave = torch.cos(math.pi / 8 * (torch.arange(8) + 0.5) * 3).expand(4, 2, 8, 8)
    assert np.unravel_index(power_spectrum(wave)[1].argmax(), (8, 8)) == (0, 3)
    assert standardized(torch.ones(2, 1, 4, 4)).abs().max() == 0
    assert high_frequency_share(power_spectrum(torch.ones(2, 1, 4, 4)), 0.25) == 0


def test_a_channel_that_is_nearly_constant_does_not_count():
    """As in training, where it is not normalized."""
    labels = torch.arange(2).repeat_interleave(60)
    smooth = torch.nn.functional.interpolate(noise(120, 3, 2, 2), scale_factor=4, mode="bilinear")
    more = torch.cat([smooth, 5 + 1e-7 * noise(120, 1, 8, 8, seed=1)], dim=1)
    assert standardized(more)[:, 3].abs().max() < 1e-5
    shares = [high_frequency_share(power_spectrum(latents), 0.25) for latents in (smooth, more)]
    assert shares[1] == pytest.approx(shares[0], abs=1e-6)
    assert neighbor_consistency(more, labels) == neighbor_consistency(smooth, labels)


def test_neighbors_of_one_class():
    labels = torch.arange(8).repeat_interleave(8)
    clusters = noise(8, 12, 1, 1)[labels] + 0.01 * noise(64, 12, 4, 4, seed=1)
    assert neighbor_consistency(clusters, labels) == 1
    assert neighbor_consistency(noise(400, 12, 4, 4), torch.arange(400) % 4) == pytest.approx(0.25, abs=0.05)
    with pytest.raises(DataError, match="more than 5 images"):
        neighbor_consistency(clusters[:5], labels[:5])


def test_interpolated_latents_lie_between_neighbors():
    clusters = 3 * noise(2, 4, 4, 4)[torch.arange(40) % 2] + noise(40, 4, 4, 4, seed=1)
    assert torch.allclose(interpolated(clusters, 0.0), clusters, atol=1e-5)
    half, whole = interpolated(clusters), interpolated(clusters, 1.0)
    assert half.shape == clusters.shape and half.dtype == clusters.dtype
    for i, partner in enumerate(whole):
        found = (clusters - partner).square().sum((1, 2, 3)).argmin()
        assert found != i and found % 2 == i % 2 and torch.allclose(clusters[found], partner, atol=1e-4)
    points, middle = standardized(clusters).flatten(1), standardized(half).flatten(1)
    assert float(middle.norm(dim=1).mean() / points.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)  # not shrunk
    with pytest.raises(DataError, match="more than 10 images"):
        interpolated(clusters[:10])


def test_a_cache_and_its_model_have_the_same_meters(tiny_favae, tmp_path, capsys, caplog, monkeypatch):
    images = write_images(tmp_path / "many", classes=2, per_class=20)
    tiny_favae.eval().save_pretrained(tmp_path / "vae")
    write_latent_cache(tiny_favae, ImageDataset(open_source(str(images)), 16), tmp_path / "cache")
    data = ("--data", images, "--resolution", "16")
    options = ("--latents", f"a={tmp_path / 'cache'}", "--model", f"b={tmp_path / 'vae'}", *data)
    command("evaluate", "latents", *options, "--output", tmp_path / "out")
    result = json.loads((tmp_path / "out/results.json").read_text())
    first, second = (row["metrics"] for row in result["rows"])
    assert first == pytest.approx(second, rel=1e-3)
    assert first.keys() == {"VIV", "rho", "phi", "LNC", "SEC 1/4", "SEC 1/2"} and None not in first.values()
    assert len(result["protocol"]["data"]["hash"]) == 64  # by which results of other images are refused
    assert result["protocol"]["num_images"] == 40 and (tmp_path / "out/spectra.png").exists()
    assert "VIV" in capsys.readouterr().out

    # Seeds of a model have one name, which results.json keeps.
    command("evaluate", "latents", *options[:2], *options[:2], "--output", tmp_path / "seeds")
    assert [row["model"] for row in json.loads((tmp_path / "seeds/results.json").read_text())["rows"]] == ["a", "a"]

    # Meters that the images do not allow are left out, with the reason.
    command("evaluate", "latents", *options, "--num-images", "8", "--output", tmp_path / "few")
    assert "no VIV: VIV of latents of 6 x 4 x 4 needs 14 images of each class" in caplog.text
    command("evaluate", "latents", *options[2:], "--label-column", "none", "--output", tmp_path / "one_class")
    assert "no LNC: LNC needs classes" in caplog.text
    assert "VIV, rho and phi are of all images as one class" in caplog.text

    # What is decoded between latents is compared with the images; at the latents themselves, this is the rFD.
    features = ("--features", "efficientnet-lite0")

    def distance() -> float:
        command("evaluate", "latents", *options[2:], *features, "--output", tmp_path / "between")
        (row,) = json.loads((tmp_path / "between/results.json").read_text())["rows"]
        return row["metrics"]["iFD(efficientnet-lite0)"]

    between = distance()
    capsys.readouterr()
    command("evaluate", "latents", *options, *features, "--output", tmp_path / "both")
    rows = json.loads((tmp_path / "both/results.json").read_text())["rows"]
    found = [row["metrics"]["iFD(efficientnet-lite0)"] for row in rows]
    assert found == [None, pytest.approx(between)] and "iFD(efficientnet-lite0)" in capsys.readouterr().out
    monkeypatch.setattr(latent_evaluation, "interpolated", lambda latents: latents)
    command("evaluate", "reconstruction", *options[2:], *features, "--levels", "1", "--output", tmp_path / "rfd")
    (row,) = json.loads((tmp_path / "rfd/results.json").read_text())["rows"]
    assert distance() == pytest.approx(row["metrics"]["rFD(efficientnet-lite0)"], rel=1e-3) != between
    assert "--features is for --model" in command_error(
        "evaluate", "latents", *options[:2], *features, "--output", tmp_path / "between"
    )


def test_other_images_are_refused_before_a_model_encodes_them(tiny_cache, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("images were encoded")

    monkeypatch.setattr(latent_evaluation, "encoded_latents", fail)
    folder = write_images(tiny_cache / "others", size=(40, 40))
    words = ("--latents", tiny_cache / "cache", "--model", tiny_cache / "tokenizer", "--data", folder)
    message = command_error("evaluate", "latents", *words, "--resolution", 16, "--output", tiny_cache / "out")
    assert "cache is of other images than --data" in message


def test_a_cache_with_a_gap_is_of_the_images_that_a_model_is_given(tiny_favae, tmp_path):
    source = open_source(str(write_images(tmp_path / "images", classes=2, per_class=10)))
    source.files[3].write_bytes(source.files[3].read_bytes()[:300])
    write_latent_cache(tiny_favae.eval(), ImageDataset(source, 16), tmp_path / "cache")
    for count in (7, 9):  # with the broken image, and without it
        cached = latent_evaluation.cached_latents(str(tmp_path / "cache"), count)
        chosen = ImageDataset(Selection(source, count), 16)
        found = latent_evaluation.encoded_latents(tiny_favae, chosen, "images", "", batch_size=4)
        assert torch.allclose(cached.latents, found.latents, atol=1e-5) and torch.equal(cached.labels, found.labels)


def test_latents_that_cannot_be_measured(tiny_cache):
    images = ("--data", tiny_cache / "images", "--resolution", "32")
    tokens = VQModelFA(**TINY_VQ).eval()
    write_latent_cache(tokens, ImageDataset(open_source(str(tiny_cache / "images")), 16), tiny_cache / "tokens")
    tokens.save_pretrained(tiny_cache / "vq")
    tokenizer = load_tokenizer(str(tiny_cache / "tokenizer"))
    folder, other = write_images(tiny_cache / "others", size=(40, 40)), tiny_cache / "other"
    write_latent_cache(tokenizer, ImageDataset(open_source(str(folder)), 16), other)
    blurred = tiny_cache / "blurred"
    write_latent_cache(tokenizer, ImageDataset(open_source(str(folder)), 16), blurred, low_pass=0.2)
    others = ("--data", folder, "--resolution", "16")
    tokenizer.quant_conv.bias.data.fill_(torch.nan)
    tokenizer.save_pretrained(tiny_cache / "nan")
    for words, named in (
        ((), "name latents by --latents CACHE"),
        (("--latents", tiny_cache / "cache", *images), "--data is for --model"),
        (("--model", tiny_cache / "tokenizer"), "--model needs images"),
        (("--latents", tiny_cache / "tokens"), "holds tokens"),
        (("--latents", tiny_cache / "cache", "--model", tiny_cache / "tokenizer", *images), "at 32 px"),
        (("--latents", "nowhere"), "nowhere"),
        (("--latents", blurred), "was written with --low-pass"),
        (("--latents", tiny_cache / "cache", "--latents", other), "of other images"),
        (("--latents", tiny_cache / "cache", "--model", tiny_cache / "tokenizer", *others), "of other images"),
        (("--model", tiny_cache / "vq", *others), "quantizes its latents"),
        (("--model", tiny_cache / "tokenizer", *others[:2], "--resolution", "17"), "takes no images of 17 px"),
        (("--model", tiny_cache / "nan", *others), "not finite"),
    ):
        assert named in command_error("evaluate", "latents", *words, "--output", tiny_cache / "out")
