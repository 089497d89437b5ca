import json

import pytest
import torch
from conftest import TINY_FAVAE
from diffusers import AutoencoderKL, AutoModel
from skimage import data

from favae import AutoencoderKLFA
from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, expected_patches, frequency_basis

IMAGE = {"encoder_type": "image", "high_latent_channels": 0}


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
        {"wavelet_levels": 2, "high_block_out_channels": (8,)},
        {"frequency_complement": "conv"},
        {"frequency_complement": "attn", "high_decoder_input": "high"},
        {"shortcut": "overlapping"},
        {"shortcut": "patches"},
        {"attention": True},
        {"encoder_type": "image", "high_latent_channels": 0},
        {"encoder_type": "image", "high_latent_channels": 0, "low_branch": "upsampled", "frequency_complement": "res"},
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
    low, low_changed = (model.encoder.bands(model.decode(latent).sample)[0] for latent in (z, changed))
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
        ({"encoder_type": "none"}, "encoder_type"),
        ({"frequency_complement": "none"}, "frequency_complement"),
        ({"wavelet": "none"}, "wavelet 'none'"),
        ({"wavelet_levels": 0}, "wavelet_levels"),
        ({"wavelet_levels": 3}, r"wavelet_levels .* number of block_out_channels \(3\), got 3"),
        ({"wavelet_levels": 2}, r"high_block_out_channels must have 1 entries.* wavelet_levels \(2\), got 2"),
        (
            {"wavelet_levels": 2, "high_block_out_channels": (8,), "low_branch": "upsampled"},
            "low_branch.*wavelet_levels",
        ),
        ({"encoder_type": "image"}, "encoder_type='image'.*high_latent_channels"),
        (IMAGE | {"high_decoder_input": "high"}, "encoder_type='image'.*high_decoder_input"),
        (IMAGE | {"shortcut": "overlapping"}, "encoder_type='image'.*shortcut"),
        ({"down_block_types": ("DownEncoderBlock2D",) * 3}, "encoder_type='wavelet'.*down_block_types"),
        ({"shortcut": "overlapping", "latent_channels": 49}, "3 x 4 x 4 has fewer than 49"),
        ({"shortcut": True}, "shortcut must be 'overlapping' or 'patches' or None, got True"),
        ({"block_out_channels": (8, 8, 18)}, "block_out_channels must be multiples of norm_num_groups = 4"),
        ({"high_block_out_channels": (8, 10)}, "high_block_out_channels must be multiples of norm_num_groups = 4"),
        ({"band_scales": (2.0,)}, "band_scales must be two positive numbers"),
        ({"band_scales": (0.0, 1.0)}, "band_scales must be two positive numbers"),
        (IMAGE | {"down_block_types": ("DownEncoderBlock2D",)}, r"down_block_types .* block_out_channels \(3\), got 1"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLFA(**{**TINY_FAVAE, **options})


def test_sizes_that_do_not_fit(tiny_favae):
    for model in (tiny_favae, AutoencoderKLFA(**TINY_FAVAE | IMAGE)):
        with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
            model.encode(torch.zeros(1, 3, 18, 16))


def test_frequency_basis_is_orthonormal_and_begins_with_the_mean():
    basis = frequency_basis(8, 100)
    assert torch.allclose(basis.flatten(1) @ basis.flatten(1).T, torch.eye(100), atol=1e-5)
    assert torch.allclose(basis[0], torch.full((3, 8, 8), 192**-0.5))
    assert all((basis[i].sum(0) ** 2).sum() < 1e-8 for i in (1, 2))  # the two colour directions, without brightness
    with pytest.raises(ValueError, match="fewer than 13"):
        frequency_basis(2, 13)


def test_expected_patches_are_those_of_the_gaussian_field():
    """Against the textbook's conditional expectation, of one colour, everything at once: 3 x 3 patches of 2 px."""
    size, count = 2, 3
    places = torch.cartesian_prod(torch.arange(6.0), torch.arange(6.0)).double()
    covariance = torch.exp(-torch.cdist(places, places) / (5 * size))
    basis = frequency_basis(size, count, channels=1).double()[:, 0]
    seen = torch.zeros(3, 3, count, 6, 6).double()
    for i in range(3):
        for j in range(3):
            seen[i, j, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = basis
    seen = seen.flatten(0, 2).flatten(1)
    coordinates = torch.randn(27).double()
    expected = covariance @ seen.T @ torch.linalg.solve(seen @ covariance @ seen.T, coordinates)
    patches = expected_patches(size, count, channels=1)
    found = torch.nn.functional.conv_transpose2d(
        coordinates.view(1, 3, 3, count).permute(0, 3, 1, 2).float(), patches, stride=size
    )
    assert torch.allclose(found[0, 0, 4:6, 4:6], expected.view(6, 6)[2:4, 2:4].float(), atol=1e-5)


def test_overlapping_patches_keep_the_coordinates_and_hide_the_borders():
    encode, decode, independent = (
        PatchesToLatents(3, 16, 8),
        LatentsToPatches(16, 3, 8),
        LatentsToPatches(16, 3, 8, overlapping=False),
    )
    photo = torch.tensor(data.astronaut().copy()).permute(2, 0, 1)[None, :, :256, :256] / 127.5 - 1
    with torch.no_grad():
        latents = encode(photo)
        smooth, blocky = decode(latents), independent(latents)
        assert torch.allclose(encode(smooth), latents, atol=1e-4)
    assert (smooth - photo).square().mean() < 0.93 * (blocky - photo).square().mean()
    steps = [(image[..., 1:] - image[..., :-1]).abs().mean((0, 1, 2)) for image in (smooth, blocky)]
    seams = [float(step[7::8].mean() / step.mean()) for step in steps]
    assert seams[0] - 1 < 0.5 * (seams[1] - 1)


def test_an_untrained_model_with_a_shortcut_is_a_linear_codec():
    model = AutoencoderKLFA(**TINY_FAVAE | {"shortcut": "patches"}).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    posterior = model.encode(images).latent_dist
    basis = frequency_basis(4, 6).flatten(1)
    patches = torch.nn.functional.unfold(images, 4, stride=4)  # (B, 48, 16)
    projected = torch.nn.functional.fold(basis.T @ (basis @ patches), (16, 16), 4, stride=4)
    assert torch.allclose(model.decode(posterior.mode()).sample, projected, atol=1e-5)
    assert (posterior.std < 0.01).all()
    flat = torch.full((1, 3, 16, 16), 0.3)
    assert torch.allclose(model(flat).sample, flat, atol=1e-5)


def test_everything_behind_a_shortcut_learns():
    model = AutoencoderKLFA(**TINY_FAVAE | {"shortcut": "overlapping"}).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        images = torch.rand(2, 3, 16, 16) * 2 - 1
        posterior = model.encode(images).latent_dist
        (model.decode(posterior.sample()).sample - images).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The key's bias moves no attention.
    unmoved = [n for n, p in model.named_parameters() if torch.equal(p, before[n]) and "to_k.bias" not in n]
    assert not unmoved


def test_from_autoencoder_kl_keeps_the_latent_space(tiny_kl):
    tiny_kl.register_to_config(scaling_factor=0.3, shift_factor=0.1)
    model = AutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(8, 8), frequency_complement="conv")
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
    model = AutoencoderKLFA.from_autoencoder_kl(vae).eval()
    model.save_pretrained(tmp_path)
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(model.encode(images).latent_dist.mean, vae.encode(images).latent_dist.mean)
    assert torch.equal(AutoencoderKLFA.from_pretrained(tmp_path)(images).sample, model(images).sample)


def test_from_autoencoder_kl_begins_with_the_trained_decoder_where_widths_agree(tiny_kl):
    def same(branch, name: str) -> bool:
        ours, theirs = branch.get_submodule(name).state_dict(), tiny_kl.decoder.get_submodule(name).state_dict()
        return all(torch.equal(value, theirs[key]) for key, value in ours.items())

    blocks = ("conv_in", "mid_block", "up_blocks.0", "up_blocks.1")
    warm = AutoencoderKLFA.from_autoencoder_kl(tiny_kl).decoder
    assert all(same(branch, name) for branch in (warm.low, warm.high) for name in blocks)
    assert not same(AutoencoderKLFA.from_autoencoder_kl(tiny_kl, warm_start=False).decoder.low, "conv_in")
    narrow = AutoencoderKLFA.from_autoencoder_kl(tiny_kl, high_block_out_channels=(4, 16)).decoder
    assert [same(narrow.high, name) for name in ("conv_in", "mid_block", "up_blocks.0")] == [True] * 3
    assert narrow.high.up_blocks[1].resnets[0].conv1.out_channels == 4 and all(same(narrow.low, n) for n in blocks)


def test_a_whole_decoder_with_a_high_branch_begins_as_it_was(tiny_kl):
    model = AutoencoderKLFA.from_autoencoder_kl(tiny_kl, low_branch="image", high_block_out_channels=(4, 16)).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = tiny_kl(images).sample
    assert torch.equal(model(images).sample, expected)
    torch.nn.init.normal_(model.decoder.high.conv_out.weight)
    low, high = model.decoder.bands(model(images).sample - expected)
    assert low.abs().max() < 1e-5 < high.abs().max()  # it adds to the high bands alone
    other = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=4,
    )
    with pytest.raises(ValueError, match="attention in the deepest blocks or none"):
        AutoencoderKLFA.from_autoencoder_kl(other, low_branch="image")
    AutoencoderKLFA.from_autoencoder_kl(other)  # begins as far as it goes
    with pytest.raises(ValueError, match="low_branch='image' .* needs encoder_type='image'"):
        AutoencoderKLFA(**{**TINY_FAVAE, "low_branch": "image"})


def test_from_autoencoder_kl_refuses_what_the_encoder_decides(tiny_kl, tiny_favae):
    with pytest.raises(ValueError, match="latent_channels is decided"):
        AutoencoderKLFA.from_autoencoder_kl(tiny_kl, latent_channels=3)
    for other in (tiny_favae, torch.nn.Identity()):
        with pytest.raises(ValueError, match=f"stock AutoencoderKL, got {type(other).__name__}"):
            AutoencoderKLFA.from_autoencoder_kl(other)


def test_image_encoders_have_no_branches_to_compare(tiny_kl):
    with pytest.raises(ValueError, match="encoder_type='image'"):
        _ = AutoencoderKLFA.from_autoencoder_kl(tiny_kl).branches
