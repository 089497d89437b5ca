import pytest
import torch
from conftest import TINY_FAVAE
from diffusers import AutoencoderKL

from favae import AutoencoderKLFA, TwoBranchAutoencoderKL
from favae.adapters.pipelines import fold_latent_statistics


def statistics(channels: int = 6) -> dict:
    return {
        "latents_mean": torch.linspace(-2, 2, channels).tolist(),
        "latents_std": torch.linspace(0.5, 3, channels).tolist(),
    }


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize(
    "config", [statistics(), {"scaling_factor": 0.3, "shift_factor": 0.1}, {"scaling_factor": 2.0, **statistics()}]
)
def test_folded_statistics_give_unit_latents_and_the_same_images(config, convolutions, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        **blocks,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=6,
        use_quant_conv=convolutions,
        use_post_quant_conv=convolutions,
        **config,
    ).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        assert fold_latent_statistics(vae) is vae
        after = vae.encode(images).latent_dist
        scale = torch.tensor(config.get("latents_std", [1.0] * 6)).view(1, 6, 1, 1) / vae_scale(config)
        mean = torch.tensor(config.get("latents_mean", [config.get("shift_factor", 0.0)] * 6)).view(1, 6, 1, 1)
        assert torch.allclose(after.mean, (before.mean - mean) / scale, atol=1e-5)
        assert torch.allclose(after.std, before.std / scale, rtol=1e-4)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)
        vae.save_pretrained(tmp_path)
        loaded = AutoencoderKL.from_pretrained(tmp_path)
        assert torch.equal(loaded.encode(images).latent_dist.mean, after.mean)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (1.0, 0.0)
    assert loaded.config.latents_mean is None and loaded.config.latents_std is None


def vae_scale(config: dict) -> float:
    return config.get("scaling_factor", 0.18215)  # diffusers' default


def test_statistics_of_our_autoencoder(tiny_favae):
    tiny_favae.register_to_config(**statistics())
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        decoded = tiny_favae(images).sample
        mean = tiny_favae.encode(images).latent_dist.mean
        fold_latent_statistics(tiny_favae)
        assert torch.allclose(tiny_favae(images).sample, decoded, atol=1e-4)
        assert not torch.allclose(tiny_favae.encode(images).latent_dist.mean, mean, atol=0.1)


def test_statistics_that_do_not_fit(tiny_favae):
    tiny_favae.register_to_config(latents_mean=[0.0] * 6)
    with pytest.raises(ValueError, match="both"):
        fold_latent_statistics(tiny_favae)
    tiny_favae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="6 numbers"):
        fold_latent_statistics(tiny_favae)


def test_a_folded_model_of_ours_has_no_settings_that_its_class_does_not_have(tiny_favae):
    names = set(tiny_favae.config)
    tiny_favae.register_to_config(**statistics())
    assert set(fold_latent_statistics(tiny_favae).config) == names


@pytest.mark.parametrize(
    "model, changed, message",
    [
        (AutoencoderKLFA, {"latent_norm": "rms"}, "they are on a sphere"),
        (TwoBranchAutoencoderKL, {}, "no convolutions that could hold"),
    ],
)
def test_statistics_that_no_convolution_can_hold(model, changed, message):
    settings = {name: value for name, value in TINY_FAVAE.items() if name != "shortcut"}
    vae = model(**settings | changed)
    vae.register_to_config(**statistics())
    with pytest.raises(ValueError, match=message):
        fold_latent_statistics(vae)
