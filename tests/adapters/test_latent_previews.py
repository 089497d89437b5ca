"""Previews of latents by a linear map, and where it is kept."""

import json
import logging

import pytest
import torch
from conftest import TINY_FAVAE, command, command_error, make_tiny_kl, write_images
from diffusers import AutoencoderKLFlux2, AutoModel
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from favae import AsymmetricAutoencoderKLFA, AutoencoderKLFA
from favae.adapters.latent_previews import fit_latent_rgb, latent_rgb
from favae.adapters.pipelines import fold_latent_statistics
from favae.autoencoders import encode, load_autoencoder
from favae.data.images import to_tensor
from favae.errors import DataError, NonFiniteError
from favae.models.hub import describe_model

IMAGES = torch.rand(4, 3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
KEYS = ("latent_rgb_factors", "latent_rgb_factors_bias")
MAP = {KEYS[0]: [[0.1, 0.2, 0.3]] * 6, KEYS[1]: [0.5, 0.0, -0.5]}


def make_linear_favae(**settings) -> AutoencoderKLFA:
    """An untrained model with a shortcut: three of its latents are the mean colors of patches, rotated."""
    return AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": "overlapping", **settings}).eval()


@pytest.mark.parametrize(
    "settings",
    [{}, {"scaling_factor": 3.0, "shift_factor": 0.5}, {"latents_mean": [1.0] * 6, "latents_std": [2.0] * 6}],
)
def test_a_linear_map_is_found(settings):
    vae = make_linear_favae(**settings)
    fitted = fit_latent_rgb(vae, IMAGES.split(2))
    assert fitted.explained > 0.9999 and fitted.factors.shape == (6, 3) and fitted.bias.shape == (3,)
    vae.register_to_config(**fitted.settings())
    previews = latent_rgb(vae, encode(vae, IMAGES))
    assert torch.allclose(previews, torch.nn.functional.avg_pool2d(IMAGES, 4), atol=1e-3)
    # statistics that are folded into the networks leave normalized latents, and so the map, as they are
    fold_latent_statistics(vae)
    assert torch.allclose(latent_rgb(vae, encode(vae, IMAGES)), previews, atol=1e-3)


def test_latents_with_a_batch_norm():
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=6,
    ).eval()
    vae.bn.running_mean.fill_(3.0)
    vae.requires_grad_(False)
    fitted = fit_latent_rgb(vae, [IMAGES])
    vae.register_to_config(**fitted.settings())
    previews = latent_rgb(vae, encode(vae, IMAGES))
    target = torch.nn.functional.avg_pool2d(IMAGES, 4)
    assert latent_rgb(vae, encode(vae, IMAGES).half(), normalized=True).dtype == torch.float32
    share = 1 - (previews - target).square().sum() / (target - target.mean((0, 2, 3), keepdim=True)).square().sum()
    assert fitted.explained == pytest.approx(float(share), abs=1e-3)


def test_what_has_no_map_or_gives_none_is_an_error():
    vae = make_linear_favae()
    with pytest.raises(DataError, match="favae preview"):
        latent_rgb(vae, torch.zeros(1, 6, 4, 4))
    with pytest.raises(DataError, match="1 latents, too few"):
        fit_latent_rgb(vae, [IMAGES[:1, :, :4, :4]])
    with pytest.raises(DataError, match="0 latents"):
        fit_latent_rgb(vae, [])
    with pytest.raises(NonFiniteError):
        fit_latent_rgb(vae, [IMAGES * torch.nan])


@pytest.mark.parametrize("kind", ["favae", "asymmetric", "stock"])
def test_every_loader_keeps_the_map(kind, tmp_path, caplog):
    kl = make_tiny_kl()
    kl.register_to_config(**MAP)
    vae = {
        "favae": lambda: AutoencoderKLFA(**TINY_FAVAE),
        "asymmetric": lambda: AsymmetricAutoencoderKLFA.from_autoencoder_kl(kl),  # of the same latents
        "stock": lambda: kl,
    }[kind]()
    if kind == "favae":
        vae.register_to_config(**MAP)
    vae.save_pretrained(tmp_path / "vae")
    with caplog.at_level(logging.WARNING):
        opened = load_autoencoder(str(tmp_path / "vae"))
        if kind != "stock":
            type(vae).from_pretrained(tmp_path / "vae")
    assert not caplog.records
    opened.save_pretrained(tmp_path / "again")
    again = type(vae).from_pretrained(tmp_path / "again")
    by_config = type(vae).from_config(again.config)
    by_name = AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=kind != "stock")
    for model in (opened, again, by_config, by_name):
        assert {key: model.config[key] for key in KEYS} == MAP
    if kind != "stock":
        card = ModelCard.from_template(ModelCardData(), template_str="---\n{{ card_data }}\n---\n")
        describe_model(card, again, "someone/vae")
        assert KEYS[0] in card.text and KEYS[1] in card.text


def test_the_command_writes_the_map_and_a_picture(tmp_path, capsys):
    images = write_images(tmp_path / "images", per_class=3, size=(64, 48))
    vae = make_linear_favae()
    for folder in (tmp_path / "vae", tmp_path / "pipeline" / "vae"):
        vae.save_pretrained(folder)
    before = json.loads((tmp_path / "vae" / "config.json").read_text())
    options = ("--data", images, "--resolution", "32", "--num-images", "5", "--batch-size", "2")
    command("preview", tmp_path / "vae", *options)
    after = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert {key: after.pop(key) for key in KEYS}.keys() == set(KEYS) and after == before
    assert "explains 100.00%" in capsys.readouterr().out

    with Image.open(tmp_path / "vae" / "previews.png") as picture:
        rows, width = picture.height // 256, picture.width
        assert rows == 5 and 3 * 256 < width < 4 * 256
        cells = [picture.crop((left, 28, left + 256, 284)) for left in (12, 280)]
    # the preview is the image in blocks of 4 x 4 of its pixels
    means = [to_tensor(cell.resize((8, 8), Image.Resampling.BOX)) for cell in cells]
    assert (means[0] - means[1]).abs().max() < 0.02

    command("preview", tmp_path / "pipeline", *options, "--output", tmp_path / "picture.png")
    assert KEYS[0] in json.loads((tmp_path / "pipeline" / "vae" / "config.json").read_text())
    assert (tmp_path / "picture.png").is_file() and not (tmp_path / "pipeline" / "previews.png").exists()


def test_what_cannot_be_previewed_is_one_line(tmp_path, image_folder):
    make_linear_favae().save_pretrained(tmp_path / "vae")
    assert "no folder of an autoencoder" in command_error("preview", "someone/vae", "--data", image_folder)
    assert "multiples of 4" in command_error("preview", tmp_path / "vae", "--data", image_folder, "--resolution", "30")
    assert KEYS[0] not in (tmp_path / "vae" / "config.json").read_text()


@pytest.mark.parametrize("channels", [1, 4])
def test_previews_of_gray_and_of_transparent_images_are_in_color(channels, tmp_path, image_folder):
    vae = AutoencoderKLFA(**{**TINY_FAVAE, "in_channels": channels, "out_channels": channels})
    vae.save_pretrained(tmp_path / "vae")
    command("preview", tmp_path / "vae", "--data", image_folder, "--resolution", "16")
    vae = load_autoencoder(str(tmp_path / "vae"))
    assert latent_rgb(vae, torch.zeros(1, 6, 4, 4)).shape == (1, 3, 4, 4)
    assert (tmp_path / "vae" / "previews.png").is_file()
