"""Reconstruction: hand-computed errors, every autoencoder class, the command's pictures and its bad inputs."""

import json

import diffusers
import numpy as np
import pytest
import torch
from conftest import command, command_error, command_in_processes, write_images
from diffusers import AutoencoderKLKVAE
from tiny_autoencoders import autoencoders

from favae.autoencoders import decode, encode, load_autoencoder, measure_budget, reconstruct, spatial_compression_ratio
from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.errors import ModelError
from favae.eval.extraction import image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.image_sets import CroppedImages
from favae.eval.reconstruction import (
    PER_IMAGE,
    band_errors,
    band_names,
    evaluate_reconstruction,
    image_errors,
    sample,
)
from favae.eval.spectra import high_frequency_error, radial_spectrum, worst_windows
from favae.normalization import normalize_latents


def test_recon_is_made_of_low_and_high():
    images = torch.rand(4, 3, 16, 24) * 2 - 1
    errors = image_errors(images, images + 0.3 * torch.randn_like(images))
    recon, low, high = errors[:, 0], errors[:, 1], errors[:, 2]
    assert torch.allclose(recon, (low + 3 * high) / 4, rtol=1e-5)
    assert torch.isnan(errors[:, 5:]).all()  # no MS-SSIM at this size, no LPIPS without weights


def test_bands_of_several_levels_add_up():
    difference = torch.randn(2, 3, 32, 16)
    bands = band_errors(difference, 3)
    share = torch.tensor([1 / 4] * 3 + [1 / 16] * 3 + [1 / 64] * 4)
    assert bands.shape == (2, 10) and band_names(3)[0] == "LH1" and band_names(3)[-1] == "LL3"
    assert torch.allclose((bands * share).sum(dim=1), difference.square().mean((1, 2, 3)), rtol=1e-5)
    stripes = torch.ones(1, 3, 8, 8) * torch.tensor([1.0, -1.0]).repeat(4)  # vertical ones: HL of the finest level
    assert torch.allclose(band_errors(stripes, 1), torch.tensor([[0.0, 4.0, 0.0, 0.0]]), atol=1e-5)


def test_psnr_and_ssim_by_hand():
    images = torch.zeros(1, 3, 176, 176)
    errors = dict(zip(PER_IMAGE, image_errors(images, images + 20 / 127.5)[0].tolist()))  # 20 of 255 levels everywhere
    assert errors["PSNR"] == pytest.approx(20 * np.log10(255 / 20), abs=1e-4)
    assert image_errors(images[..., :168, :168], images[..., :168, :168])[0, 5].isnan()  # torchmetrics refuses it
    small = image_errors(images[..., :4, :4], images[..., :4, :4], lambda *_: pytest.fail("VGG16 cannot take them"))[0]
    assert small[4:].isnan().all() and small[:4].isfinite().all()
    same = dict(zip(PER_IMAGE, image_errors(images, images)[0].tolist()))
    assert same["Recon"] == 0 and same["PSNR"] == 100 and same["SSIM"] == pytest.approx(1)
    assert same["MS-SSIM"] == pytest.approx(1) and errors["MS-SSIM"] < 1


def test_radial_spectrum_finds_a_wave_and_keeps_the_power():
    wave = torch.cos(2 * torch.pi * 5 * torch.arange(32) / 32).expand(1, 1, 32, 32)
    assert radial_spectrum(wave)[0].argmax() == 5
    noise = torch.randn(64, 1, 16, 16)
    assert torch.allclose(radial_spectrum(noise).mean(dim=0), torch.ones(9), atol=0.25)  # white


def test_the_zoom_is_where_high_frequencies_are_missed():
    difference = torch.full((1, 3, 32, 32), 0.5)  # a constant error has none
    difference[:, :, 9:17, 20:28] += torch.tensor([0.3, -0.3]).repeat(4)
    assert worst_windows(high_frequency_error(difference)).tolist() == [[9, 20, 8, 8]]


