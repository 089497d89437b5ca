"""What diffusers does with its own autoencoders must work with ours: `AutoencoderKL`'s and `VQModel`'s contract."""

import accelerate
import pytest
import torch
from conftest import TINY_FAVAE, TINY_HYPERPRIOR, TINY_VQ, make_tiny_kl
from diffusers import AutoencoderKL, AutoModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from skimage import data

from favae import AsymmetricAutoencoderKLFA, AutoencoderKLFA, HyperpriorModelFA, TwoBranchAutoencoderKL, VQModelFA

TWO_BRANCHES = {name: value for name, value in TINY_FAVAE.items() if name != "shortcut"}
BUILDS = {
    "favae": lambda: AutoencoderKLFA(**TINY_FAVAE),
    "shortcut": lambda: AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": "overlapping", "wavelet": "db2"}),
    "two_branch": lambda: TwoBranchAutoencoderKL(**TWO_BRANCHES),
    "asymmetric": lambda: AsymmetricAutoencoderKLFA.from_autoencoder_kl(make_tiny_kl()),
    "vq": lambda: VQModelFA(**TINY_VQ),
    "attn": lambda: VQModelFA(**TINY_VQ, frequency_complement="attn"),
    "residual": lambda: VQModelFA(**{**TINY_VQ, "quantizer": "residual", "num_quantizers": 2}),
    "next_scale": lambda: VQModelFA(**TINY_VQ, quantizer="next_scale", scales=(1, 2, 4)),
    "next_band": lambda: VQModelFA(**TINY_VQ, quantizer="next_band", scales=(1, 2, 4)),
    "fsq": lambda: VQModelFA(**{**TINY_VQ, "quantizer": "fsq", "codebook_size": None, "fsq_levels": (5, 4, 3)}),
}
BUILDS["hyperprior"] = lambda: HyperpriorModelFA(**TINY_HYPERPRIOR)
KL = ["favae", "shortcut", "two_branch", "asymmetric"]
VQ = ["vq", "attn", "residual", "fsq"]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return BUILDS[name]().eval()


def photograph(height: int = 16, width: int = 16) -> torch.Tensor:
    pixels = torch.tensor(data.astronaut()[: 8 * height : 8, : 8 * width : 8].copy())
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def latents(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    output = model.encode(images)
    return output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latents


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=list(BUILDS))
def name(request) -> str:
    return request.param


def test_methods_take_what_the_base_takes_and_return_its_types(name):
    model, images = build(name), photograph()
    z = latents(model, images)
    expected = model.decode(z).sample
    if name in KL:
        assert isinstance(model, AutoencoderKL)
        assert type(model).encode is AutoencoderKL.encode and type(model).forward is AutoencoderKL.forward
        output = model.encode(images)
        assert isinstance(output, AutoencoderKLOutput) and output.latent_dist.kl().shape == (1,)
        assert torch.equal(model.encode(images, return_dict=False)[0].mode(), z)
        generator = torch.Generator().manual_seed(0)
        drawn = model(images, sample_posterior=True, generator=generator, return_dict=False)[0]
        assert drawn.shape == expected.shape and not torch.equal(drawn, expected)
        assert torch.equal(model.decode(z, return_dict=False, generator=generator)[0], expected)
    else:
        assert isinstance(model.encode(images), VQEncoderOutput)
        assert torch.equal(model.encode(images, return_dict=False)[0], z)
        codes = model.quantize(z)
        assert torch.equal(model.decode(codes.latents, force_not_quantize=True).sample, expected)
    if name in VQ:
        flat = codes.indices.flatten(1)  # as aMUSEd gives them
        again = model.decode(flat, force_not_quantize=True, shape=(1, 4, 4, 6), return_dict=False)
        assert torch.allclose(again[0], expected, atol=1e-6) and again[1] == 0
        assert model.decode(z).commit_loss.ndim == 0
    assert isinstance(model.decode(z), DecoderOutput) and torch.equal(model(images).sample, expected)
    assert torch.equal(model(images, return_dict=False)[0], expected)


