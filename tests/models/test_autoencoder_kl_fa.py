import json

import pytest
import torch
from conftest import TINY_FAVAE
from diffusers import AutoencoderKL, AutoModel
from skimage import data

from favae import AutoencoderKLFA, TwoBranchAutoencoderKL
from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, expected_patches, frequency_basis


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
        {"wavelet": "db2"},
        {"high_block_out_channels": None},
        {"wavelet_levels": 2, "high_block_out_channels": (8,)},
        {"shortcut": "overlapping"},
        {"shortcut": "patches"},
    ],
)
def test_options_change_the_model_and_survive_saving(options, tmp_path):
    model = AutoencoderKLFA(**{**TINY_FAVAE, **options}).eval()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderKLFA.from_pretrained(tmp_path)(images).sample, model(images).sample)
    plain = AutoencoderKLFA(**TINY_FAVAE).eval()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    same_networks = shapes == {name: value.shape for name, value in plain.state_dict().items()}
    assert same_networks == ("wavelet" in options)
    if same_networks:
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(plain(images).sample, model(images).sample, atol=1e-4)


def test_latents_are_low_then_high(tiny_favae):
    assert tiny_favae.low_latent_channels == 4
    flat = torch.full((1, 3, 16, 16), 0.3)  # no detail at all: the high encoder sees zeros
    texture = flat + 0.2 * (torch.arange(16) % 2 * 2 - 1.0)  # detail only: the 2x2 means stay
    a, b = (tiny_favae.encoder(images).chunk(2, dim=1) for images in (flat, texture))
    for x, y in zip(a, b):  # mean and logvar
        assert torch.allclose(x[:, :4], y[:, :4], atol=1e-5)
        assert not torch.allclose(x[:, 4:], y[:, 4:], atol=1e-3)
    z = torch.randn(1, 6, 4, 4)
    changed = torch.cat([z[:, :4], torch.randn(1, 2, 4, 4)], dim=1)
    low, low_changed = (tiny_favae.encoder.bands(tiny_favae.decoder(latent))[0] for latent in (z, changed))
    assert torch.allclose(low, low_changed, atol=1e-4)  # the high latents do not reach the low band


def test_low_pass_images_are_the_means_of_2x2_pixels(tiny_favae):
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    means = torch.nn.functional.avg_pool2d(images, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(tiny_favae.low_pass(images), means, atol=1e-5)


def test_the_published_branches_know_nothing_of_each_other():
    model = TwoBranchAutoencoderKL(**{name: value for name, value in TINY_FAVAE.items() if name != "shortcut"}).eval()
    assert model.low_latent_channels == 4
    flat = torch.full((1, 3, 16, 16), 0.3)
    texture = flat + 0.2 * (torch.arange(16) % 2 * 2 - 1.0)
    a, b = model.encode(flat).latent_dist.mean, model.encode(texture).latent_dist.mean
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-5) and not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-3)
    z = torch.randn(1, 6, 4, 4)
    for changed, kept in ((slice(4, None), 0), (slice(4), 1)):  # high latents leave the low band, low ones the high
        other = z.clone()
        other[:, changed] = torch.randn(other[:, changed].shape)
        before, after = (model.encoder.bands(model.decode(latent).sample) for latent in (z, other))
        assert torch.allclose(before[kept], after[kept], atol=1e-4)
        assert not torch.allclose(before[1 - kept], after[1 - kept], atol=1e-3)


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


@torch.no_grad()
def test_latents_on_a_sphere_are_so_in_tiles():
    model = AutoencoderKLFA(**TINY_FAVAE | {"latent_norm": "rms"}).eval()
    model.enable_tiling()
    sizes = model.encode(torch.randn(1, 3, 40, 28)).latent_dist.mode().square().mean(1).sqrt()
    assert torch.allclose(sizes, torch.ones_like(sizes), atol=1e-3)


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
        ({"wavelet": "none"}, "wavelet 'none'"),
        ({"wavelet_levels": 0}, "wavelet_levels"),
        ({"wavelet_levels": 3}, "wavelet_levels .* 3"),
        ({"wavelet_levels": 2}, "high_block_out_channels"),
        ({"shortcut": "overlapping", "latent_channels": 49}, "49"),
        ({"shortcut": True}, "shortcut .* True"),
        ({"latent_norm": "layer"}, "latent_norm .* 'layer'"),
        ({"block_out_channels": (8, 8, 18)}, "block_out_channels .* norm_num_groups = 4"),
        ({"high_block_out_channels": (8, 10)}, "high_block_out_channels .* norm_num_groups = 4"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLFA(**{**TINY_FAVAE, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"high_latent_channels": 6}, "high_latent_channels"),
        ({"high_block_out_channels": (8,)}, "high_block_out_channels"),
        ({"block_out_channels": (8, 8, 18)}, "block_out_channels .* norm_num_groups = 4"),
    ],
)
def test_impossible_settings_of_two_branches(options, message):
    settings = {name: value for name, value in TINY_FAVAE.items() if name != "shortcut"}
    with pytest.raises(ValueError, match=message):
        TwoBranchAutoencoderKL(**settings | options)


def test_sizes_that_do_not_fit(tiny_favae):
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        tiny_favae.encode(torch.zeros(1, 3, 18, 16))


def test_frequency_basis_is_orthonormal_and_begins_with_the_mean():
    basis = frequency_basis(8, 100)
    assert torch.allclose(basis.flatten(1) @ basis.flatten(1).T, torch.eye(100), atol=1e-5)
    assert torch.allclose(basis[0], torch.full((3, 8, 8), 192**-0.5))
    assert all((basis[i].sum(0) ** 2).sum() < 1e-8 for i in (1, 2))  # the two color directions, without brightness
    with pytest.raises(ValueError, match="fewer than 13"):
        frequency_basis(2, 13)


def test_expected_patches_are_those_of_the_gaussian_field():
    """Against the textbook's conditional expectation, of one color, everything at once: 3 x 3 patches of 2 px."""
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
