import json

import pytest
import torch
from conftest import TINY_FAVAE
from diffusers import AutoencoderKL, AutoModel

from favae import AutoencoderKLFA


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 40)])
def test_shapes_and_return_types(tiny_favae, size):
    images = torch.rand(2, 3, *size) * 2 - 1
    posterior = tiny_favae.encode(images).latent_dist
    assert posterior.mode().shape == (2, 6, size[0] // 4, size[1] // 4)
    assert torch.equal(tiny_favae.encode(images, return_dict=False)[0].mean, posterior.mean)
    decoded = tiny_favae.decode(posterior.mode(), return_dict=False, generator=torch.Generator())[0]
    assert decoded.shape == images.shape
    assert torch.equal(tiny_favae(images).sample, decoded)
    assert isinstance(tiny_favae, AutoencoderKL)


def test_save_load_same_output(tiny_favae, tmp_path):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    tiny_favae.save_pretrained(tmp_path)
    loaded, info = AutoencoderKLFA.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(images).sample, tiny_favae(images).sample)
    keys = json.loads((tmp_path / "config.json").read_text())
    for key, value in TINY_FAVAE.items():
        assert keys[key] == (list(value) if isinstance(value, tuple) else value)
    assert keys["shift_factor"] == 0.0 and keys["force_upcast"] is False
    assert not [key for key in tiny_favae.state_dict() if "filters" in key]  # the transform is not a weight


@pytest.mark.parametrize(
    "options",
    [
        {"low_branch": "upsampled"},
        {"high_decoder_input": "high"},
        {"wavelet": "db2"},
        {"high_block_out_channels": None},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"band_scales": (1.0, 1.0)},
    ],
)
def test_options_change_the_model_and_survive_saving(options, tmp_path):
    model = AutoencoderKLFA(**{**TINY_FAVAE, **options}).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderKLFA.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_latents_are_low_then_high():
    model = AutoencoderKLFA(**TINY_FAVAE, high_decoder_input="high", use_quant_conv=False, use_post_quant_conv=False)
    model.eval()
    assert model.low_latent_channels == 4
    flat = torch.full((1, 3, 16, 16), 0.3)  # no detail at all: the high encoder sees zeros
    texture = flat + 0.2 * (torch.arange(16) % 2 * 2 - 1.0)  # detail only: the 2x2 means stay
    a, b = model.encode(flat).latent_dist, model.encode(texture).latent_dist
    for x, y in ((a.mean, b.mean), (a.logvar, b.logvar)):
        assert torch.allclose(x[:, :4], y[:, :4], atol=1e-5)
        assert not torch.allclose(x[:, 4:], y[:, 4:], atol=1e-3)
    z = torch.randn(1, 6, 4, 4)
    changed = torch.cat([z[:, :4], torch.randn(1, 2, 4, 4)], dim=1)
    low, low_changed = (model.encoder.transform(model.decode(latent).sample)[0] for latent in (z, changed))
    assert torch.allclose(low, low_changed, atol=1e-4)  # the high latents do not reach the low band


def test_scaling_is_not_applied_inside(tiny_favae):
    images = torch.rand(1, 3, 16, 16)
    before = tiny_favae.encode(images).latent_dist.mean
    tiny_favae.register_to_config(scaling_factor=5.0, shift_factor=3.0, latents_mean=[1.0] * 6, latents_std=[2.0] * 6)
    assert torch.equal(tiny_favae.encode(images).latent_dist.mean, before)


def test_inherited_features_work(tiny_favae):
    images = torch.rand(2, 3, 16, 16)
    expected = tiny_favae(images).sample
    tiny_favae.enable_slicing()
    assert torch.allclose(tiny_favae(images).sample, expected, atol=1e-5)
    tiny_favae.disable_slicing()
    assert tiny_favae.attn_processors
    tiny_favae.set_default_attn_processor()
    tiny_favae.fuse_qkv_projections()
    assert torch.allclose(tiny_favae(images).sample, expected, atol=1e-4)
    tiny_favae.unfuse_qkv_projections()
    tiny_favae.enable_tiling()
    large = torch.rand(1, 3, 32, 48)
    assert tiny_favae.encode(large).latent_dist.mean.shape == (1, 6, 8, 12)
    assert tiny_favae(large).sample.shape == large.shape


def test_gradient_checkpointing_gives_the_same_gradients(tiny_favae):
    images = torch.rand(1, 3, 16, 16)
    tiny_favae.train()
    tiny_favae(images).sample.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in tiny_favae.named_parameters()}
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if name.endswith("conv_out.weight"))
    tiny_favae.zero_grad()
    tiny_favae.enable_gradient_checkpointing()
    assert tiny_favae.is_gradient_checkpointing
    tiny_favae(images).sample.square().mean().backward()
    assert all(torch.allclose(p.grad, expected[name], atol=1e-6) for name, p in tiny_favae.named_parameters())


def test_bfloat16(tiny_favae):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = tiny_favae(images).sample
    output = tiny_favae.to(torch.bfloat16)(images.bfloat16()).sample
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().mean() < 0.05


def test_auto_model_inside_a_folder_of_components(tiny_favae, tmp_path):
    tiny_favae.save_pretrained(tmp_path / "vae")
    index = {"_class_name": "X", "vae": ["favae.models.autoencoder_kl_fa", "AutoencoderKLFA"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert isinstance(AutoModel.from_pretrained(str(tmp_path), subfolder="vae"), AutoencoderKLFA)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"high_latent_channels": 6}, "high_latent_channels"),
        ({"high_block_out_channels": (8,)}, "high_block_out_channels"),
        ({"low_branch": "none"}, "low_branch"),
        ({"high_decoder_input": "none"}, "high_decoder_input"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLFA(**{**TINY_FAVAE, **options})


def test_sizes_that_do_not_fit(tiny_favae):
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        tiny_favae.encode(torch.zeros(1, 3, 18, 16))
