"""swap_vae in each pipeline: tiny random components, a real call, the right image size; and every refusal."""

import logging
import os
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from favae import AutoencoderKLFA
from favae.adapters.diffusers import fold_latent_statistics, swap_vae

STEPS = {"num_inference_steps": 1}


def stock(channels: int = 4, octaves: int = 2, **config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * octaves,
        up_block_types=("UpDecoderBlock2D",) * octaves,
        block_out_channels=(8,) * octaves,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **{"shift_factor": 0.0, **config},
    ).eval()


def unet(channels: int = 4, inputs: int | None = None, **config):
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=inputs or channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    )


def embeds(length: int = 3, width: int = 16) -> torch.Tensor:
    return torch.randn(1, length, width)


def dit(vae):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_num_groups=2,
    )
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    return pipe, {"class_labels": [0], "guidance_scale": 1.0}


def stable_diffusion(vae, kind=diffusers.StableDiffusionPipeline, inputs=None):
    pipe = kind(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet(inputs=inputs),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe, {"prompt_embeds": embeds(), "guidance_scale": 1.0}


def image(size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def image_to_image(vae):
    pipe, call = stable_diffusion(vae, diffusers.StableDiffusionImg2ImgPipeline)
    return pipe, {**call, "image": image(), "strength": 1.0}


def inpaint(vae):
    pipe, call = stable_diffusion(vae, diffusers.StableDiffusionInpaintPipeline, inputs=9)
    return pipe, {**call, "image": image(), "mask_image": image().convert("L"), "strength": 1.0}


def xl(vae):
    time_ids = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet(**time_ids, projection_class_embeddings_input_dim=6 * 4 + 16),
        scheduler=diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    return pipe, {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 16), "guidance_scale": 1.0}


def sd3(vae):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=16,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
    )
    return pipe, {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 16), "guidance_scale": 1.0}


def flux(vae):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )
    return pipe, {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 16)}


def pixart(vae):
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        norm_num_groups=1,
    )
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=diffusers.DDIMScheduler()
    )
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": torch.ones(1, 3), "guidance_scale": 1.0}
    return pipe, {**call, "negative_prompt": None, "use_resolution_binning": False}


def lumina2(vae):
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
    )
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": torch.ones(1, 3, dtype=torch.bool)}
    return pipe, {**call, "guidance_scale": 1.0}


def sana(vae):
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    deep = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
    )
    pipe = diffusers.SanaPipeline(None, None, deep, transformer, diffusers.FlowMatchEulerDiscreteScheduler())
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": torch.ones(1, 3), "guidance_scale": 1.0}
    return pipe, {**call, "negative_prompt": None, "use_resolution_binning": False}


PIPELINES = (dit, stable_diffusion, image_to_image, inpaint, xl, sd3, flux, pixart, lumina2, sana)


def ours(channels: int = 4, octaves: int = 3, **config) -> AutoencoderKLFA:
    torch.manual_seed(0)
    return AutoencoderKLFA(
        block_out_channels=(8,) * octaves,
        high_block_out_channels=None,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        high_latent_channels=1,
        sample_size=16,
        **config,
    ).eval()


def run(build, pipe, call: dict, octaves: int, output_type: str = "np"):
    if "image" not in call and build is not dit:
        size = 32 if build is sana else 8 * 2 ** (octaves - 1)  # Sana takes multiples of 32 only
        call = {**call, "height": size, "width": size}
    return pipe(**call, **STEPS, output_type=output_type, generator=torch.Generator().manual_seed(0)).images


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


def test_the_decoder_of_the_same_latents_needs_no_warning(caplog):
    pipe, _ = stable_diffusion(stock())
    new = AutoencoderKLFA.from_autoencoder_kl(pipe.vae)
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
            "generates 4 latent channels, the AutoencoderKLFA has 6: .*from_autoencoder_kl",
        ),
        (dit, lambda: ours(latents_mean=[0.0] * 4, latents_std=[1.0] * 4), "does not apply latents_mean .*; fold_lat"),
        (stable_diffusion, lambda: ours(shift_factor=0.1), "does not apply shift_factor=0.1; fold_latent_statistics"),
        (stable_diffusion, lambda: ours(out_channels=1), "autoencoder of out_channels=3, the AutoencoderKLFA has 1"),
        (xl, lambda: stock(use_post_quant_conv=False), "upcasts by post_quant_conv"),
        (flux, lambda: diffusers.AutoencoderTiny(), "takes an AutoencoderKL .* not a AutoencoderTiny"),
    ],
)
def test_what_cannot_work_is_one_line(build, vae, message):
    pipe, _ = build(stock())
    before = pipe.vae
    with pytest.raises(ValueError, match=message) as refused:
        swap_vae(pipe, vae())
    assert "\n" not in str(refused.value) and pipe.vae is before