def test_octaves_that_a_config_counts_by_another_name():
    vae = AutoencoderKLKVAE(channels=32, num_enc_blocks=1, num_dec_blocks=1, z_channels=4, ch_mult=(1, 1, 2))
    with torch.no_grad():
        assert encode(vae, torch.zeros(1, 3, 32, 32)).shape[-1] == 32 // spatial_compression_ratio(vae) == 8


def test_every_class_of_autoencoder_reconstructs(tmp_path):
    """The same 8 px image goes through each, saved and opened again; the budget is what the latent really holds."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    for name, model in autoencoders().items():
        model.eval().save_pretrained(tmp_path / name)
        vae = load_autoencoder(str(tmp_path / name))
        assert type(vae) is type(model)
        with torch.no_grad():
            latents = encode(vae, images)
            assert decode(vae, latents).shape == images.shape, name
        budget = measure_budget(vae, 8)
        assert budget.spatial_compression_ratio == spatial_compression_ratio(vae) == 8 // latents.shape[-1]
        assert budget.flops > 0 and budget.params == vae.num_parameters()
        if name.startswith("VQ"):
            bits = 5 if name == "VQModelFA" else 4
            assert budget.bits_per_image == bits * latents[0, 0].numel() and budget.floats_per_image is None
        else:
            assert budget.floats_per_image == latents[0].numel() and budget.tokens_per_image is None


def test_an_image_is_one_frame():
    for name, vae in autoencoders().items():
        if name.startswith(("AutoencoderKLQwen", "AutoencoderKLWan")):
            images = torch.rand(2, 3, 8, 8) * 2 - 1
            with torch.no_grad():
                latents = vae.eval().encode(images.unsqueeze(2)).latent_dist.mode()
                assert torch.equal(encode(vae, images), latents[:, :, 0])
                assert torch.equal(decode(vae, latents[:, :, 0]), vae.decode(latents).sample[:, :, 0])
                draws = encode(vae, images, "sample", [torch.Generator().manual_seed(0) for _ in images])
            assert draws.shape == (2, 4, *latents.shape[-2:])


def test_value_ranges_are_the_adapters_business():
    """An RAE works in [0, 1]: asked directly in its range, it gives what the adapter gives."""
    rae = autoencoders()["AutoencoderRAE"].eval()
    rae.register_to_config(latents_mean=[[[5.0]]], latents_std=[[[2.0]]])  # which it applies itself
    latents = torch.randn(1, 4, 2, 2)
    assert torch.equal(normalize_latents(rae, latents), latents)
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(reconstruct(rae, images * 2 - 1), rae(images).sample * 2 - 1, atol=1e-5)


def test_posterior_and_pipelines(tiny_kl, tmp_path):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encode(tiny_kl, images), tiny_kl.encode(images).latent_dist.mode())
        draws = [encode(tiny_kl, images, "sample", torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    tiny_kl.save_pretrained(tmp_path / "pipeline/vae")
    (tmp_path / "pipeline/model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    assert isinstance(load_autoencoder(str(tmp_path / "pipeline")), diffusers.AutoencoderKL)
    diffusers.AutoModel.from_pretrained(str(tmp_path / "pipeline"), subfolder="vae")  # which changes the class
    assert isinstance(load_autoencoder(str(tmp_path / "pipeline/vae")), diffusers.AutoencoderKL)


def test_a_class_of_somebody_else_is_opened_once_it_is_imported(tiny_kl, tmp_path):
    class AutoencoderOfSomebody(diffusers.AutoencoderKL):
        pass

    AutoencoderOfSomebody(**tiny_kl.config).save_pretrained(tmp_path)
    assert type(load_autoencoder(str(tmp_path))) is AutoencoderOfSomebody


def test_autoencoders_that_cannot_take_the_images(tiny_kl, tmp_path):
    for channels in ({"in_channels": 1}, {"in_channels": 2, "out_channels": 2}):
        with pytest.raises(ModelError, match="both must be 1 for gray images, 3 for RGB or 4 for RGBA"):
            measure_budget(diffusers.AutoencoderKL(**channels), 8)
    with pytest.raises(ModelError, match="18 px back at 16 px; the resolution must be a multiple of 4"):
        measure_budget(tiny_kl, 18)
    with pytest.raises(ModelError, match="4 px back at 8 px; the resolution must be 8"):
        measure_budget(autoencoders()["AutoencoderRAE"], 4)
    tiny_kl.save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "latent_channels": 3}))
    with pytest.raises(ModelError, match="no autoencoder could be opened here"):
        load_autoencoder(str(tmp_path / "other"))
    with pytest.raises(ModelError, match="no autoencoder could be opened here"):
        load_autoencoder(str(tmp_path))
    video = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1
    )
    with pytest.raises(ModelError, match="takes no images of 8 px"):
        measure_budget(video, 8)


@pytest.fixture(scope="module")
def extractor():
    return FeatureExtractor("efficientnet-lite0")


def test_reconstruction_results(tiny_favae, tmp_path, extractor):
    images = ImageDataset(open_source(str(write_images(tmp_path / "images"))), 16)
    references = image_statistics(CroppedImages(images), [extractor])

    def evaluate(**options):
        return evaluate_reconstruction(tiny_favae, images, [extractor], references, **options)

    result = evaluate(batch_size=5)
    metrics = result.metrics
    assert result.errors.shape == (12, 7) and result.indices.tolist() == list(range(12))
    assert metrics["Recon"] == pytest.approx((metrics["Low"] + 3 * metrics["High"]) / 4, rel=1e-5)
    assert sum(result.bands[band] for band in ("LH1", "HL1", "HH1")) / 3 == pytest.approx(metrics["High"], rel=1e-5)
    with torch.no_grad():
        expected = [(tiny_favae(i["image"][None]).sample - i["image"]).square().mean() for i in (images[0], images[11])]
        latents = encode(tiny_favae, torch.stack([images[i]["image"] for i in range(12)]))
    assert torch.allclose(result.errors[[0, 11], 0].float(), torch.stack(expected), rtol=1e-4)
    assert torch.allclose(result.latent_mean.float(), latents.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(result.latent_std.float(), latents.std((0, 2, 3), correction=0), atol=1e-5)
    assert metrics["seams"] > 0 and result.latents is None
    assert torch.allclose(evaluate(keep_latents=True, batch_size=7).latents, latents, atol=1e-5)
    assert metrics["LPIPS"] is None and metrics["MS-SSIM"] is None and metrics["rFD(efficientnet-lite0)"] > 0

    samples = [evaluate(encode=sample, batch_size=size).errors[:, :5] for size in (5, 3)]
    assert torch.allclose(*samples, rtol=1e-3) and not torch.allclose(samples[0], result.errors[:, :5], rtol=1e-3)

    broken = images.source.files[5]
    broken.write_bytes(broken.read_bytes()[:300])
    without = evaluate(batch_size=5)
    kept = torch.arange(12) != 5
    assert without.indices.tolist() == torch.arange(12)[kept].tolist()
    assert torch.allclose(without.errors[:, :5], result.errors[kept, :5], rtol=1e-4)

    with torch.no_grad():
        tiny_favae.decoder.low.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ModelError, match=r"reconstruction of .*\.png is not finite"):
        evaluate()


def test_command_keeps_what_was_measured(tmp_path, tiny_favae, capsys):
    """Two seeds of one model, another class, and one that fails: three rows, three pictures, one error."""
    folder = write_images(tmp_path / "images")
    (folder / "class1/0.png").unlink()  # 11 images: the shares of two processes differ in size
    tiny_favae.save_pretrained(tmp_path / "a")
    torch.manual_seed(1)
    type(tiny_favae).from_config(tiny_favae.config).save_pretrained(tmp_path / "b")
    autoencoders()["AutoencoderTiny"].save_pretrained(tmp_path / "tiny")
    gray = {"in_channels": 1, "out_channels": 1}
    diffusers.AutoencoderKL(**gray, norm_num_groups=4, block_out_channels=(8,)).save_pretrained(tmp_path / "gray")
    named = (("ours", "a"), ("ours", "b"), ("gray", "gray"), ("taesd", "tiny"))
    models = [f"--model={name}={tmp_path / path}" for name, path in named]
    options = ("--data", folder, "--resolution", 16, "--features", "efficientnet-lite0", "--examples", 2)
    options += ("--output", tmp_path / "out")
    message = command_error("evaluate", "reconstruction", *models, *options)
    assert message.startswith("error: gray: it takes images of 1 channels, and ours of 3; measure them apart")
    printed = capsys.readouterr().out
    assert "rFD(efficientnet-lite0)" in printed and "FID" not in printed
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["model"] for row in results["rows"]] == ["ours", "ours", "taesd"]
    assert results["rows"][0]["metrics"]["Recon"] != results["rows"][1]["metrics"]["Recon"]
    protocol = results["protocol"]
    assert protocol["num_images"] == 11 and protocol["posterior"] == "mode" and protocol["crop"] == "center"
    assert protocol["uint8"].startswith("round(") and len(protocol["data"]["hash"]) == 64
    assert set(results["rows"][0]["bands"]) == set(band_names(3))
    assert "NaN" not in (tmp_path / "out/results.json").read_text()
    for name in ("comparison", "spectra", "latents"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5_000

    # Two processes agree with one, also about a model whose reconstructions are not finite.
    ours = type(tiny_favae).from_pretrained(tmp_path / "a")
    with torch.no_grad():
        ours.decoder.low.conv_out.bias.fill_(torch.nan)
    ours.save_pretrained(tmp_path / "nan")
    pair = [models[0], f"--model=nan={tmp_path / 'nan'}", models[1]]
    again = [*options[:-1], tmp_path / "two"]
    for message in command_in_processes(2, "evaluate", "reconstruction", *pair, *again):
        assert message.startswith("error: nan: the reconstruction of")
    two = json.loads((tmp_path / "two/results.json").read_text())
    assert (results["num_processes"], two["num_processes"]) == (1, 2) and two["protocol"] == protocol
    for a, b in zip(results["rows"][:2], two["rows"], strict=True):
        for part in ("metrics", "bands"):
            numbers = {name: value for name, value in a[part].items() if value is not None}
            assert {name: b[part][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)

    assert "5 wavelet levels" in command_error("evaluate", "reconstruction", models[0], *options, "--levels", "5")


def test_other_statistics_and_samples_of_the_posterior(tmp_path, tiny_favae):
    tiny_favae.save_pretrained(tmp_path / "vae")
    images, others = write_images(tmp_path / "images"), write_images(tmp_path / "others", size=(40, 40))
    features = ("--resolution", 16, "--features", "efficientnet-lite0")
    command("reference-statistics", "--data", others, *features, "--output", tmp_path / "others.safetensors")
    found = {}
    for name, *more in (("plain",), ("other", "--reference", tmp_path / "others.safetensors", "--posterior", "sample")):
        words = (f"--model={tmp_path / 'vae'}", "--data", images, *features, "--examples", 1, *more)
        command("evaluate", "reconstruction", *words, "--output", tmp_path / name)
        found[name] = json.loads((tmp_path / name / "results.json").read_text())
    (plain,), (other,) = (each["rows"] for each in found.values())
    assert plain["metrics"]["rFD(efficientnet-lite0)"] != other["metrics"]["rFD(efficientnet-lite0)"]
    assert plain["metrics"]["Recon"] != other["metrics"]["Recon"]
    assert found["other"]["protocol"]["posterior"] == "sample"


def test_models_are_opened_before_images_are_measured(tmp_path, monkeypatch):
    from favae.eval import autoencoder_evaluation

    def fail(*_, **__):
        raise AssertionError("images were measured")

    monkeypatch.setattr(autoencoder_evaluation, "image_statistics", fail)
    folder = write_images(tmp_path / "images", classes=1, per_class=2)
    options = ("--data", folder, "--resolution", 16, "--features", "efficientnet-lite0", "--output", tmp_path / "out")
    assert "mistyped" in command_error("evaluate", "reconstruction", "--model", tmp_path / "mistyped", *options)
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    other = ("--model", tmp_path / "mistyped", "--reference", tmp_path / "small.npz")
    assert "8 x 8 pixels, these have 16 x 16" in command_error("evaluate", "reconstruction", *other, *options)
    assert not (tmp_path / "out").exists()
