import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from favae import AsymmetricAutoencoderKLFA


def test_settings_that_are_not_known_are_left_out(tiny_kl):
    tiny_kl.register_to_config(of_a_later_version=1)
    assert "of_a_later_version" not in AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl).config


def test_from_autoencoder_kl_keeps_the_latent_space(tiny_kl):
    tiny_kl.register_to_config(scaling_factor=0.3, shift_factor=0.1)
    model = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(8, 8))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior, expected = model.encode(images).latent_dist, tiny_kl.encode(images).latent_dist
    assert torch.equal(posterior.mean, expected.mean) and torch.equal(posterior.logvar, expected.logvar)
    assert model.config.scaling_factor == 0.3 and model.config.shift_factor == 0.1
    assert model.decode(posterior.mean).sample.shape == images.shape
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder", "quant_conv"}
    assert all(p.requires_grad for name, p in model.named_parameters() if name.startswith(("decoder", "post_quant")))


def test_from_autoencoder_kl_keeps_other_blocks_and_survives_saving(tmp_path):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    model = AsymmetricAutoencoderKLFA.from_autoencoder_kl(vae).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(images).latent_dist.mean, vae.encode(images).latent_dist.mean)
    assert torch.equal(AsymmetricAutoencoderKLFA.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_from_autoencoder_kl_begins_with_the_trained_decoder_where_widths_agree(tiny_kl):
    def same(branch, name: str) -> bool:
        ours, theirs = branch.get_submodule(name).state_dict(), tiny_kl.decoder.get_submodule(name).state_dict()
        return all(torch.equal(value, theirs[key]) for key, value in ours.items())

    blocks = ("conv_in", "mid_block", "up_blocks.0", "up_blocks.1")
    warm = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl).decoder
    assert all(same(branch, name) for branch in (warm.low, warm.high) for name in blocks)
    assert not same(AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, warm_start=False).decoder.low, "conv_in")
    narrow = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(4, 16)).decoder
    assert [same(narrow.high, name) for name in ("conv_in", "mid_block", "up_blocks.0")] == [True] * 3
    assert narrow.high.up_blocks[1].resnets[0].conv1.out_channels == 4 and all(same(narrow.low, n) for n in blocks)


def test_other_attention_is_kept_where_the_blocks_are():
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    branch = AsymmetricAutoencoderKLFA.from_autoencoder_kl(vae).decoder.low
    assert [type(block).__name__ for block in branch.up_blocks] == ["AttnUpDecoderBlock2D"]


def test_decoders_of_other_shapes(tiny_kl, tmp_path):
    options = {"low_block_out_channels": (8,), "high_block_out_channels": (4,), "wavelet": "db2", "wavelet_levels": 2}
    model = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, **options).eval()
    assert model.spatial_compression_ratio == 4
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(model.encode(images).latent_dist.mean, tiny_kl.encode(images).latent_dist.mean)
    model.save_pretrained(tmp_path)
    loaded = AsymmetricAutoencoderKLFA.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).sample, model(images).sample)
    assert not any(p.requires_grad for p in model.encoder.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"low_block_out_channels": (8, 8, 8)}, "low_block_out_channels"),
        ({"high_block_out_channels": (8, 10)}, "high_block_out_channels .* norm_num_groups = 4"),
        ({"wavelet_levels": 3}, "wavelet_levels .* 3"),
    ],
)
def test_impossible_settings(tiny_kl, options, message):
    with pytest.raises(ValueError, match=message):
        AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl, **options)


def test_flux2_s_encoder_and_the_first_blocks_of_its_decoder_are_taken(tiny_kl):
    shape = {name: tiny_kl.config[name] for name in ("block_out_channels", "latent_channels", "norm_num_groups")}
    types = {name: tiny_kl.config[name] for name in ("down_block_types", "up_block_types", "layers_per_block")}
    flux2 = AutoencoderKLFlux2(**shape, **types, decoder_block_out_channels=(4, 8, 16)).eval()
    model = AsymmetricAutoencoderKLFA.from_autoencoder_kl(flux2, low_block_out_channels=(8, 16)).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = flux2.encode(images).latent_dist.mean
    assert torch.equal(model.encode(images).latent_dist.mean, latents) and model.config.scaling_factor == 1
    assert model.decode(latents).sample.shape == images.shape
    assert torch.equal(model.decoder.low.conv_in.weight, flux2.decoder.conv_in.weight)


def test_only_stock_autoencoders_and_sizes_that_fit(tiny_kl, tiny_favae):
    model = AsymmetricAutoencoderKLFA.from_autoencoder_kl(tiny_kl)
    for other in (tiny_favae, model, torch.nn.Identity()):
        with pytest.raises(ValueError, match=f"AutoencoderKLFlux2, got {type(other).__name__}"):
            AsymmetricAutoencoderKLFA.from_autoencoder_kl(other)
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        model.encode(torch.zeros(1, 3, 18, 16))