def test_other_pipelines_are_refused():
    pipe = diffusers.DDPMPipeline(None, diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="a DDPMPipeline is no pipeline whose autoencoder can be swapped"):
        swap_vae(pipe, stock())


def test_statistics_are_kept_where_they_are_applied():
    pipe, _ = xl(stock())
    assert swap_vae(pipe, ours(**STATISTICS)).vae.config.latents_std == [2.0] * 4
    pipe, _ = sd3(stock())
    assert swap_vae(pipe, stock(shift_factor=None)).vae.config.shift_factor == 0.0


def test_the_normalisation_belongs_to_the_generator(caplog):
    """A new decoder of the same latents takes it over, in whatever form; other encoders keep their own."""
    old = stock(**STATISTICS, scaling_factor=0.5)
    new = AutoencoderKLFA.from_autoencoder_kl(stock())
    pipe, _ = xl(old)
    with caplog.at_level(logging.WARNING):
        config = swap_vae(pipe, new).vae.config
        assert (config.latents_mean, config.latents_std, config.scaling_factor) == ([0.5] * 4, [2.0] * 4, 0.5)
        folded = fold_latent_statistics(AutoencoderKLFA.from_autoencoder_kl(old))
        assert swap_vae(pipe, folded).vae.config.latents_mean is None
    assert not caplog.records
    swap_vae(pipe, fold_latent_statistics(AutoencoderKLFA.from_autoencoder_kl(stock())))  # of another scale
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
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
    assert other.vae is pipe.vae


STATISTICS = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
CASES = {
    "same factor": lambda: ours(octaves=2),
    "another factor": lambda: ours(octaves=3),
    "`latents_mean`, `latents_std`": lambda: ours(octaves=2, **STATISTICS),
    "`shift_factor`": lambda: ours(octaves=2, shift_factor=0.1),
    "folded statistics": lambda: fold_latent_statistics(ours(octaves=2, **STATISTICS)),
    "other latent channels": lambda: ours(channels=6, octaves=2),
}
BINNING = "use_resolution_binning=False"
REMEDIES = ("fold_latent_statistics", "from_autoencoder_kl")
README = Path(__file__).resolve().parents[2] / "README.md"
MARKS = ("<!-- pipelines -->\n", "<!-- end of pipelines -->")


def outcome(build, case: str, caplog) -> str:
    pipe, call = build(stock())
    pipe.set_progress_bar_config(disable=True)
    vae = CASES[case]()
    octaves = len(vae.config.block_out_channels)
    caplog.clear()
    try:
        swap_vae(pipe, vae)
    except ValueError as error:
        (remedy,) = (remedy for remedy in REMEDIES if remedy in str(error))
        return f"refused: `{remedy}`"
    images = run(build, pipe, call, octaves)
    assert np.isfinite(images).all() and images.std() > 1e-3
    return f"works with `{BINNING}`" if BINNING in caplog.text else "works"


def test_the_table_in_the_readme(caplog):
    """FAVAE_WRITE_TABLES=1 writes it."""
    lines = ["| pipeline | " + " | ".join(CASES) + " |", "|" + "---|" * (len(CASES) + 1)]
    for build in PIPELINES:
        name = type(build(stock())[0]).__name__
        lines.append(f"| `{name}` | " + " | ".join(outcome(build, case, caplog) for case in CASES) + " |")
    table = "\n".join(lines) + "\n"
    before, after = README.read_text().split(MARKS[0])
    old, after = after.split(MARKS[1])
    if os.environ.get("FAVAE_WRITE_TABLES"):
        README.write_text(before + MARKS[0] + table + MARKS[1] + after)
    else:
        assert old == table
