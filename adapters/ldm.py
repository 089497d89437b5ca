"""Autoencoders in the layout of latent diffusion (LDM), which VA-VAE and MAR's KL-16 share, to and from diffusers.

Down and up levels are `down.i` and `up.i`, both counted from the image, with lists `block` and `attn`. Attention has
one head and 1x1 convolutions as projections. Norms are GroupNorm(32, eps 1e-6), which the tensors do not tell.
"""

import logging
import math
import re
from collections.abc import Mapping

from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor

from favae.adapters.checkpoints import (
    Location,
    count_numbered,
    drop_prefixes,
    required_tensor,
    state_shapes,
    tensors_from_original,
    tensors_to_original,
)
from favae.errors import CheckpointError

logger = logging.getLogger(__name__)

# What only training needs: losses with their networks, VA-VAE's foundation model and projection, running averages, and
# the wavelet of its two-branch fork.
TRAINING_PREFIXES = ("loss.", "foundation_model.", "linear_proj.", "model_ema.", "dwt.")
AUTOENCODER_PREFIX = "first_stage_model."  # of the autoencoder in a checkpoint of a whole latent diffusion model
BLOCK_TYPES = {"DownEncoderBlock2D", "AttnDownEncoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"}

# Parts of our names and what stands for them in LDM's, applied in this order.
LDM_NAMES = (
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
    state: Mapping[str, Tensor], scaling_factor: float | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """An autoencoder of LDM, VA-VAE or MAR as an [`AutoencoderKL`], with attention at the same levels.

    Args:
        state: `encoder.*`, `decoder.*`, `quant_conv.*`, `post_quant_conv.*`, alone or as the `first_stage_model.*` of a
            latent diffusion model. What only training needs is left out.
        scaling_factor: for the config. VA-VAE has 1 and latent statistics, MAR 0.2325, Stable Diffusion 0.18215. None
            takes the `scale_factor` of a latent diffusion model, or 1 if the state has none.
    Returns:
        The config and the state dict. `sample_size`, which the tensors do not tell, is 256.
    Raises:
        CheckpointError: if names are missing or not of this layout, or shapes do not fit.
    Source: Rombach et al., CVPR 2022; Yao et al., CVPR 2025 (VA-VAE); Li et al., NeurIPS 2024 (MAR).
    """
    if scaling_factor is None:
        scaling_factor = own_scaling_factor(state)
    state = autoencoder_tensors(state)
    config = config_from_ldm(state)
    config |= {
        "use_quant_conv": "quant_conv.weight" in state,
        "use_post_quant_conv": "post_quant_conv.weight" in state,
        "scaling_factor": scaling_factor,
        "shift_factor": 0.0,
        "force_upcast": False,
    }
    shapes = state_shapes(AutoencoderKL, config)
    return config, tensors_from_original(state, ldm_locations(shapes, config), shapes)


def ldm_from_autoencoder_kl(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `autoencoder_kl_from_ldm`. The layout has no place for scaling factor and latent statistics.

    Args:
        config, state: of a stock [`AutoencoderKL`].
    Raises:
        CheckpointError: if LDM's code has no setting for something in the config.
    """
    return to_ldm(AutoencoderKL, config, state)


def autoencoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the autoencoder alone, without those that only training needs."""
    inner = {name: tensor for name, tensor in state.items() if name.startswith(AUTOENCODER_PREFIX)}
    if inner:
        state = {name.removeprefix(AUTOENCODER_PREFIX): tensor for name, tensor in inner.items()}
    return drop_prefixes(state, TRAINING_PREFIXES)


def own_scaling_factor(state: Mapping[str, Tensor]) -> float:
    """The `scale_factor` that a latent diffusion model measured on its first batch; 1 without one.

    A model that was given a constant, as Stable Diffusion, does not store it, which is logged.

    Raises:
        CheckpointError: if it is not a positive number.
    """
    factor = state.get("scale_factor")
    if factor is None:
        if any(name.startswith(AUTOENCODER_PREFIX) for name in state):
            logger.warning("the latent diffusion model does not say its scaling factor, and gets 1; check its config")
        return 1.0
    if factor.numel() != 1 or not 0 < factor.item() < math.inf:
        raise CheckpointError("scale_factor is not a positive number")
    return float(factor)


def check_attention(state: Mapping[str, Tensor], *, of_mar: bool) -> None:
    """Tells MAR's autoencoder from VA-VAE's and LDM's, whose other tensors have the same names.

    The levels of MAR's decoder have no attention and those of its encoder have; in LDM's code both have or neither.

    Args:
        state: in LDM's names.
    Raises:
        CheckpointError: if it is not MAR's, `of_mar`, or is MAR's.
    """
    sides = {name.split(".")[0] for name in state if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", name)}
    is_mar = sides == {"encoder"}
    if of_mar and not is_mar:
        raise CheckpointError(
            "its decoder has attention in its levels, or its encoder has not, unlike MAR's; VA-VAE's and LDM's are of "
            "the format ldm"
        )
    if is_mar and not of_mar:
        raise CheckpointError(
            "its encoder has attention in its levels and its decoder has not, as MAR's: the format mar"
        )


def config_from_ldm(state: Mapping[str, Tensor]) -> dict[str, object]:
    """The settings that `AutoencoderKL` and `VQModel` share, from names and shapes."""
    levels = range(count_numbered(state, "encoder.down.{}.block.0.conv1.weight"))
    if not levels:
        raise CheckpointError("lacks encoder.down.0.block.0.conv1.weight: no autoencoder in LDM's layout")
    attends_down = ["Attn" if f"encoder.down.{i}.attn.0.norm.weight" in state else "" for i in levels]
    attends_up = ["Attn" if f"decoder.up.{i}.attn.0.norm.weight" in state else "" for i in reversed(levels)]
    return {
        "in_channels": required_tensor(state, "encoder.conv_in.weight", 4).shape[1],
        "out_channels": required_tensor(state, "decoder.conv_out.weight", 4).shape[0],
        "down_block_types": [f"{attention}DownEncoderBlock2D" for attention in attends_down],
        "up_block_types": [f"{attention}UpDecoderBlock2D" for attention in attends_up],
        "block_out_channels": [
            required_tensor(state, f"encoder.down.{i}.block.0.conv1.weight", 4).shape[0] for i in levels
        ],
        "layers_per_block": count_numbered(state, "encoder.down.0.block.{}.conv1.weight"),
        "act_fn": "silu",
        "latent_channels": required_tensor(state, "decoder.conv_in.weight", 4).shape[1],
        "norm_num_groups": 32,
        "sample_size": 256,
        "mid_block_add_attention": "encoder.mid.attn_1.norm.weight" in state,
    }


def ldm_locations(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> dict[str, Location]:
    """Where LDM keeps each tensor of an `AutoencoderKL` or a `VQModel`."""
    deepest = len(config["block_out_channels"]) - 1
    return {key: _location(key, shape, deepest) for key, shape in shapes.items()}


def _location(key: str, shape: tuple[int, ...], deepest: int) -> Location:
    # diffusers counts the up blocks from the latent, LDM from the image
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{deepest - int(found[1])}", key)
    for ours, theirs in LDM_NAMES:
        name = name.replace(ours, theirs)
    return Location(name, convolution=".attentions." in key and len(shape) == 2)


def to_ldm(model_class: type[ModelMixin], config: Mapping, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in LDM's names.

    Raises:
        CheckpointError: if LDM's code has no setting for something in the config.
    """
    for name, value in {"norm_num_groups": 32, "act_fn": "silu"}.items():
        if config.get(name, value) != value:
            raise CheckpointError(f"{name} is {config[name]}, and LDM's code has {value} only")
    if others := {*config["down_block_types"], *config["up_block_types"]} - BLOCK_TYPES:
        raise CheckpointError(f"LDM's code has no {', '.join(sorted(others))}")
    return tensors_to_original(state, ldm_locations(state_shapes(model_class, config), config))
