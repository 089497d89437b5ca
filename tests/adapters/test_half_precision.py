import pytest
import torch
from conftest import TINY_FAVAE, command, command_error, make_tiny_kl
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import Decoder, Encoder

from favae import AutoencoderKLFA
from favae.adapters import half_precision as module
from favae.adapters.half_precision import LIMIT, limit_activations
from favae.autoencoders import load_autoencoder, reconstruct
from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.errors import ModelError


@torch.no_grad()
def enlarge(vae, factor: float):
    """Multiplies all that adds to the features of each size: normalization takes the factor back."""
    for network in vae.modules():
        if isinstance(network, Encoder | Decoder):
            for name, parameter in network.named_parameters():
                if "conv_in." in name or ".conv1." in name or ".conv2." in name or ".to_out." in name:
                    parameter *= factor
                elif "sampler" in name or "conv_shortcut" in name:
                    parameter *= factor if name.endswith("bias") else 1
    return vae.eval()


@pytest.mark.parametrize("make", [make_tiny_kl, lambda: AutoencoderKLFA(**TINY_FAVAE)])
@torch.no_grad()
def test_overflowing_activations_become_small_and_images_stay(make):
    vae, images = enlarge(make(), 1e5), torch.rand(2, 3, 16, 16) * 2 - 1
    before = reconstruct(vae, images)
    assert before.isfinite().all() and not reconstruct(vae.half(), images).isfinite().all()
    report = limit_activations(vae.float(), images)
    assert report.largest_before > 65504 and report.largest_after <= LIMIT
    assert report.difference < 1e-3 and report.half_difference < 0.05
    assert (reconstruct(vae.half(), images) - before).abs().max() < 0.05


def test_small_activations_stay_as_they_are():
    vae, images = make_tiny_kl(), torch.rand(1, 3, 16, 16) * 2 - 1
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    assert limit_activations(vae, images).difference == 0
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_the_command_looks_at_images_of_all_classes(tmp_path, image_folder, monkeypatch):
    make_tiny_kl().save_pretrained(tmp_path / "model")
    seen = []

    def look(vae, images):
        seen.append(images)
        return limit_activations(vae, images)

    monkeypatch.setattr(module, "limit_activations", look)
    words = (tmp_path / "model", tmp_path / "out", "--data", image_folder, "--resolution", 16, "--num-images", 2)
    command("half-precision", *words)
    data = ImageDataset(open_source(str(image_folder)), 16)
    assert torch.equal(seen[0], torch.stack([data[0]["image"], data[len(data) - 1]["image"]]))


def test_other_networks_are_refused():
    tiny = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    with pytest.raises(ModelError, match="AutoencoderTiny has other layers"):
        limit_activations(tiny, torch.zeros(1, 3, 16, 16))
    damaged = make_tiny_kl()
    damaged.decoder.conv_in.bias.data[0] = torch.inf
    with pytest.raises(ModelError, match="not finite in float32 either"):
        limit_activations(damaged, torch.zeros(1, 3, 16, 16))


def test_the_command(tmp_path, image_folder, capsys, monkeypatch):
    enlarge(make_tiny_kl(), 1e5).save_pretrained(tmp_path / "large")
    words = ("half-precision", tmp_path / "large", tmp_path / "small", "--data", image_folder, "--resolution", "16")
    command(*words)
    assert "largest activation: " in capsys.readouterr().out
    small = load_autoencoder(str(tmp_path / "small"))
    assert small.config.force_upcast is False
    with torch.no_grad():
        assert reconstruct(small.half(), torch.zeros(1, 3, 16, 16)).isfinite().all()
    assert "name a new folder" in command_error(*words)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command("half-precision", tmp_path / "large", ".", *words[3:])
    assert (tmp_path / "here/config.json").is_file()

    vae = make_tiny_kl()
    with torch.no_grad():  # between the networks nothing is scaled
        for parameter in vae.post_quant_conv.parameters():
            parameter *= 1e6
        vae.decoder.conv_in.weight /= 1e6
    vae.save_pretrained(tmp_path / "between")
    words = ("half-precision", tmp_path / "between", tmp_path / "none", *words[3:])
    assert "float16 overflows" in command_error(*words) and not (tmp_path / "none").exists()
