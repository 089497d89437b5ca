"""swap_vae in each pipeline: tiny random components, a real call, the right image size; and every refusal."""

import logging

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY_VQ
from tiny_pipelines import (
    PIPELINES,
    STATISTICS,
    dit,
    flux,
    ours,
    run,
    sana,
    sd3,
    stable_diffusion,
    stock,
    xl,
)

from favae import AsymmetricAutoencoderKLFA, VQModelFA
from favae.adapters.pipelines import fold_latent_statistics, swap_vae


@pytest.mark.parametrize("octaves", [2, 3])
@pytest.mark.parametrize("build", PIPELINES, ids=lambda build: build.__name__)
def test_a_swapped_autoencoder_decodes_the_same_latents(build, octaves):
    """The latents' grid stays, the image is the new factor's multiple of it, and it is what the new one decodes."""
    pipe, call = build(stock())
    pipe.set_progress_bar_config(disable=True)
    new = ours(octaves=octaves, scaling_factor=0.5)
    assert swap_vae(pipe, new) is pipe and pipe.vae is new
    decoded = []
    decode = new.decode

    def record(latents, *arguments, **options):
        decoded.append((latents, decode(latents, *arguments, **options)))
        return decoded[-1][1]

    new.decode = record
    images = run(build, pipe, call, octaves)
    (latents, output), factor = decoded[0], 2 ** (octaves - 1)
    assert latents.shape[1] == 4 and images.shape == (1, factor * latents.shape[2], factor * latents.shape[3], 3)
    if build not in (dit, flux):  # which give no latents, or packed ones
        assert torch.allclose(latents, run(build, pipe, call, octaves, "latent") / 0.5, atol=1e-5)
    if "image" not in call and build is not sana:
        assert latents.shape[2:] == (8, 8)
    image = (output[0] if isinstance(output, tuple) else output.sample) / 2 + 0.5
    assert np.allclose(images, image.clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5) and images.std() > 1e-3


@pytest.mark.parametrize("octaves", [2, 3])
def test_a_swapped_sana_is_loaded_again(octaves, tmp_path, caplog):
    """Whose constructor reads the ratio from a setting of its own autoencoder."""
    pipe, _ = sana(stock())
    with caplog.at_level(logging.WARNING):
        swap_vae(pipe, ours(octaves=octaves)).save_pretrained(tmp_path / "pipe")
    assert "swap again" not in caplog.text
    again = diffusers.SanaPipeline.from_pretrained(tmp_path / "pipe", tokenizer=None, text_encoder=None)
    assert again.vae_scale_factor == pipe.vae_scale_factor == 2 ** (octaves - 1)


def test_the_decoder_of_the_same_latents_needs_no_warning(caplog):
    pipe, _ = stable_diffusion(stock())
    new = AsymmetricAutoencoderKLFA.from_autoencoder_kl(pipe.vae)
    with caplog.at_level(logging.WARNING):
        swap_vae(pipe, new)
    assert not caplog.records and pipe.vae.config.scaling_factor == stock().config.scaling_factor
    swap_vae(pipe, ours(octaves=2))
    assert "trained on its latents" in caplog.text


def test_device_and_type_are_the_old_ones():
    pipe, _ = stable_diffusion(stock().to(torch.bfloat16))
    assert swap_vae(pipe, ours()).vae.dtype == torch.bfloat16 and not pipe.vae.training


@pytest.mark.parametrize(
    "build, vae, message",
    [
        (
            sd3,
            lambda: ours(channels=6),
            "latent_channels=4.* 6; .*from_autoencoder_kl",
        ),
        (dit, lambda: ours(**STATISTICS), "does not apply latents_mean; fold"),
        (stable_diffusion, lambda: ours(shift_factor=0.1), "does not apply shift_factor; fold_latent_statistics"),
        (stable_diffusion, lambda: ours(out_channels=1), "out_channels=3.* 1;"),
        (xl, lambda: stock(use_post_quant_conv=False), "upcasts by post_quant_conv"),
        (flux, lambda: diffusers.VQModel(), "takes an AutoencoderKL .* not a VQModel"),
        (stable_diffusion, lambda: VQModelFA(**TINY_VQ), "takes an AutoencoderKL .* not a VQModelFA"),
    ],
)
def test_what_cannot_work_is_one_line(build, vae, message):
    pipe, _ = build(stock())
    before = pipe.vae
    with pytest.raises(ValueError, match=message) as refused:
        swap_vae(pipe, vae())
    assert "\n" not in str(refused.value) and pipe.vae is before


