"""Tiny pipelines of each family with random components."""

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from favae import AutoencoderKLFA

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
    pipe.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)  # which it assumes to be 8
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


STATISTICS = {"latents_mean": [0.5, 0.0, 0.0, -0.5], "latents_std": [2.0, 1.0, 1.0, 2.0]}