@pytest.mark.parametrize("options", [{"max_shard_size": "50KB"}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_saved_in_any_way(name, options, tmp_path):
    model, images = build(name), photograph()
    expected = model(images).sample
    model.save_pretrained(tmp_path, **options)
    if "max_shard_size" in options:
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    variant = {"variant": options["variant"]} if "variant" in options else {}
    for low_cpu_mem_usage in (True, False):
        loaded = type(model).from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **variant)
        assert not loaded.training and torch.equal(loaded(images).sample, expected)
    half = type(model).from_pretrained(tmp_path, torch_dtype=torch.float16, **variant)
    assert half.dtype == torch.float16 and (half(images.half()).sample - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", KL)
def test_device_map(name, tmp_path):
    model, images = build(name), photograph()
    model.save_pretrained(tmp_path)
    for device_map in ("auto", {"": "cpu"}):
        loaded = type(model).from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(loaded(images).sample, model(images).sample)


@pytest.mark.parametrize("name", KL)
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading(name, kind):
    model, images = build(name), photograph()
    expected = model(images).sample
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    onloaded = []
    for group in {id(hook.group): hook.group for hook in offloading_hooks(model)}.values():
        onload = group.onload_
        group.onload_ = lambda onload=onload, group=group: onloaded.append(group) or onload()
    assert torch.equal(model.decode(latents(model, images)).sample, expected) and onloaded


def offloading_hooks(model):
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if hasattr(hook, "group"):
                yield hook


def test_offloading_of_the_whole_model(name):
    """The hook must also bring the weights for encode and decode, not only for forward."""
    model, images = build(name), photograph()
    expected = model(images).sample
    calls = []

    class Hook(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *arguments, **options):
            calls.append(module)
            return arguments, options

    accelerate.hooks.add_hook_to_module(model, Hook())
    z = latents(model, images)
    assert len(calls) == 1 and torch.equal(model.decode(z).sample, expected) and len(calls) == 2


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting(name, storage):
    model, images = build(name), photograph()
    expected = model(images).sample
    model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert storage in {parameter.dtype for parameter in model.parameters()}
    error = (model(images).sample - expected).abs().mean()
    assert 0 < error < (0.05 if storage == torch.bfloat16 else 0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_finite_on_any_input(name, dtype):
    model = build(name).to(dtype)
    flat = torch.ones(1, 3, 16, 16)
    for images in (photograph(), flat, -flat, 0 * flat, 1000 * torch.randn_like(flat)):
        output = model(images.to(dtype)).sample
        assert output.dtype == dtype and output.isfinite().all()


@pytest.mark.parametrize("name", KL)
def test_attention_processors(name):
    model, images = build(name), photograph()
    expected = model(images).sample
    model.set_attn_processor(model.attn_processors)
    model.set_default_attn_processor()
    assert torch.allclose(model(images).sample, expected, atol=1e-5)
    model.fuse_qkv_projections()
    assert all("Fused" in type(processor).__name__ for processor in model.attn_processors.values())
    assert torch.allclose(model(images).sample, expected, atol=1e-4)
    model.unfuse_qkv_projections()
    assert torch.allclose(model(images).sample, expected, atol=1e-5)


class RoundTrip(torch.nn.Module):
    """Images to what is decoded from their latents, or from the indices of a codebook."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        z = latents(self.model, images)
        return self.model.decode(self.model.quantize(z).indices if isinstance(self.model, VQModelFA) else z).sample


@pytest.mark.parametrize("name", ["shortcut", "attn", "residual"])
def test_compiles_without_graph_breaks(name):
    round_trip, images = RoundTrip(build(name)), photograph()
    torch._dynamo.reset()
    compiled = torch.compile(round_trip, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images), round_trip(images), atol=1e-5)


@pytest.mark.parametrize("name", ["shortcut", "asymmetric", "vq", "fsq", "hyperprior"])
def test_exports(name):
    round_trip, images = RoundTrip(build(name)), photograph()
    program = torch.export.export(round_trip, (images,))
    assert torch.allclose(program.module()(images), round_trip(images), atol=1e-5)


@pytest.mark.parametrize("name", KL)
def test_slicing(name):
    model = build(name)
    images = torch.cat([photograph(), -photograph(), 0.5 * photograph()])
    expected = model(images).sample
    model.enable_slicing()
    assert torch.allclose(model(images).sample, expected, atol=1e-5)


@pytest.mark.parametrize("name", KL)
@pytest.mark.parametrize("size", [(20, 16), (36, 24), (16, 44), (40, 12)])
def test_tiles_of_any_size_that_is_larger(name, size):
    model, images = build(name), photograph(*size)
    model.enable_tiling()
    z = latents(model, images)
    assert z.shape == (1, 6, size[0] // 4, size[1] // 4)
    assert model.decode(z).sample.shape == images.shape
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(photograph(size[0] + 2, size[1]))
    model.disable_tiling()
    small = photograph()
    whole = model(small).sample
    model.enable_tiling()
    assert torch.equal(model(small).sample, whole)  # one tile is no tiling


def test_tiles_have_the_size_that_was_asked_for():
    model = AutoencoderKLFA(**{**TINY_FAVAE, "sample_size": [64, 64]}).eval()
    sizes = []
    for part in (model.encoder, model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    model.enable_tiling()
    model.tile_sample_min_size, model.tile_latent_min_size = 18, 5  # 16 px: whole latents
    images = photograph(40, 28)
    z = latents(model, images)
    assert len(sizes) == 3 * 2 and set(sizes) == {(16, 16)}
    assert torch.equal(model.tiled_encode(images).latent_dist.mean, z)
    sizes.clear()
    model.decode(z)
    assert len(sizes) == 3 * 2 and set(sizes) == {(5, 5)}
    model.tile_overlap_factor = 1.0
    with pytest.raises(ValueError, match="cannot overlap by 5"):
        model.decode(z)
    assert AutoencoderKLFA(**{**TINY_FAVAE, "sample_size": 2}).tile_latent_min_size == 1


@pytest.mark.parametrize("shortcut", ["patches", "overlapping"])
def test_tiles_leave_no_seams(shortcut):
    """Mean difference to the untiled decode of a photograph: below 1% of the range, with a trained network."""
    torch.manual_seed(0)
    model = AutoencoderKLFA(**{**TINY_FAVAE, "shortcut": shortcut}).train()
    photo = torch.tensor(data.astronaut().copy()).permute(2, 0, 1)[None, :, :252, :200] / 127.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    with torch.enable_grad():
        for step in range(60):
            top, left = (37 * step) % 180, (53 * step) % 130
            crop = photo[..., top : top + 64, left : left + 64]
            (model(crop).sample - crop).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    whole, z = model(photo).sample, latents(model, photo)
    linear = model.decoder.shortcut(model.post_quant_conv(z))
    assert (whole - linear).abs().mean() > 0.05  # the networks do a part of it
    model.tile_sample_min_size, model.tile_latent_min_size = 64, 16
    model.enable_tiling()
    tiled = model.decode(z).sample
    assert 0 < (tiled - whole).abs().mean() < 0.01 * 2
    if shortcut == "patches":  # the encoders are the same, trained to other weights
        assert (latents(model, photo) - z).abs().mean() < 0.05 * z.std()


@pytest.mark.parametrize("name", ["favae", "two_branch", "asymmetric", "vq"])
def test_auto_model_with_the_remote_code_file(name, tmp_path):
    model, images = build(name), photograph()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), trust_remote_code=True)
    assert type(loaded).__name__ == type(model).__name__
    assert torch.equal(loaded(images).sample, model(images).sample)