def test_small_autoencoders_are_taken():
    """Whose latents are normalized already."""
    pipe, call = xl(stock())
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipe.set_progress_bar_config(disable=True)
    assert run(xl, swap_vae(pipe, tiny), call, octaves=2).shape == (1, 16, 16, 3)
    assert swap_vae(pipe, ours()).vae_scale_factor == 4


def test_latents_that_float16_cannot_hold_are_still_the_same(caplog):
    """SDXL's autoencoder is not finite in float16."""
    old = stock(**STATISTICS)
    old.encoder.conv_out.weight.data *= 1e5
    new = AsymmetricAutoencoderKLFA.from_autoencoder_kl(old)
    new.register_to_config(latents_mean=None, latents_std=None)
    pipe, _ = xl(old)
    torch.nn.Module.half(old)
    assert swap_vae(pipe, new).vae.config.latents_mean == STATISTICS["latents_mean"] and not caplog.records, caplog.text
    assert {parameter.dtype for model in (old, new) for parameter in model.parameters()} == {torch.float16}


def test_autoencoders_of_videos_are_refused():
    old = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    pipe = diffusers.StableVideoDiffusionPipeline(old, None, None, None, None)
    with pytest.raises(ValueError, match="StableVideoDiffusionPipeline is for videos"):
        swap_vae(pipe, stock())


def test_other_pipelines_are_refused():
    pipe = diffusers.DDPMPipeline(None, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="DDPMPipeline"):
        swap_vae(pipe, stock())


def test_statistics_are_kept_where_they_are_applied():
    pipe, _ = xl(stock())
    assert swap_vae(pipe, ours(**STATISTICS)).vae.config.latents_std == STATISTICS["latents_std"]
    pipe, _ = sd3(stock())
    assert swap_vae(pipe, stock(shift_factor=None)).vae.config.shift_factor == 0.0


def test_the_normalization_belongs_to_the_generator(caplog):
    """A new decoder of the same latents takes it over, in whatever form; other encoders keep their own."""
    old = stock(**STATISTICS, scaling_factor=0.5)
    new = AsymmetricAutoencoderKLFA.from_autoencoder_kl(stock())
    pipe, _ = xl(old)
    with caplog.at_level(logging.WARNING):
        config = swap_vae(pipe, new).vae.config
        assert (config.latents_mean, config.latents_std, config.scaling_factor) == (*STATISTICS.values(), 0.5)
        folded = fold_latent_statistics(AsymmetricAutoencoderKLFA.from_autoencoder_kl(old))
        assert swap_vae(pipe, folded).vae.config.latents_mean is None
    assert not caplog.records
    swap_vae(pipe, fold_latent_statistics(AsymmetricAutoencoderKLFA.from_autoencoder_kl(stock())))  # of another scale
    assert "trained on its latents" in caplog.text


@pytest.mark.parametrize("offload", ["enable_sequential_cpu_offload", "vae.enable_group_offload"])
def test_offloaded_pipelines_are_refused(offload):
    pipe, _ = stable_diffusion(stock())
    cpu = torch.device("cpu")
    if offload == "enable_sequential_cpu_offload":
        pipe.enable_sequential_cpu_offload(device=cpu)
    else:
        pipe.vae.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    new = ours()
    with pytest.raises(ValueError, match="is offloaded, cast or spread"):
        swap_vae(pipe, new)
    assert {parameter.device.type for parameter in new.parameters()} == {"cpu"}


def test_tiling_and_slicing_stay_on():
    pipe, _ = stable_diffusion(stock())
    pipe.vae.enable_tiling()
    assert swap_vae(pipe, ours()).vae.use_tiling and not pipe.vae.use_slicing


def test_from_pipe_wants_the_autoencoder_named():
    pipe, _ = stable_diffusion(ours())
    with pytest.raises(ValueError, match="vae"):
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    assert other.vae is pipe.vae
