"""The ComfyUI node, in stand-ins of the few parts of ComfyUI that it touches."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_FAVAE, make_tiny_kl
from diffusers import AutoencoderKL, AutoencoderKLFlux2

from favae import AsymmetricAutoencoderKLFA, AutoencoderKLFA, AutoencoderTinyFA

PIXELS = torch.rand(2, 32, 48, 3, generator=torch.Generator().manual_seed(1))


class LatentFormat:
    """ComfyUI's base class, as far as VAEs meet it."""

    latent_channels, latent_dimensions, scale_factor, shift_factor = 6, 2, 1.0, 0.0

    def process_in(self, latent):
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent):
        return latent / self.scale_factor + self.shift_factor


class OutOfMemory(Exception):
    pass


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """A ComfyUI with a folder of VAEs, latents of 6 channels, and a memory that can be too small."""
    management = SimpleNamespace(
        OOM_EXCEPTION=OutOfMemory,
        vae_device=lambda: torch.device("cpu"),
        vae_offload_device=lambda: torch.device("cpu"),
        intermediate_device=lambda: torch.device("cpu"),
        vae_dtype=lambda device=None, allowed_dtypes=(): torch.float32,
        dtype_size=lambda dtype: dtype.itemsize,
        get_free_memory=lambda device=None: 1 << 30,
        soft_empty_cache=lambda: None,
        loaded=[],
    )

    def load_models_gpu(models, memory_required=0, force_full_load=False):
        management.loaded.append((models[0].model, memory_required, force_full_load))

    management.load_models_gpu = load_models_gpu
    formats = {
        "SD15": type("SD15", (LatentFormat,), {"scale_factor": 0.25}),
        "Flux": type("Flux", (LatentFormat,), {"scale_factor": 0.5, "shift_factor": 0.1}),
        "SD3": type("SD3", (LatentFormat,), {"latent_channels": 24}),
        "Flux2": type("Flux2", (LatentFormat,), {"latent_channels": 24}),
        "Wan21": type("Wan21", (LatentFormat,), {"latent_dimensions": 3, "scale_factor": 2.0}),
    }

    def patcher(model, load_device, offload_device):
        return SimpleNamespace(model=model)

    parts = {
        "comfy.latent_formats": SimpleNamespace(**formats),
        "comfy.model_management": management,
        "comfy.model_patcher": SimpleNamespace(ModelPatcher=patcher),
        "folder_paths": SimpleNamespace(get_folder_paths=lambda name: [str(tmp_path / "models" / name)]),
    }
    package = ModuleType("comfy")
    monkeypatch.setitem(sys.modules, "comfy", package)
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
        setattr(package, name.rpartition(".")[2], part)
    spec = importlib.util.spec_from_file_location("favae_nodes", ROOT / "adapters" / "comfyui" / "favae_nodes.py")
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)

    def load(vae, latent_format="as encoded"):
        vae.save_pretrained(tmp_path / "models" / "vae" / "ours" / "vae")
        node = nodes.NODE_CLASS_MAPPINGS["LoadFAVAE"]
        names, choices = (entry[0] for entry in node.INPUT_TYPES()["required"].values())
        assert names == ["ours/vae"] and latent_format in choices
        return getattr(node(), node.FUNCTION)(names[0], latent_format)[0]

    return SimpleNamespace(load=load, management=management, formats=formats)


@pytest.fixture(params=["favae", "asymmetric"])
def vae(request):
    if request.param == "favae":
        return AutoencoderKLFA(**TINY_FAVAE, scaling_factor=0.7, shift_factor=0.2).eval()
    kl = make_tiny_kl()
    kl.register_to_config(latents_mean=[0.1] * 6, latents_std=[2.0] * 6)
    return AsymmetricAutoencoderKLFA.from_autoencoder_kl(kl).eval()


