"""The codec that FA-VAE (Lin et al., CVPR 2023) published, as `VQModelFA`."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from favae import VQModelFA
from favae.adapters.checkpoints import Entry, listed, need, shapes_of, take, without
from favae.errors import CheckpointError

# Of training: the discriminator, and the widths of the blurs, which the images do not depend on.
TRAINING_ONLY = ("discriminator.", "sigmas", "encoder.sigmas", "decoder.sigmas")
CODEBOOK = "quantizer._codebook."

RESNET = {"norm1": "block.0", "conv1": "block.2", "norm2": "block.3", "conv2": "block.6", "conv_shortcut": "shortcut"}
ATTENTION = {"group_norm": "norm", "to_out.0": "attn.out_proj"}
PROJECTIONS = ("to_q", "to_k", "to_v")
OUTSIDE = {
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

    Conv and Res complements have the same tensors and give the same images; only what the loss compares differs. They
    become "conv"; train on with `frequency_complement="res"` in the config where they were Res. The norms of the
    original are GroupNorm(32, eps 1e-5), except those over latents of fewer channels than 32, which have one group per
    channel, as the published f4 model (3 channels, 3 groups); the tensors do not tell. Its codebook chooses entries by
    direction and returns them with their length. How the codebook is trained on (decay, replacement)
    is not in the file and has our defaults; an entry that was used less than once per step counts as used once.

    Args:
        state: `encoder.*`, `decoder.*`, `quantizer.*`; the discriminator and the sigmas are left out.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: for names that are missing or not of this layout, for other shapes, and for what `VQModelFA`
            does not have: a decoder without complements, a Euclidean codebook, attention above the deepest level.
    Source: Lin et al., CVPR 2023 (arXiv 2305.02541).
    """
    state = without(state, TRAINING_ONLY)
    config = _config(state)
    shapes = shapes_of(VQModelFA, config)
    tensors = {key: shape for key, shape in shapes.items() if key != "entry_norms" and "._codebook." not in key}
    network = take(without(state, (CODEBOOK,)), _entries(tensors, config), tensors)
    return config, network | _codebook(state)


def _config(state: Mapping[str, Tensor]) -> dict[str, object]:
    levels = _levels(state)
    deepest = len(levels) - 1
    attending = [level for level, blocks in enumerate(levels) if "attention" in blocks]
    if attending not in ([], [deepest]):
        raise CheckpointError(f"has attention at the levels {attending}; VQModelFA has it at the deepest, {deepest}")
    if "decoder.fcm_1.attn.self_attn.in_proj_weight" in state:
        kind = "attn"
    elif "decoder.fcm_1.block.0.weight" in state:
        kind = "conv"
    else:
        raise CheckpointError("lacks decoder.fcm_1: its decoder has no frequency complement modules")
    latents = need(state, "encoder.final.3.weight", 4).shape[0]
    _, entries, dimension = need(state, f"{CODEBOOK}embed", 3).shape
    return {
        "in_channels": need(state, "encoder.conv_in.weight", 4).shape[1],
        "out_channels": need(state, "decoder.final.2.weight", 4).shape[0],
        "block_out_channels": [need(state, f"{blocks[0]}.block.2.weight", 4).shape[0] for blocks in levels],
        "layers_per_block": sum(name.startswith("encoder.down.") for name in levels[0]),
        "norm_num_groups": 32,
        "attention": bool(attending),
        "latent_channels": latents,
        "quantizer": "vq",
        "codebook_size": entries,
        "codebook_dim": None if dimension == latents else dimension,
        "frequency_complement": kind,
        "norm_eps": 1e-5,
        "latent_norm_num_groups": min(32, latents),
    }


def _levels(state: Mapping[str, Tensor]) -> list[list[str]]:
    """What the encoder's flat list of blocks has at each level: the names of residual blocks, and "attention"."""
    levels: list[list[str]] = [[]]
    index = 0
    while True:
        name = f"encoder.down.{index}"
        if f"{name}.block.2.weight" in state:
            levels[-1].append(name)
        elif f"{name}.attn.in_proj_weight" in state:
            levels[-1].append("attention")
        elif f"{name}.conv.weight" in state:
            levels.append([])
        else:
            break
        index += 1
    if not all(blocks and blocks[0] != "attention" for blocks in levels):
        raise CheckpointError(f"lacks encoder.down.{index}.block: no encoder of FA-VAE")
    return levels


