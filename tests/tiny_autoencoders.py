"""A tiny model of every class of autoencoders, for tests that go through all."""

import diffusers
import pytest
from conftest import TINY_HYPERPRIOR, TINY_VQ

from favae import HyperpriorModelFA, VQModelFA


def autoencoders() -> dict[str, diffusers.ModelMixin]:
    """By a name that begins with the class's."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    common = {**blocks, "block_out_channels": (8, 8), "norm_num_groups": 4}
    rae = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "decoder_hidden_size": 16, "patch_size": 4}
    rae |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    dc = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "latent_channels": 4}
    dc |= {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "attention_head_dim": 4}
    dc |= {"encoder_block_types": "ResBlock", "decoder_block_types": "ResBlock"}
    dc |= {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    tiny = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    pytest.importorskip("transformers", reason="AutoencoderRAE's encoders are from transformers")
    frames = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    frames |= {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    patches = {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
    return {
        "AutoencoderKL": diffusers.AutoencoderKL(**common, latent_channels=4),
        "AsymmetricAutoencoderKL": diffusers.AsymmetricAutoencoderKL(
            down_block_types=blocks["down_block_types"],
            down_block_out_channels=(8, 8),
            up_block_types=blocks["up_block_types"],
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        "AutoencoderKLFlux2": diffusers.AutoencoderKLFlux2(**common, latent_channels=4),
        "AutoencoderTiny": diffusers.AutoencoderTiny(**tiny),
        "AutoencoderKLQwenImage": diffusers.AutoencoderKLQwenImage(**frames),
        "AutoencoderKLWan, as Wan 2.1's": diffusers.AutoencoderKLWan(**frames),
        "AutoencoderKLWan, as Wan 2.2's": diffusers.AutoencoderKLWan(**frames, **patches),
        "AutoencoderDC": diffusers.AutoencoderDC(**dc),
        "AutoencoderRAE": diffusers.AutoencoderRAE(encoder_input_size=28, image_size=8, **rae),
        "VQModel": diffusers.VQModel(**common, num_vq_embeddings=16),
        "VQModel, as aMUSEd's": diffusers.VQModel(**common, num_vq_embeddings=16, lookup_from_codebook=True),
        "VQModelFA": VQModelFA(**TINY_VQ),
        "HyperpriorModelFA": HyperpriorModelFA(**TINY_HYPERPRIOR),
    }
