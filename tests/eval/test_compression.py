"""Compression by the command line: files and back, and the table beside other formats."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_HYPERPRIOR, TINY_VQ, command, command_error
from PIL import Image
from tiny_autoencoders import autoencoders
from torchvision.transforms.functional import to_pil_image

from favae import HyperpriorModelFA, VQModelFA
from favae.autoencoders import reconstruct
from favae.data.images import ImageDataset, to_tensor, to_uint8
from favae.data.sources import open_source
from favae.eval import compression
from favae.eval.compression import (
    PillowCodec,
    TokenizerCodec,
    _rising,
    bd_rates,
    high_power,
    matching_quality,
    training_values,
)
from favae.eval.spectra import radial_spectrum

pytest.importorskip("constriction", reason="the extra [compression] is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    HyperpriorModelFA(**TINY_HYPERPRIOR).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "inside").mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (20, 33)), ("inside/b.jpg", (40, 24))):
        smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size[::-1])
        smooth.save(folder / name)
    return folder


def test_a_folder_goes_in_and_comes_back(model, pictures, tmp_path, capsys):
    command("compress", pictures, "--model", model, "--output", tmp_path / "files")
    files = sorted(str(path.relative_to(tmp_path / "files")) for path in (tmp_path / "files").rglob("*.fav"))
    assert files == ["a.png.fav", "inside/b.jpg.fav"]
    printed = capsys.readouterr().out
    size = (tmp_path / "files/a.png.fav").stat().st_size
    assert f"{size:,}" in printed and f"{8 * size / (20 * 33):.4f}" in printed and "33 x 20" in printed
    command("decompress", tmp_path / "files", "--model", model, "--output", tmp_path / "images")
    assert Image.open(tmp_path / "images/a.png.fav.png").size == (33, 20)
    assert Image.open(tmp_path / "images/inside/b.jpg.fav.png").size == (24, 40)
    found = np.asarray(Image.open(tmp_path / "images/a.png.fav.png"), dtype=np.int16)
    opened = HyperpriorModelFA.from_pretrained(model)
    expected = opened.decompress([(tmp_path / "files/a.png.fav").read_bytes()])[0].clamp(-1, 1)
    assert np.abs(found - (expected.permute(1, 2, 0).numpy() + 1) * 127.5).max() <= 0.51


def test_bad_files_are_one_line(model, pictures, tmp_path, tiny_kl):
    (tmp_path / "bad.fav").write_bytes(b"something else")
    message = command_error("decompress", tmp_path / "bad.fav", "--model", model, "--output", tmp_path / "out")
    assert "no compressed image" in message and "bad.fav" in message
    (tmp_path / "empty").mkdir()
    assert ".fav" in command_error("decompress", tmp_path / "empty", "--model", model, "--output", tmp_path / "out")
    tiny_kl.save_pretrained(tmp_path / "kl")
    message = command_error("compress", pictures, "--model", tmp_path / "kl", "--output", tmp_path / "out")
    assert "AutoencoderKL writes no files" in message
    words = (pictures / "a.png", pictures, "--model", model, "--output", tmp_path / "out")
    assert "a.png and" in command_error("compress", *words) and not (tmp_path / "out").exists()
    command("compress", pictures / "a.png", "--model", model, "--output", tmp_path / "files")
    words = (tmp_path / "files", tmp_path / "files/a.png.fav", "--model", model, "--output", tmp_path / "out")
    assert "would both be a.png.fav.png" in command_error("decompress", *words) and not (tmp_path / "out").exists()


def test_what_compress_left_unfinished_is_not_read(model, pictures, tmp_path):
    command("compress", pictures / "a.png", "--model", model, "--output", tmp_path / "files")
    (tmp_path / "files/.writing-1-a.png.fav").write_bytes(b"half")
    shutil.copy(pictures / "a.png", tmp_path / "files/a.png")
    command("decompress", tmp_path / "files", "--model", model, "--output", tmp_path / "files")
    assert (tmp_path / "files/a.png").read_bytes() == (pictures / "a.png").read_bytes()  # not written over
    assert (tmp_path / "files/a.png.fav.png").exists()


def test_what_cannot_be_read_in_a_folder_is_left_out(model, pictures, tmp_path, caplog):
    folder = shutil.copytree(pictures, tmp_path / "pictures")
    picture = (folder / "inside/b.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(picture[: len(picture) * 9 // 10])
    command("compress", folder, "--model", model, "--output", tmp_path / "files")
    names = {path.name for path in (tmp_path / "files").rglob("*.fav")}
    assert names == {"a.png.fav", "b.jpg.fav"} and "a.jpg cannot be read" in caplog.text
    words = ("--model", model, "--output", tmp_path / "files")
    assert "a.jpg cannot be read" in command_error("compress", folder / "a.jpg", *words)
    (folder / "a.png").unlink()
    (folder / "inside/b.jpg").unlink()
    assert "not one of the images can be read" in command_error("compress", folder, *words)


def test_links_are_followed_and_what_is_hidden_is_not_read(model, pictures, tmp_path):
    command("compress", pictures, "--model", model, "--output", tmp_path / "apart/a.fav")
    folder = tmp_path / "files"
    (folder / ".hidden").mkdir(parents=True)
    (folder / "linked").symlink_to(tmp_path / "apart")
    shutil.copy(tmp_path / "apart/a.fav/a.png.fav", folder / ".hidden")
    command("decompress", folder, "--model", model, "--output", tmp_path / "out")
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["linked/a.fav/a.png.fav.png", "linked/a.fav/inside/b.jpg.fav.png"]


def test_what_a_model_cannot_write_is_one_line(model, pictures, tmp_path, tiny_kl, monkeypatch):
    opened = HyperpriorModelFA.from_pretrained(model)
    opened.encoder.conv_out.bias.data.fill_(torch.nan)
    opened.save_pretrained(tmp_path / "nan")
    words = ("--model", tmp_path / "nan", "--output", tmp_path / "out")
    assert "not finite; " in command_error("compress", pictures, *words)
    tiny_kl.save_pretrained(tmp_path / "kl")
    words = ("--training-data", pictures, "--data", pictures, "--label-column", "none", "--model", tmp_path / "kl")
    words += ("--features", "efficientnet-lite0", "--output", tmp_path / "out")
    assert "wavelet levels need" in command_error("evaluate", "compression", *words, "--resolution", 30)
    autoencoders()["VQModel"].save_pretrained(tmp_path / "vq")
    words = (*words[:-5], tmp_path / "vq", *words[-4:], "--resolution", 32)
    assert "tokens of a VQModel cannot be coded" in command_error("evaluate", "compression", *words)
    monkeypatch.setattr(compression.features, "check", lambda name: False)  # of a Pillow without AVIF
    message = command_error("evaluate", "compression", *words, "--formats", "avif")
    assert "avif" in message and "jpeg" in message


def test_the_table(model, tiny_kl, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compression, "QUALITIES", (5, 95))
    photos, pictures = ImageDataset(open_source("photos", "heldout"), 32), tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        to_pil_image(to_uint8(photos[20 * i]["image"])).save(pictures / f"{i}.png")
    words = ("--data", pictures, "--resolution", 32, "--formats", "jpeg")
    options = ("--features", "efficientnet-lite0", "--output", tmp_path)
    (pictures / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:300])
    tiny_kl.save_pretrained(tmp_path / "kl")
    models = ("--model", f"ours={model}", "--model", f"kl={tmp_path / 'kl'}", "--training-data", pictures, "--step", 1)
    command("evaluate", "compression", *models, *words, *options)
    result = json.loads((tmp_path / "results.json").read_text())
    rows = {row["label"]: row["metrics"] for row in result["rows"]}
    assert result["protocol"]["num_images"] == 6
    assert len(result["protocol"]["data"]["hash"]) == 64
    assert result["task"] == "compression" and {"ours", "kl, step 1", "jpeg 5", "jpeg 95"} <= set(rows)
    assert rows["jpeg 5"]["bpp"] < rows["jpeg 95"]["bpp"] and rows["jpeg 5"]["PSNR"] < rows["jpeg 95"]["PSNR"]
    assert rows["jpeg 95"]["rFD(efficientnet-lite0)"] < rows["jpeg 5"]["rFD(efficientnet-lite0)"]
    assert 0.9 < rows["jpeg 95"]["power kept"] < 1.1 and rows["ours"]["bpp"] > 8 * 26 / 32**2
    assert (tmp_path / "rate_distortion.png").exists() and "ours" in capsys.readouterr().out
    alone = ("evaluate", "compression", "--model", f"kl={tmp_path / 'kl'}", "--step", 1, *words, *options)
    assert "--step is for tokenizers" in command_error(*alone)


@pytest.mark.parametrize(
    "mode, color, formats", [("L", 120, ["jpeg", "webp"]), ("RGBA", (120, 60, 200, 255), ["webp"])]
)
def test_formats_keep_the_channels(mode, color, formats):
    images = torch.stack([to_tensor(Image.new(mode, (16, 16), color))] * 2)
    for format in formats:
        decoded, sizes = PillowCodec(format, 90)(images)
        assert decoded.shape == images.shape and (decoded - images).abs().max() < 0.05 and min(sizes) > 0


def test_qualities_match_a_rate():
    images = ImageDataset(open_source("photos", "heldout"), 64)
    quality = matching_quality("jpeg", images, 3.0)
    rates = []
    batch = torch.stack([images[i]["image"] for i in range(len(images))])
    for value in (quality - 1, quality, quality + 1):
        rates.append(8 * float(np.mean(PillowCodec("jpeg", value)(batch)[1])) / 64**2)
    assert rates[0] <= rates[1] <= rates[2] and rates[0] < 3.0 < rates[2]


def test_bd_rates_of_half_the_bits_are_minus_a_half():
    def curve(**metrics):
        return [
            {"bpp": 0.2 * 2**i, "SSIM": None, **{name: value(i) for name, value in metrics.items()}} for i in range(4)
        ]

    good = {
        "PSNR": lambda i: 30 + 4 * i,
        "MS-SSIM": lambda i: 1 - 10 ** -(0.5 + i / 2),
        "LPIPS": lambda i: 0.4 - 0.1 * i,
    }
    points = curve(**good)
    assert _rising(points, "MS-SSIM")[1] == pytest.approx([5, 10, 15, 20])  # decibels
    curves = {
        "jpeg": points,
        "half": [{**point, "bpp": point["bpp"] / 2} for point in points],
        "single": points[:1],
        "worse": curve(
            **{"PSNR": lambda i: 30 - i, "MS-SSIM": lambda i: 0.5 - 0.1 * i, "LPIPS": lambda i: 0.5 + 0.1 * i}
        ),
        "apart": [
            {**point, "PSNR": point["PSNR"] + 11, "MS-SSIM": None, "LPIPS": point["LPIPS"] - 0.28} for point in points
        ],
    }
    found = bd_rates([{"model": name, "metrics": each} for name, points in curves.items() for each in points], "jpeg")
    assert set(found) == {"half"}
    assert found["half"] == pytest.approx({"PSNR": -50, "MS-SSIM": -50, "LPIPS": -50}, abs=0.5)


def test_high_power_is_above_half_of_the_frequencies():
    x = torch.arange(32) / 32 * 2 * torch.pi
    slow, fast = (torch.sin(cycles * x).expand(1, 1, 32, 32) for cycles in (3, 11))
    assert high_power(radial_spectrum(slow)) < 1e-6 < high_power(radial_spectrum(fast))


@pytest.mark.parametrize("quantizer", ["vq", "residual", "next_scale", "next_band"])
def test_tokens_are_coded_and_decoded(quantizer):
    torch.manual_seed(0)
    scales = (4, 8) if quantizer == "next_band" else (1, 8)
    vae = VQModelFA(**{**TINY_VQ, "quantizer": quantizer, "num_quantizers": 2, "scales": scales}).eval()
    images = ImageDataset(open_source("photos", "heldout"), 32)
    codec = TokenizerCodec(vae, training_values(vae, images))
    batch = torch.stack([images[i]["image"] for i in range(3)])
    decoded, sizes = codec(batch)
    torch.testing.assert_close(decoded, reconstruct(vae, batch), rtol=0, atol=1e-5)
    tokens = {"vq": 64, "residual": 128, "next_scale": 65, "next_band": 64}[quantizer]
    assert all(26 < size <= 26 + 4 + tokens * 5 / 8 + 4 for size in sizes)  # 32 entries: 5 bits at most


def test_bands_have_tables_of_their_own():
    torch.manual_seed(0)
    vae = VQModelFA(**{**TINY_VQ, "quantizer": "next_band", "scales": (4, 8)}).eval()
    coarse, fine = torch.zeros(16, dtype=torch.long), torch.ones(48, dtype=torch.long)
    codec = TokenizerCodec(vae, torch.cat([coarse, fine, coarse, fine]).unsqueeze(0))
    assert [int(table.argmax()) for table in codec.tables] == [0, 1]
    assert all(table.max() > 0.6 for table in codec.tables)


def test_a_channel_that_never_changes_is_coded(tiny_favae):
    images = ImageDataset(open_source("photos", "heldout"), 32)
    with torch.no_grad():
        tiny_favae.quant_conv.weight[0], tiny_favae.quant_conv.bias[0] = 0, 0
    batch = torch.stack([images[i]["image"] for i in range(2)])
    decoded, _ = TokenizerCodec(tiny_favae, training_values(tiny_favae, images), 0.05)(batch)
    torch.testing.assert_close(decoded, reconstruct(tiny_favae, batch), rtol=0, atol=0.05)


def test_latents_are_rounded_around_their_means(tiny_favae):
    """Others would cost more, and be as far from what they were."""
    images = ImageDataset(open_source("photos", "heldout"), 32)
    batch = torch.stack([images[i]["image"] for i in range(3)])
    found = []
    for offset in (0.0, 100.0):
        tiny_favae.quant_conv.bias.data[:6] += offset
        tiny_favae.post_quant_conv.bias.data -= tiny_favae.post_quant_conv.weight.sum(dim=(1, 2, 3)) * offset
        decoded, sizes = TokenizerCodec(tiny_favae, training_values(tiny_favae, images), 4.0)(batch)
        found.append((decoded, sizes))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=1e-2)


def test_finer_steps_cost_more_and_are_nearer(tiny_favae):
    images = ImageDataset(open_source("photos", "heldout"), 32)
    batch = torch.stack([images[i]["image"] for i in range(3)])
    wanted, found = reconstruct(tiny_favae, batch), []
    values = training_values(tiny_favae, images)
    for step in (0.02, 0.2, 1.0):
        decoded, sizes = TokenizerCodec(tiny_favae, values, step)(batch)
        found.append((sum(sizes), (decoded - wanted).square().mean().item()))
    for fine, coarse in zip(found, found[1:]):
        assert fine[0] > 1.2 * coarse[0] and fine[1] < 0.2 * coarse[1]