def _entries(shapes: Mapping[str, tuple[int, ...]], config: Mapping) -> dict[str, Entry]:
    blocks = {ours: (theirs, kind) for ours, theirs, kind in _blocks(config)}
    return {key: _entry(key, blocks) for key in shapes}


def _blocks(config: Mapping) -> Iterator[tuple[str, str, str]]:
    """Our and their name of each block, and its kind; their lists count all blocks of one side in a row."""
    for side in ("encoder", "decoder"):
        for index, kind in enumerate(("resnet", "attention", "resnet")):
            yield f"{side}.mid_block.{kind}s.{index // 2}", f"{side}.mid.{index}", kind

    depth, layers = len(config["block_out_channels"]), config["layers_per_block"]
    sides = (
        ("encoder.down", "downsamplers", layers, depth - 1),
        ("decoder.up", "upsamplers", layers + 1, 0),
    )
    for side, resamplers, resnets, deepest in sides:
        index = 0
        for level in range(depth):
            attention = config["attention"] and level == deepest
            block = f"{side}_blocks.{level}"
            sequence = [(f"{kind}s.{i}", kind) for i in range(resnets) for kind in ("resnet", "attention")]
            sequence.append((f"{resamplers}.0", "resampler"))
            for name, kind in sequence:
                if (kind == "attention" and not attention) or (kind == "resampler" and level == depth - 1):
                    continue
                yield f"{block}.{name}", f"{side}.{index}", kind
                index += 1

    for index in range(4):
        ours, theirs = f"decoder.complements.{index}", f"decoder.fcm_{index + 1}"
        if config["frequency_complement"] == "attn" and index < 3:
            yield ours, theirs, "transformer"
        else:
            yield f"{ours}.block", theirs, "resnet"


def _entry(key: str, blocks: Mapping[str, tuple[str, str]]) -> Entry:
    module, _, parameter = key.rpartition(".")
    if module in OUTSIDE:
        return Entry(f"{OUTSIDE[module]}.{parameter}")
    ours = next(block for block in blocks if key.startswith(f"{block}."))
    theirs, kind = blocks[ours]
    inner = module[len(ours) + 1 :]
    if kind == "resnet":
        return Entry(f"{theirs}.{RESNET[inner]}.{parameter}")
    if kind == "transformer":
        return Entry(f"{theirs}.{inner.replace('block', 'attn', 1)}.{parameter}")
    if kind == "resampler":
        return Entry(f"{theirs}.{inner}.{parameter}")
    if inner in PROJECTIONS:
        return Entry(f"{theirs}.attn.in_proj_{parameter}", PROJECTIONS.index(inner), len(PROJECTIONS))
    return Entry(f"{theirs}.{ATTENTION[inner]}.{parameter}")


def _codebook(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our codebook's buffers out of theirs: (1, K, D) entries, (1, K) uses."""
    names = {f"{CODEBOOK}{name}" for name in ("initted", "cluster_size", "embed")}
    found = {name for name in state if name.startswith(CODEBOOK)}
    if missing := names - found:
        raise CheckpointError(f"lacks {listed(missing)}")
    if unexpected := found - names:
        raise CheckpointError(f"has {listed(unexpected)}; VQModelFA's codebook is one of cosine similarity")
    entries, uses = state[f"{CODEBOOK}embed"], state[f"{CODEBOOK}cluster_size"]
    if entries.shape[0] != 1 or uses.shape != entries.shape[:2]:
        raise CheckpointError(f"{CODEBOOK}embed has shape {tuple(entries.shape)}, expected one codebook, (1, K, D)")
    directions, uses = F.normalize(entries, dim=-1), uses.clamp(min=1)
    return {
        "codebook._codebook.initted": torch.tensor(True),
        "codebook._codebook.cluster_size": uses,
        "codebook._codebook.embed_avg": directions * uses[..., None],
        "codebook._codebook.embed": directions,
        "entry_norms": entries[0].norm(dim=-1),
    }
