import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import checkpointed_blocks, command, command_error
from safetensors.torch import save_file

from favae import AutoencoderTinyFA
from favae.adapters.taesd import autoencoder_from_taesd
from favae.autoencoders import decode, encode, load_autoencoder, measure_budget
from favae.errors import CheckpointError
from favae.models.pipeline_autoencoders import PackedNormAutoencoder, SingleFrameAutoencoder

TINY = {
    "latent_channels": 6,
    "block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 1),
    "decoder_block_out_channels": (8, 8),
    "num_decoder_blocks": (1, 1),
}
PIXELS = {"wavelet_levels": 0, "decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1)}
TWO = {"wavelet_levels": 2, "decoder_block_out_channels": (8,), "num_decoder_blocks": (2,)}


def make(**settings) -> AutoencoderTinyFA:
    """A tiny model that decodes to something."""
    model = AutoencoderTinyFA(**TINY | settings).eval()
    for layers in filter(None, (model.decoder.layers, model.decoder.high_layers)):
        layers[-1].reset_parameters()
    return model


@pytest.mark.parametrize("changes", [{}, PIXELS, TWO, {"high_block_out_channels": (4, 4)}])
def test_an_untrained_decoder_gives_gray_images(changes):
    model = AutoencoderTinyFA(**TINY | changes)
    assert model.decode(torch.randn(1, 6, 4, 4)).sample.abs().max() < 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PIXELS,
        TWO,
        {"wavelet": "bior4.4"},
        {"high_block_out_channels": (4, 4)},
        {"latent_pooling": True},
        {"in_channels": 1, "out_channels": 1},
    ],
)
def test_shapes_and_saving(changes, tmp_path):
    model = make(**changes)
    images = torch.rand(2, model.config.in_channels, 32, 24) * 2 - 1
    latents = model.encode(images).latents
    assert latents.shape == (2, 6, 8, 6) and model.decode(latents).sample.shape == images.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoencoderTinyFA.from_pretrained(tmp_path).decode(latents).sample, model.decode(latents).sample)


@pytest.mark.parametrize("adapter", [None, PackedNormAutoencoder, SingleFrameAutoencoder])
def test_offloaded_weights_are_fetched(adapter):
    """As `enable_model_cpu_offload` of a pipeline does, whose hooks are of `forward`."""
    fetched = []

    class Fetches(ModelHook):
        def pre_forward(self, module, *arguments, **options):
            fetched.append(module)
            return arguments, options

    model, images = make(), torch.rand(1, 3, 16, 16)
    if adapter is not None:
        model = adapter({**model.config, "_class_name": "AutoencoderTinyFA"})
    if adapter is SingleFrameAutoencoder:
        images = images.unsqueeze(2)
    add_hook_to_module(model, Fetches())
    model._hf_hook.execution_device = None
    latents = model.encode(images).latents
    assert fetched == [model]
    model.decode(latents)
    assert fetched == [model, model]


@pytest.mark.parametrize("adapter", [None, PackedNormAutoencoder, SingleFrameAutoencoder])
def test_blocks_are_offloaded_in_groups_that_their_methods_fetch(adapter):
    model = make()
    if adapter is not None:
        model = adapter({**model.config, "_class_name": "AutoencoderTinyFA"})
    cpu = torch.device("cpu")
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    fetched = [name for name, part in model.named_modules() if hasattr(part, "_diffusers_hook")]
    assert {"encoder", "decoder"} <= {part for name in fetched for part in name.split(".")}


class OwnAutoencoder(AutoencoderTinyFA):
    """A class that neither favae nor diffusers knows."""


@pytest.mark.parametrize("adapter", [PackedNormAutoencoder, SingleFrameAutoencoder])
def test_an_autoencoder_of_an_own_class_is_adapted(adapter):
    model = OwnAutoencoder(**TINY)
    adapted = adapter({**model.config, "_class_name": "OwnAutoencoder"})
    assert type(adapted.autoencoder) is OwnAutoencoder


def test_each_octave_left_to_the_wavelet_saves_work():
    flops = [measure_budget(AutoencoderTinyFA(**TINY | changes), 32).flops for changes in (PIXELS, {}, TWO)]
    assert flops[0] > flops[1] > flops[2]


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"num_decoder_blocks": (1,)}, "num_decoder_blocks"),
        ({"decoder_block_out_channels": (8, 8, 8)}, "decoder_block_out_channels"),
        ({**PIXELS, "high_block_out_channels": (8, 8, 8)}, "high_block_out_channels"),
        ({"wavelet_levels": 3, "decoder_block_out_channels": (), "num_decoder_blocks": ()}, "wavelet_levels .* 3"),
        ({"wavelet_levels": 4}, "wavelet_levels .* got 4"),
    ],
)
def test_settings_that_do_not_fit(changes, named):
    with pytest.raises(ValueError, match=named):
        AutoencoderTinyFA(**TINY | changes)


def test_slices_and_tiles_without_pooling_are_nearly_the_whole():
    model = make(sample_size=64)
    images = torch.rand(2, 3, 96, 80) * 2 - 1
    with torch.no_grad():
        whole = decode(model, encode(model, images))
        model.enable_slicing()
        assert torch.allclose(decode(model, encode(model, images)), whole, atol=1e-5)
        model.enable_tiling()
        tiled = decode(model, encode(model, images))
    assert tiled.shape == whole.shape and (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_images_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        AutoencoderTinyFA(**TINY).encode(torch.zeros(1, 3, 30, 32))


def test_gradient_checkpointing_changes_nothing():
    model, latents = make(), torch.randn(1, 6, 4, 4)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model.decode(latents).sample.square().mean().backward()
        return model.decoder.layers[1].weight.grad.clone()

    plain = gradient()
    blocks = checkpointed_blocks(model)
    assert torch.allclose(gradient(), plain)
    assert blocks == list(model.decoder.layers)[: len(blocks)] and len(blocks) > 1


@pytest.mark.parametrize("pooling", [False, True])
def test_files_of_taesd(pooling, tmp_path):
    model = make(
        latent_channels=5,
        num_encoder_blocks=(1, 3, 3, 3),
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_decoder_blocks=(3, 3, 3, 1),
        wavelet_levels=0,
        latent_pooling=pooling,
    )
    files = []
    for part in ("encoder", "decoder"):
        state = getattr(model, part).layers.state_dict()
        files.append(tmp_path / f"{part}.safetensors")
        save_file({name: value.half() for name, value in state.items()}, files[-1])
    opened, images = autoencoder_from_taesd(*files), torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(decode(opened, encode(opened, images)), decode(model, encode(model, images)), atol=1e-2)
    if pooling:  # TAESD's own files are of torch.save
        files[1].unlink()
        files[1] = files[1].with_suffix(".pth")
        torch.save(model.decoder.layers.half().state_dict(), files[1])
    command("convert", tmp_path, tmp_path / "converted", "--format", "taesd")
    converted = load_autoencoder(str(tmp_path / "converted"))
    assert torch.equal(decode(converted, encode(converted, images)), decode(opened, encode(opened, images)))
    assert "one file *encoder.safetensors" in command_error("convert", files[0], tmp_path / "new", "--format", "taesd")
    for broken in (files[::-1], (files[0], files[0])):
        with pytest.raises(CheckpointError):
            autoencoder_from_taesd(*broken)
