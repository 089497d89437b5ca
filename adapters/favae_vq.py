"""The codec that FA-VAE (Lin et al., CVPR 2023) published, as `VQModelFA`."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from favae import VQModelFA
from favae.adapters.checkpoints import (
    Location,
    drop_prefixes,
    list_names,
    required_tensor,
    state_shapes,
    tensors_from_original,
)
from favae.errors import CheckpointError

# What only training needs: the discriminator, and the widths of the blurs, which the images do not depend on.
TRAINING_PREFIXES = ("discriminator.", "sigmas", "encoder.sigmas", "decoder.sigmas")
CODEBOOK_PREFIX = "quantizer._codebook."
CODEBOOK_BUFFERS = {f"{CODEBOOK_PREFIX}{name}" for name in ("initted", "cluster_size", "embed")}

# The original's names of our modules: inside of residual blocks and attention, and outside of blocks.
RESNET_NAMES = {
    "norm1": "block.0",
    "conv1": "block.2",
    "norm2": "block.3",
    "conv2": "block.6",
    "conv_shortcut": "shortcut",
}
ATTENTION_NAMES = {"group_norm": "norm", "to_out.0": "attn.out_proj"}
FUSED_PROJECTIONS = ("to_q", "to_k", "to_v")
NAMES_OUTSIDE_BLOCKS = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.conv_norm_out": "encoder.final.0",
    "encoder.conv_out": "encoder.final.2",
    "quant_conv": "encoder.final.3",
    "codebook.project_in": "quantizer.project_in",
    "codebook.project_out": "quantizer.project_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.conv_norm_out": "decoder.final.0",
    "decoder.conv_out": "decoder.final.2",
}


def vq_model_fa_from_favae_vq(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A published FA-VAE codec as a [`VQModelFA`].

    - Conv and Res complements have the same tensors and give the same images; only what the loss compares differs.
      They become "conv". To train a Res model on, set `frequency_complement="res"` in its config.
    - The tensors do not tell the norms. The original has GroupNorm(32, eps 1e-5), and over latents of fewer than 32
      channels one group per channel, as the published f4 model (3 channels).
    - Its codebook chooses entries by direction and returns them with their lengths.
    - The file does not say how the codebook is trained; decay and replacement have our defaults. Entries that were used
      less than once per step count as used once.

    Args:
        state: `encoder.*`, `decoder.*`, `quantizer.*`. The discriminator and the sigmas are left out.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: if names are missing or not of this layout, shapes do not fit, or the codec has something that
            `VQModelFA` has not: a decoder without complements, a Euclidean codebook, attention above the deepest level.
    Source: Lin et al., CVPR 2023 (arXiv 2305.02541).
    """
    state = drop_prefixes(state, TRAINING_PREFIXES)
    config = _config(state)
    shapes = {
        key: shape
        for key, shape in state_shapes(VQModelFA, config).items()
        if key != "entry_norms" and "._codebook." not in key
    }
    networks = tensors_from_original(drop_prefixes(state, (CODEBOOK_PREFIX,)), _locations(shapes, config), shapes)
    return config, networks | _codebook(state)


def _config(state: Mapping[str, Tensor]) -> dict[str, object]:
    levels = _encoder_levels(state)
    deepest = len(levels) - 1
    attending = [level for level, blocks in enumerate(levels) if "attention" in blocks]
    if attending not in ([], [deepest]):
        raise CheckpointError(f"has attention at the levels {attending}; VQModelFA has it at the deepest, {deepest}")
    if "decoder.fcm_1.attn.self_attn.in_proj_weight" in state:
        complement = "attn"
    elif "decoder.fcm_1.block.0.weight" in state:
        complement = "conv"
    else:
        raise CheckpointError("lacks decoder.fcm_1: its decoder has no frequency complement modules")
    latent_channels = required_tensor(state, "encoder.final.3.weight", 4).shape[0]
    _, entries, dimension = required_tensor(state, f"{CODEBOOK_PREFIX}embed", 3).shape
    return {
        "in_channels": required_tensor(state, "encoder.conv_in.weight", 4).shape[1],
        "out_channels": required_tensor(state, "decoder.final.2.weight", 4).shape[0],
        "block_out_channels": [required_tensor(state, f"{blocks[0]}.block.2.weight", 4).shape[0] for blocks in levels],
        "layers_per_block": sum(name.startswith("encoder.down.") for name in levels[0]),
        "norm_num_groups": 32,
        "attention": bool(attending),
        "latent_channels": latent_channels,
        "quantizer": "vq",
        "codebook_size": entries,
        "codebook_dim": None if dimension == latent_channels else dimension,
        "frequency_complement": complement,
        "norm_eps": 1e-5,
        "latent_norm_num_groups": min(32, latent_channels),
    }


