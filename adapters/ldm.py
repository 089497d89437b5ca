"""Autoencoders in the layout of latent diffusion (LDM), which VA-VAE and MAR's KL-16 share, to and from diffusers.

Down and up levels are `down.i` and `up.i`, both counted from the image, with lists `block` and `attn`. Attention has
one head, and 1x1 convolutions for projections. Norms are GroupNorm(32, eps 1e-6), which the tensors do not tell.
"""

import re
from collections.abc import Mapping

from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor

from favae.adapters.checkpoints import Entry, count, give, need, shapes_of, take, without
from favae.errors import CheckpointError

# Of training: the losses with their networks, VA-VAE's foundation model and projection, running averages, the
# wavelet of its two-branch fork.
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.", "dwt.")
WITHIN_LDM = "first_stage_model."  # the autoencoder inside a whole latent diffusion model

RENAMED = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("down_blocks.", "down."),
    ("up_blocks.", "up."),
    ("resnets.", "block."),
    ("attentions.", "attn."),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)


def autoencoder_kl_from_ldm(
    state: Mapping[str, Tensor], scaling_factor: float = 1.0
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """An autoencoder of LDM, VA-VAE or MAR as an [`AutoencoderKL`], with attention where it has attention.

    Args:
        state: `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, alone or as the `first_stage_model.*` of a
            latent diffusion model. What only training needs is left out: the losses, the foundation model and the
            projection to it, running averages (`model_ema.*`).
        scaling_factor: for the config. VA-VAE's is 1, beside its latent statistics; MAR's 0.2325; Stable Diffusion's
            0.18215.
    Returns:
        The config and the state dict. `sample_size`, which the tensors do not tell, is 256.
    Raises:
        CheckpointError: for names that are missing or not of this layout, and for other shapes.
    Source: Rombach et al., CVPR 2022; Yao et al., CVPR 2025 (VA-VAE); Li et al., NeurIPS 2024 (MAR).
    """
    state = of_autoencoder(state)
    config = config_from_ldm(state)
    config |= {
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": scaling_factor,
        "shift_factor": 0.0,
        "force_upcast": False,
    }
    shapes = shapes_of(AutoencoderKL, config)
    return config, take(state, entries(shapes, config), shapes)


def ldm_from_autoencoder_kl(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `autoencoder_kl_from_ldm`. The scaling factor and the latent statistics have no place in it.

    Args:
        config, state: of a stock [`AutoencoderKL`].
    Raises:
        CheckpointError: for what LDM's code has no setting for.
    """
    return to_ldm(AutoencoderKL, config, state)


def of_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's tensors alone."""
    if any(name.startswith(WITHIN_LDM) for name in state):
        state = {name.removeprefix(WITHIN_LDM): state[name] for name in state if name.startswith(WITHIN_LDM)}
    return without(state, TRAINING_ONLY)


def config_from_ldm(state: Mapping[str, Tensor]) -> dict[str, object]:
    """What `AutoencoderKL` and `VQModel` have in common, from names and shapes."""
    levels = count(state, "encoder.down.{}.block.0.conv1.weight")
    widths = [need(state, f"encoder.down.{level}.block.0.conv1.weight", 4).shape[0] for level in range(levels)]
    if not widths:
        raise CheckpointError("lacks encoder.down.0.block.0.conv1.weight: no autoencoder in LDM's layout")

    def attention(side: str, level: int) -> str:
        return "Attn" if f"{side}.{level}.attn.0.norm.weight" in state else ""

    return {
        "in_channels": need(state, "encoder.conv_in.weight", 4).shape[1],
        "out_channels": need(state, "decoder.conv_out.weight", 4).shape[0],
        "down_block_types": [f"{attention('encoder.down', level)}DownEncoderBlock2D" for level in range(levels)],
        "up_block_types": [f"{attention('decoder.up', level)}UpDecoderBlock2D" for level in reversed(range(levels))],
        "block_out_channels": widths,
        "layers_per_block": count(state, "encoder.down.0.block.{}.conv1.weight"),
        "act_fn": "silu",
        "latent_channels": need(state, "decoder.conv_in.weight", 4).shape[1],
        "norm_num_groups": 32,
        "sample_size": 256,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
    }


def entries(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> dict[str, Entry]:
    """Where LDM keeps each tensor of an `AutoencoderKL` or a `VQModel`."""
    deepest = len(config["block_out_channels"]) - 1
    return {key: _entry(key, shape, deepest) for key, shape in shapes.items()}


def _entry(key: str, shape: tuple[int, ...], deepest: int) -> Entry:
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{deepest - int(found[1])}", key)
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return Entry(name, convolution=".attentions." in key and len(shape) == 2)


def to_ldm(kind: type[ModelMixin], config: Mapping, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in LDM's names; raises CheckpointError for what its code has no setting for."""
    fixed = {"norm_num_groups": 32, "act_fn": "silu"}
    blocks = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{name} is {config[name]}, and LDM's code knows only {value}")
    if odd := {*config["down_block_types"], *config["up_block_types"]} - blocks:
        raise CheckpointError(f"LDM's code has no {', '.join(sorted(odd))}")
    return give(state, entries(shapes_of(kind, config), config))