@torch.no_grad()
def test_images_and_latents_have_comfyui_s_layout(comfy, vae):
    opened = comfy.load(vae)
    latents = opened.encode(PIXELS)
    assert torch.allclose(latents, vae.encode(PIXELS.movedim(-1, 1) * 2 - 1).latent_dist.mode(), atol=1e-5)
    images = opened.decode(latents)
    expected = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).movedim(1, -1)
    assert images.shape == PIXELS.shape and torch.allclose(images, expected, atol=1e-5)
    assert (opened.latent_channels, opened.downscale_ratio, opened.upscale_ratio) == (6, 4, 4)
    assert opened.spacial_compression_encode() == opened.spacial_compression_decode() == 4
    model, memory, whole = comfy.management.loaded[0]
    assert type(model) is type(vae) and memory > PIXELS[0].numel() * 4 and whole
    # what does not fit is cropped in the middle, and further channels are left out
    odd = F.pad(PIXELS, (0, 1, 1, 2, 2, 0))
    assert torch.allclose(opened.encode(odd), opened.encode(odd[:, 1:33, 1:49, :3]), atol=1e-5)
    assert torch.allclose(opened.decode(latents[:, :, None]), images)  # one frame


@torch.no_grad()
@pytest.mark.parametrize("name", ["SD15", "Flux", "Wan21"])
def test_a_latent_format_s_scaling_gives_normalized_latents(name, comfy, vae):
    from favae.normalization import normalize_latents

    opened = comfy.load(vae, name)
    latents = opened.encode(PIXELS)
    assert latents.ndim == (5 if name == "Wan21" else 4)
    normalized = comfy.formats[name]().process_in(latents)  # what samplers see
    raw = vae.encode(PIXELS.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert torch.allclose(normalized.flatten(2), normalize_latents(vae, raw).flatten(2), atol=1e-5)
    assert torch.allclose(opened.decode(latents), comfy.load(vae).decode(raw), atol=1e-5)


@torch.no_grad()
def test_flux2_s_latents_are_packed(comfy):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 16), "norm_num_groups": 4, "latent_channels": 6, "layers_per_block": 1}
    vae = AutoencoderKLFlux2(**blocks, **sizes).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    expected = vae.bn(F.pixel_unshuffle(vae.encode(PIXELS.movedim(-1, 1) * 2 - 1).latent_dist.mode(), 2))
    for name in ("as encoded", "Flux2"):
        opened = comfy.load(vae, name)
        latents = opened.encode(PIXELS)
        assert torch.allclose(latents, expected, atol=1e-4)
        assert (opened.latent_channels, opened.downscale_ratio) == (24, 8)
        assert opened.decode(latents).shape == PIXELS.shape
    # an autoencoder with statistics for each channel is packed for the format as well
    kl = AutoencoderKL(**blocks, **sizes, latents_mean=[0.5] * 6, latents_std=[2.0] * 6, scaling_factor=1.0).eval()
    opened = comfy.load(kl, "Flux2")
    raw = kl.encode(PIXELS.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert torch.allclose(opened.encode(PIXELS), F.pixel_unshuffle((raw - 0.5) / 2, 2), atol=1e-5)
    assert torch.allclose(opened.decode(opened.encode(PIXELS)), comfy.load(kl).decode(raw), atol=1e-5)


@torch.no_grad()
def test_tiles_when_asked_or_when_memory_runs_out(comfy, vae, monkeypatch):
    opened = comfy.load(vae)
    latents = opened.encode(PIXELS)
    whole, sizes = opened.decode(latents), []
    decoder = opened.first_stage_model.decoder
    decoder.register_forward_pre_hook(lambda module, arguments: sizes.append(tuple(arguments[0].shape[-2:])))
    tiled = opened.decode_tiled(latents, tile_x=6, tile_y=4, overlap=2)
    assert set(sizes) == {(6, 6)} and tiled.shape == whole.shape
    assert not opened.first_stage_model.use_tiling
    assert opened.encode_tiled(PIXELS, tile_x=24, tile_y=24, overlap=8).shape == latents.shape

    original, calls = opened.first_stage_model.decode, []

    def too_large_at_first(*arguments, **settings):
        calls.append(opened.first_stage_model.use_tiling)
        if len(calls) == 1:
            raise OutOfMemory
        return original(*arguments, **settings)

    monkeypatch.setattr(opened.first_stage_model, "decode", too_large_at_first)
    assert opened.decode(latents).shape == whole.shape and calls[:2] == [False, True]


@pytest.mark.parametrize(
    ("channels", "name", "expected"), [(8, "SD15", 6), (6, "SD3", 24), (24, "Flux2", 24)], ids=["", "4 x", "unpacked"]
)
def test_a_format_of_other_channels_is_refused(channels, name, expected, comfy):
    vae = AutoencoderKLFA(**{**TINY_FAVAE, "latent_channels": channels})
    with pytest.raises(ValueError, match=f"{channels} channels, {name} of {expected}"):
        comfy.load(vae, name)


@torch.no_grad()
@pytest.mark.parametrize("channels, shown", [(1, 3), (4, 4)])
def test_gray_and_opacity(channels, shown, comfy):
    vae = AutoencoderKLFA(**{**TINY_FAVAE, "in_channels": channels, "out_channels": channels}).eval()
    opened = comfy.load(vae)
    pixels = PIXELS.mean(-1, keepdim=True) if channels == 1 else F.pad(PIXELS, (0, 1), value=1.0)
    expected = vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    latents = opened.encode(PIXELS)
    assert torch.allclose(latents, expected, atol=1e-5)
    assert opened.decode(latents).shape == (*PIXELS.shape[:3], shown)


@torch.no_grad()
def test_autoencoders_behind_the_interfaces_of_other_pipelines(comfy):
    """What `swap_vae` has put into a pipeline of FLUX.2 or Qwen-Image, and saved with it."""
    from favae.models import PackedNormAutoencoder, SingleFrameAutoencoder

    inside = make_tiny_kl()
    raw = inside.encode(PIXELS.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    packed = PackedNormAutoencoder.around(inside, latent_channels=6, block_out_channels=(8, 8, 16)).eval()
    packed.bn.running_mean.normal_()
    opened = comfy.load(packed, "Flux2")
    assert torch.allclose(opened.encode(PIXELS), packed.bn(F.pixel_unshuffle(raw, 2)), atol=1e-4)
    assert opened.decode_tiled(opened.encode(PIXELS)).shape == PIXELS.shape

    statistics = {"z_dim": 6, "latents_mean": (1.0,) * 6, "latents_std": (2.0,) * 6, "scale_factor_spatial": 4}
    opened = comfy.load(SingleFrameAutoencoder.around(inside, **statistics).eval(), "Wan21")
    latents = comfy.formats["Wan21"]().process_in(opened.encode(PIXELS))
    assert torch.allclose(latents[:, :, 0], (raw - 1) / 2, atol=1e-5)
    assert torch.allclose(opened.decode(opened.encode(PIXELS)), comfy.load(inside).decode(raw), atol=1e-5)


@torch.no_grad()
def test_a_tiny_decoder_that_tiles_by_itself(comfy):
    sizes = {"block_out_channels": (8, 8, 8), "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1)}
    vae = AutoencoderTinyFA(**sizes, latent_channels=6, decoder_block_out_channels=(8, 8), sample_size=16).eval()
    vae.decoder.layers[-1].reset_parameters()  # zero in an untrained one
    opened = comfy.load(vae)
    latents = opened.encode(PIXELS)
    assert torch.allclose(latents, vae.encode(PIXELS.movedim(-1, 1) * 2 - 1).latents, atol=1e-5)
    whole, tiled = opened.decode(latents), opened.decode_tiled(latents, tile_x=8, tile_y=8)
    assert whole.shape == tiled.shape == PIXELS.shape and not torch.equal(whole, tiled)
    assert not opened.first_stage_model.use_tiling