def _encoder_levels(state: Mapping[str, Tensor]) -> list[list[str]]:
    """What the encoder's flat list of blocks has at each level: names of residual blocks, and "attention"."""
    levels: list[list[str]] = [[]]
    index = 0
    while True:
        name = f"encoder.down.{index}"
        if f"{name}.block.2.weight" in state:
            levels[-1].append(name)
        elif f"{name}.attn.in_proj_weight" in state:
            levels[-1].append("attention")
        elif f"{name}.conv.weight" in state:  # between two levels
            levels.append([])
        else:
            break
        index += 1
    if not all(blocks and blocks[0] != "attention" for blocks in levels):
        raise CheckpointError(f"lacks encoder.down.{index}.block: not an encoder of FA-VAE")
    return levels


def _locations(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> dict[str, Location]:
    """Where the original keeps each tensor of ours."""
    blocks = {ours: (theirs, block_type) for ours, theirs, block_type in _blocks(config)}
    return {key: _location(key, blocks) for key in shapes}


def _blocks(config: Mapping) -> Iterator[tuple[str, str, str]]:
    """Our name, their name and the type of each block. Their lists count all blocks of a side in a row."""
    for side in ("encoder", "decoder"):
        for index, block_type in enumerate(("resnet", "attention", "resnet")):
            yield f"{side}.mid_block.{block_type}s.{index // 2}", f"{side}.mid.{index}", block_type

    depth, layers = len(config["block_out_channels"]), config["layers_per_block"]
    sides = (
        ("encoder.down", "downsamplers", layers, depth - 1),
        ("decoder.up", "upsamplers", layers + 1, 0),
    )
    for side, resamplers, resnets, deepest in sides:
        index = 0
        for level in range(depth):
            sequence = []
            for i in range(resnets):
                sequence.append((f"resnets.{i}", "resnet"))
                if config["attention"] and level == deepest:
                    sequence.append((f"attentions.{i}", "attention"))
            if level < depth - 1:
                sequence.append((f"{resamplers}.0", "resampler"))
            for name, block_type in sequence:
                yield f"{side}_blocks.{level}.{name}", f"{side}.{index}", block_type
                index += 1

    for index in range(4):
        ours, theirs = f"decoder.complements.{index}", f"decoder.fcm_{index + 1}"
        if config["frequency_complement"] == "attn" and index < 3:
            yield ours, theirs, "transformer"
        else:
            yield f"{ours}.block", theirs, "resnet"


def _location(key: str, blocks: Mapping[str, tuple[str, str]]) -> Location:
    module, _, parameter = key.rpartition(".")
    if module in NAMES_OUTSIDE_BLOCKS:
        return Location(f"{NAMES_OUTSIDE_BLOCKS[module]}.{parameter}")
    ours = next(block for block in blocks if key.startswith(f"{block}."))
    theirs, block_type = blocks[ours]
    inner = module[len(ours) + 1 :]
    if block_type == "resnet":
        return Location(f"{theirs}.{RESNET_NAMES[inner]}.{parameter}")
    if block_type == "transformer":
        return Location(f"{theirs}.{inner.replace('block', 'attn', 1)}.{parameter}")
    if block_type == "resampler":
        return Location(f"{theirs}.{inner}.{parameter}")
    if inner in FUSED_PROJECTIONS:
        return Location(f"{theirs}.attn.in_proj_{parameter}", FUSED_PROJECTIONS.index(inner), len(FUSED_PROJECTIONS))
    return Location(f"{theirs}.{ATTENTION_NAMES[inner]}.{parameter}")


def _codebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffers of our codebook, from their entries (1, K, D) and numbers of uses (1, K)."""
    found = {name for name in state if name.startswith(CODEBOOK_PREFIX)}
    if missing := CODEBOOK_BUFFERS - found:
        raise CheckpointError(f"lacks {list_names(missing)}")
    if unexpected := found - CODEBOOK_BUFFERS:
        raise CheckpointError(f"has {list_names(unexpected)}; VQModelFA's codebook is one of cosine similarity")
    entries, uses = state[f"{CODEBOOK_PREFIX}embed"], state[f"{CODEBOOK_PREFIX}cluster_size"]
    if entries.shape[0] != 1 or uses.shape != entries.shape[:2]:
        raise CheckpointError(
            f"{CODEBOOK_PREFIX}embed has shape {tuple(entries.shape)}, expected one codebook (1, K, D)"
        )
    directions, uses = F.normalize(entries, dim=-1), uses.clamp(min=1)
    return {
        "codebook._codebook.initted": torch.tensor(True),
        "codebook._codebook.cluster_size": uses,
        "codebook._codebook.embed_avg": directions * uses[..., None],
        "codebook._codebook.embed": directions,
        "entry_norms": entries[0].norm(dim=-1),
    }
