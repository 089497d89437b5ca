"""swap_vae where latents are packed and batch-normalized, or videos of one frame, and in modular pipelines."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ModularPipeline
from diffusers.modular_pipelines import FluxAutoBlocks
from tiny_pipelines import STEPS, embeds, flux, image, ours, stock

from favae import AutoencoderTinyFA, PackedNormAutoencoder, SingleFrameAutoencoder
from favae.adapters.pipelines import fold_latent_statistics, swap_vae

C = 4
STATISTICS = {"latents_mean": [0.5, 0.0, 0.0, -0.5], "latents_std": [2.0, 1.0, 1.0, 3.0]}
SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler


def flux2_autoencoder() -> diffusers.AutoencoderKLFlux2:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=C,
        sample_size=16,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae.eval()


def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=4 * C,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    pipe = diffusers.Flux2KleinPipeline(SCHEDULER(), flux2_autoencoder(), None, None, transformer, is_distilled=True)
    return pipe, {"prompt_embeds": embeds(), "height": 16, "width": 16}


def qwen():
    torch.manual_seed(1)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * C,
        out_channels=C,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=C, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **STATISTICS
    )
    pipe = diffusers.QwenImagePipeline(SCHEDULER(), vae.eval(), None, None, transformer)
    return pipe, {"prompt_embeds": embeds(), "true_cfg_scale": 1.0, "height": 16, "width": 16}


def wan():
    torch.manual_seed(1)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=C,
        out_channels=C,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=C,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        scale_factor_spatial=2,
        scale_factor_temporal=2,
        **STATISTICS,
    )
    pipe = diffusers.WanPipeline(None, None, vae.eval(), SCHEDULER(), transformer)
    call = {"prompt_embeds": embeds(), "guidance_scale": 1.0, "height": 16, "width": 16, "num_frames": 1}
    return pipe, call


def generate(pipe, call: dict) -> np.ndarray:
    """The images of a pipeline, (1, H, W, 3), also if it calls them a video."""
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**call, **STEPS, output_type="np", generator=torch.Generator().manual_seed(0))
    return output.images if hasattr(output, "images") else output.frames[:, 0]


def listen(vae) -> list[torch.Tensor]:
    """The latents that this autoencoder decodes from now on."""
    decoded, decode = [], vae.decode

    def record(latents, *arguments, **options):
        decoded.append(latents)
        return decode(latents, *arguments, **options)

    vae.decode = record
    return decoded


def with_the_encoder_of(vae: diffusers.AutoencoderKLFlux2) -> AutoencoderKL:
    """Another decoder for the same latents."""
    new = stock(C)
    for part in ("encoder", "quant_conv"):
        getattr(new, part).load_state_dict(getattr(vae, part).state_dict())
    return new


@pytest.mark.parametrize("build", [flux2, qwen, wan], ids=lambda build: build.__name__)
@pytest.mark.parametrize("octaves", [2, 3])
def test_the_autoencoder_inside_decodes_plain_latents(build, octaves, tmp_path):
    pipe, call = build()
    factor = 2 ** (octaves - 1)
    call = {**call, "height": 8 * factor, "width": 8 * factor}
    new = fold_latent_statistics(ours(C, octaves=octaves, **STATISTICS))
    decoded = listen(new)
    swap_vae(pipe, new)
    assert pipe.vae.autoencoder is new and isinstance(pipe.vae, (PackedNormAutoencoder, SingleFrameAutoencoder))
    images = generate(pipe, call)
    assert decoded[0].shape == (1, C, 8, 8) and images.shape == (1, 8 * factor, 8 * factor, 3) and images.std() > 1e-3

    # saved and loaded it stays
    del new.decode
    pipe.save_pretrained(tmp_path)
    absent = {"text_encoder": None, "tokenizer": None}
    again = type(pipe).from_pretrained(tmp_path, **absent, **({"transformer_2": None} if build is wan else {}))
    assert type(again.vae) is type(pipe.vae) and np.allclose(generate(again, call), images, atol=1e-5)
    assert swap_vae(again, ours(C, octaves=2)).vae.autoencoder.config.latent_channels == C  # and can be swapped again


@pytest.mark.parametrize("build", [qwen, wan], ids=lambda build: build.__name__)
def test_videos_of_one_frame_have_the_statistics_of_the_autoencoder(build):
    pipe, call = build()
    new = ours(C, octaves=2, scaling_factor=0.5, **STATISTICS)
    decoded = listen(new)
    generate(swap_vae(pipe, new), call)
    plain = ours(C, octaves=2, scaling_factor=1.0)
    reference = listen(plain)
    generate(swap_vae(build()[0], plain), call)
    mean, std = (torch.tensor(value)[:, None, None] for value in STATISTICS.values())
    assert torch.allclose(decoded[0], reference[0] * std / 0.5 + mean, atol=1e-4)


def test_packed_statistics_stay_where_the_latents_are_the_same(caplog):
    """They differ between the latents that are packed into one, so that no channel has one mean."""
    pipe, call = flux2()
    old = pipe.vae
    expected = listen(old)
    generate(pipe, {**call, "image": image(64)})
    new = with_the_encoder_of(old)
    decoded = listen(new)
    generate(swap_vae(pipe, new), {**call, "image": image(64)})
    assert torch.allclose(decoded[0], expected[0], atol=1e-5)
    assert torch.equal(pipe.vae.bn.running_mean, old.bn.running_mean) and "favae" not in str(caplog.record_tuples)
    narrow = diffusers.AutoencoderKLFlux2.from_config(old.config, decoder_block_out_channels=(4, 4))
    assert swap_vae(flux2()[0], narrow).vae is narrow


def test_decoders_of_normalized_latents_need_no_batch_norm(caplog):
    """As TAEF2 and its students: they decode what the generator gives."""
    pipe, call = flux2()
    uniform = {"latents_mean": [0.5] * C, "latents_std": [2.0] * C}
    pipe.vae.bn.running_mean.fill_(0.5)
    pipe.vae.bn.running_var.fill_(4.0 - pipe.vae.config.batch_norm_eps)
    expected = generate(pipe, call)
    new = stock(C)
    new.load_state_dict({name: value for name, value in pipe.vae.state_dict().items() if "bn" not in name})
    new.register_to_config(scaling_factor=1.0, **uniform)
    assert np.allclose(generate(swap_vae(pipe, fold_latent_statistics(new)), call), expected, atol=1e-4)
    assert "favae" not in str(caplog.record_tuples)
    tiny = AutoencoderTinyFA(
        latent_channels=C,
        block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 1),
        wavelet_levels=0,
    )
    assert generate(swap_vae(pipe, tiny), call).shape == (1, 16, 16, 3)
    assert "AutoencoderTinyFA has other latents" in caplog.text and "% of their std" in caplog.text


def test_what_packed_and_video_pipelines_refuse():
    with pytest.raises(ValueError, match="Flux2Klein.*does not apply latents_mean; fold_latent_statistics"):
        swap_vae(flux2()[0], ours(C, octaves=2, **STATISTICS))
    with pytest.raises(ValueError, match="AutoencoderKLFlux2 cannot be folded"):
        fold_latent_statistics(flux2_autoencoder())
    with pytest.raises(ValueError, match="QwenImagePipeline needs an autoencoder of latent_channels=4.* 6"):
        swap_vae(qwen()[0], ours(6, octaves=2))
    pipe, call = wan()
    swap_vae(pipe, ours(C, octaves=2))
    with pytest.raises(ValueError, match="num_frames=1"):
        generate(pipe, {**call, "num_frames": 5})


def test_modular_pipelines(tmp_path, caplog):
    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    with pytest.raises(ValueError, match="FluxModularPipeline has no autoencoder"):
        swap_vae(pipe, ours())
    parts, call = flux(stock())
    pipe.update_components(transformer=parts.transformer, scheduler=parts.scheduler, vae=parts.vae)
    factor = pipe.image_processor.config.vae_scale_factor
    caplog.clear()
    new = ours(octaves=3, scaling_factor=0.5)
    assert swap_vae(pipe, new).vae is new and pipe.vae_scale_factor == 4
    assert pipe.image_processor.config.vae_scale_factor == 2 * factor and "swap again" in caplog.text
    pipe.set_progress_bar_config(disable=True)
    images = pipe(**call, **STEPS, height=32, width=32, output_type="np", output="images")
    assert images.shape == (1, 32, 32, 3)
    pipe.save_pretrained(str(tmp_path))
    again = ModularPipeline.from_pretrained(str(tmp_path))
    again.load_components()
    assert type(again.vae) is type(new) and again.vae.config.scaling_factor == 0.5
