"""Gray and RGBA images, from files to trained and measured tokenizers."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import command, command_error, make_tiny_kl, refusal, tiny_generator_recipe, tiny_tokenizer_recipe, train
from diffusers import AutoencoderKL, AutoencoderKLQwenImage
from PIL import Image

from favae import AutoencoderKLFA, LightningDiTPipeline
from favae.autoencoders import image_channels, measure_budget
from favae.channels import in_color
from favae.data.decoding import read_image
from favae.data.images import ImageDataset, to_uint8
from favae.data.latents import open_latents
from favae.data.sources import open_source
from favae.eval.features import FeatureExtractor
from favae.eval.sampling import sample_to_folder
from favae.eval.side_by_side import compare_on_images, find_images, save_side_by_side
from favae.losses.adversarial import PatchDiscriminator

SIZE = (24, 20)


def smooth(mode: str, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode).resize(SIZE, Image.Resampling.BICUBIC)


@pytest.fixture
def images(tmp_path):
    """Pictures with and without opacity, color and 16 bits."""
    folder = tmp_path / "images"
    folder.mkdir()
    for seed, mode in enumerate(("L", "RGB", "RGBA", "RGBA", "LA", "RGBA")):
        smooth(mode, seed).save(folder / f"{seed}.png")
    hole = smooth("RGBA", 7)
    hole.paste((10, 20, 30, 0), (0, 0, 12, 20))  # colors that cannot be seen
    hole.save(folder / "hole.png")
    Image.fromarray(np.array(smooth("L", 8), dtype=np.uint16) * 257).save(folder / "sixteen.png")
    smooth("RGB", 9).quantize(8).save(folder / "palette.png", transparency=0)
    return folder


def with_channels(channels: int) -> dict[str, str]:
    return {f"model.{key}": channels for key in ("in_channels", "out_channels")}


def test_what_networks_for_photographs_see():
    rgba = torch.rand(2, 4, 8, 8) * 2 - 1
    picture = Image.fromarray(to_uint8(rgba[0]).permute(1, 2, 0).numpy())
    expected = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    found = to_uint8(in_color(rgba))[0].permute(1, 2, 0).int().numpy()
    assert np.abs(found - np.array(expected)).max() <= 1
    rgba[:, 3] = -1
    assert torch.equal(in_color(rgba), torch.ones(2, 3, 8, 8))
    rgba[:, 3] = 1.5  # reconstructions are not clamped
    assert torch.equal(in_color(rgba), rgba[:, :3]) and torch.equal(in_color(rgba[:, :3]), rgba[:, :3])
    gray = torch.rand(1, 8, 8)
    assert torch.equal(in_color(gray), gray.expand(3, 8, 8))


@pytest.mark.parametrize("table", [False, True])
def test_the_channels_of_one_picture_agree(images, tmp_path, table):
    """RGB is RGBA over white, gray is its luma, whatever the picture is stored in; also after scaling."""
    source = open_source(str(images))
    if table:
        import datasets

        rows = [{"bytes": file.read_bytes(), "path": None} for file in source.files]
        columns = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())
        columns.to_parquet(tmp_path / "set.parquet")
        source = open_source(str(tmp_path / "set.parquet"))
    for i in range(len(source)):
        gray, rgb, rgba = (source.read(i, channels) for channels in (1, 3, 4))
        assert (gray.mode, rgb.mode, rgba.mode) == ("L", "RGB", "RGBA")
        white = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), rgba)
        assert np.array_equal(np.array(white.convert("RGB")), np.array(rgb))
        assert np.array_equal(np.array(gray), np.array(rgb.convert("L")))
    for size in (16, 9):
        one, three, four = (ImageDataset(source, size, channels=channels) for channels in (1, 3, 4))
        for i in range(len(source)):
            gray, rgb, rgba = (images[i]["image"] for images in (one, three, four))
            assert (gray.shape, rgb.shape, rgba.shape) == tuple((channels, size, size) for channels in (1, 3, 4))
            difference = (in_color(rgba) - rgb).abs()  # bicubic overshoots are clamped before or after
            assert difference.mean() < 0.02 and difference.max() < 0.3
            assert rgba[3].min() >= -1 and (rgba[:3, rgba[3] == -1] == 1).all()
    names = [source.name(i) for i in range(len(source))]
    if not table:  # the left half of one has no opacity, of another no color
        hole = four[next(i for i, name in enumerate(names) if name.endswith("hole.png"))]["image"]
        assert (hole[3, :, 0] == -1).all() and (hole[3, :, -1] > -1).any()
        assert torch.equal(three.with_channels(4)[0]["image"], four[0]["image"]) and three.channels == 3


def test_photographs_and_transparent_gray():
    photos = open_source("photos:validation")
    assert [photos.read(0, channels).mode for channels in (1, 3, 4)] == ["L", "RGB", "RGBA"]
    stored = io.BytesIO()
    Image.fromarray(np.array([[0, 65535], [5 * 257, 9 * 257]], dtype=np.uint16)).save(stored, "PNG", transparency=0)
    assert np.array(read_image(stored, 4))[..., 3].tolist() == [[0, 255], [255, 255]]
    assert np.array(read_image(stored, 1)).tolist() == [[255, 255], [5, 9]]


def test_networks_for_photographs_take_every_image():
    extractor, discriminator = FeatureExtractor("efficientnet-lite0"), PatchDiscriminator(channels=4, num_layers=1)
    for channels in (1, 4):
        images = torch.randint(256, (2, channels, 16, 16), dtype=torch.uint8)
        seen = to_uint8(in_color(images / 127.5 - 1))
        assert torch.equal(extractor(images)["features"], extractor(seen)["features"])
        assert torch.equal(discriminator(images / 127.5 - 1), discriminator(in_color(images / 127.5 - 1)))


@pytest.mark.parametrize("channels", [1, 4])
def test_a_tokenizer_from_training_to_pictures(tmp_path, images, channels, capsys):
    """Every loss, previews, an evaluation, a cache and a generator on it."""
    losses = ("band.weight=1", "focal_frequency.weight=1", "ssim=0.1", "stft={weight: 0.1, window: 8}")
    losses += ("alignment={weight: 0.1, backbone: efficientnet-lite0}", "high_dropout=0.2", "scale_equivariance=0.2")
    settings = [f"{key}={value}" for key, value in with_channels(channels).items()]
    settings += [f"loss.{loss}" for loss in losses] + ["loss.adversarial.start_step=0", "train.steps=4"]
    recipe, run = tiny_tokenizer_recipe(tmp_path, images), tmp_path / "run"
    train("train_tokenizer", recipe, *settings, "--dry-run")
    assert "96 floats per 16 px image" in capsys.readouterr().out
    train("train_tokenizer", recipe, *settings, f"output={run}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"band", "alignment", "adversarial", "discriminator", "stft"} < set(lines[-1])
    with Image.open(run / "samples/step-0000004.png") as preview:
        assert preview.mode == "RGB" and preview.height > 2 * 16
    vae = AutoencoderKLFA.from_pretrained(run / "final")
    assert image_channels(vae) == channels

    options = ("--data", images, "--resolution", 16, "--output")
    command("evaluate", "reconstruction", f"--model={run / 'final'}", *options, tmp_path / "measured",
            "--levels", 1, "--features", "efficientnet-lite0")  # fmt: skip
    result = json.loads((tmp_path / "measured/results.json").read_text())
    data = ImageDataset(open_source(str(images)), 16, channels=channels)
    originals = torch.stack([data[i]["image"] for i in range(len(data))])
    with torch.no_grad():
        expected = (vae(originals).sample - originals).square().mean()
    assert result["rows"][0]["metrics"]["Recon"] == pytest.approx(float(expected), rel=1e-4)
    assert {path.name for path in (tmp_path / "measured").glob("*.png")} >= {"comparison.png", "latents.png"}

    command("cache-latents", f"--tokenizer={run / 'final'}", *options, tmp_path / "cache")
    mean = open_latents(tmp_path / "cache").read(np.array([0]), np.array([0]))["mean"]
    with torch.no_grad():
        assert torch.allclose(mean, vae.encode(originals[:1]).latent_dist.mean, atol=1e-5)
    recipe = tiny_generator_recipe(tmp_path, tmp_path / "cache", run / "final")
    train("train_generator", recipe, f"output={tmp_path / 'generator'}", "train.steps=1", "train.sample_every=1")
    assert (tmp_path / "generator/samples/step-0000001.png").exists()
    pipeline = LightningDiTPipeline.from_pretrained(tmp_path / "generator/final")
    sample_to_folder(pipeline, tmp_path / "generated", 2, num_inference_steps=1)
    modes = {Image.open(file).mode for file in (tmp_path / "generated").glob("*.png")}
    assert modes == {{1: "L", 4: "RGBA"}[channels]}


def test_pictures_side_by_side(tmp_path, images):
    models = []
    for name, channels in (("gray", 1), ("color", 3), ("opaque", 4)):
        vae = AutoencoderKL.from_config(make_tiny_kl().config, in_channels=channels, out_channels=channels)
        vae.save_pretrained(tmp_path / name)
        models.append((name, str(tmp_path / name)))
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    AutoencoderKLQwenImage(**sizes, **statistics, input_channels=4).save_pretrained(tmp_path / "layers")
    models.append(("layers", str(tmp_path / "layers")))
    files = find_images([images])
    for chosen, channels in ((models[:1], 1), (models[2:], 4)):
        comparisons = compare_on_images(files, chosen)
        assert comparisons[0].original.shape == (channels, 20, 24)
        save_side_by_side(tmp_path / "out.png", comparisons)
        with Image.open(tmp_path / "out.png") as picture:
            assert picture.mode == "RGB"
    options = [files[0], *(f"--model={name}={path}" for name, path in models[:2]), "--output", tmp_path / "new.png"]
    assert "color takes images of 3 channels, and gray of 1" in command_error("reconstruct", *options)
    for name, path in models:
        if name != "color":
            command("preview", path, "--data", images, "--resolution", 16, "--output", tmp_path / "preview.png")
            assert np.shape(json.loads((tmp_path / name / "config.json").read_text())["latent_rgb_factors"])[1] == 3


def test_other_channels_are_refused(tmp_path, images):
    recipe = tiny_tokenizer_recipe(tmp_path, images)
    for settings in (["model.in_channels=4"], ["model.in_channels=2", "model.out_channels=2"]):
        for more in ([], ["--dry-run"]):
            message = refusal("train_tokenizer", recipe, f"output={tmp_path / 'run'}", *settings, *more)
            assert settings[0].removeprefix("model.") in message and "3 for RGB or 4 for RGBA" in message
    assert not (tmp_path / "run").exists()
    four = AutoencoderKL(in_channels=4, out_channels=4, norm_num_groups=4, block_out_channels=(8,))
    assert measure_budget(four, 8).flops > 0
