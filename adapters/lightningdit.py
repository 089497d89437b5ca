"""LightningDiT's own checkpoints to and from `LightningDiTTransformer2DModel`."""

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from favae import LightningDiTTransformer2DModel
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
from favae.models.lightningdit_transformer_2d import axial_rotary_embedding

# Buffers of the original that our model computes.
POSITION_BUFFERS = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")

# Where the original keeps our modules, outside and inside of blocks.
LOCATIONS = {
    "patch_embed.proj": Location("x_embedder.proj"),
    "time_embedding.linear_1": Location("t_embedder.mlp.0"),
    "time_embedding.linear_2": Location("t_embedder.mlp.2"),
    "class_embedding.embedding_table": Location("y_embedder.embedding_table"),
    "norm_out": Location("final_layer.norm_final"),
    "modulation_out": Location("final_layer.adaLN_modulation.1"),
    "proj_out": Location("final_layer.linear"),
}
BLOCK_LOCATIONS = {
    "norm1": Location("norm1"),
    "norm2": Location("norm2"),
    "attn.to_q": Location("attn.qkv", 0, 3),
    "attn.to_k": Location("attn.qkv", 1, 3),
    "attn.to_v": Location("attn.qkv", 2, 3),
    "attn.norm_q": Location("attn.q_norm"),
    "attn.norm_k": Location("attn.k_norm"),
    "attn.to_out": Location("attn.proj"),
    "ff.gate": Location("mlp.w12", 0, 2),
    "ff.linear_in": Location("mlp.w12", 1, 2),
    "ff.linear_out": Location("mlp.w3"),
    "modulation": Location("adaLN_modulation.1"),
}


def transformer_from_lightningdit(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """A LightningDiT as a [`LightningDiTTransformer2DModel`].

    The original must have SwiGLU, RoPE and RMSNorm, and no `learn_sigma`, as all published models; `use_qknorm` and
    `wo_shift` may be on or off. Its fixed position embeddings are checked and left out, since ours are computed. A
    moving average of them may differ from ours by rounding.

    Args:
        state: of the network or its moving average. The last class is the null class of guidance.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: if names are missing or not of this layout, or shapes or position embeddings do not fit.
    Source: Yao et al., CVPR 2025 (arXiv 2501.01423).
    """
    width, channels, patch, _ = required_tensor(state, "x_embedder.proj.weight", 4).shape
    head_dim = required_tensor(state, "feat_rope.freqs_cos", 2).shape[1]
    if head_dim == 0 or width % head_dim:
        raise CheckpointError(f"feat_rope.freqs_cos is for heads of {head_dim}, which do not make a width of {width}")
    grid = round(required_tensor(state, "pos_embed", 3).shape[1] ** 0.5)
    config = {
        "sample_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": count_numbered(state, "blocks.{}.attn.qkv.weight"),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": _mlp_ratio(width, required_tensor(state, "blocks.0.mlp.w3.weight", 2).shape[1]),
        "num_classes": required_tensor(state, "y_embedder.embedding_table.weight", 2).shape[0] - 1,
        "class_dropout_prob": 0.1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "wo_shift": required_tensor(state, "blocks.0.adaLN_modulation.1.weight", 2).shape[0] == 4 * width,
    }
    shapes = state_shapes(LightningDiTTransformer2DModel, config)
    for name, expected in _position_buffers(config).items():
        found = required_tensor(state, name, expected.ndim).float()
        # files in half precision store rounded ones
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-2):
            raise CheckpointError(f"{name} is not the fixed embedding of {grid}x{grid} tokens")
    return config, tensors_from_original(drop_prefixes(state, POSITION_BUFFERS), _locations(shapes), shapes)


def lightningdit_from_transformer(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `transformer_from_lightningdit`, for the original with `use_swiglu`, `use_rope`, `use_rmsnorm`.

    Raises:
        CheckpointError: for a transformer of texts, or without classes, which the original has no place for.
    """
    text_dim = config.get("text_dim")
    if text_dim is not None or config["num_classes"] == 0:
        kind = "without classes" if text_dim is None else "of texts"
        raise CheckpointError(f"LightningDiT has no place for a transformer {kind}")
    converted = tensors_to_original(state, _locations(state_shapes(LightningDiTTransformer2DModel, config)))
    dtype = next(iter(converted.values())).dtype
    return converted | {name: tensor.to(dtype) for name, tensor in _position_buffers(config).items()}


def _locations(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Location]:
    """Where the original keeps each tensor of ours."""
    locations = {}
    for key in shapes:
        prefix, table, name = "", LOCATIONS, key
        if key.startswith("blocks."):
            _, index, name = key.split(".", 2)
            prefix, table = f"blocks.{index}.", BLOCK_LOCATIONS
        module, _, parameter = name.rpartition(".")
        there = table[module]
        locations[key] = Location(f"{prefix}{there.name}.{parameter}", there.part, there.parts)
    return locations


def _position_buffers(config: Mapping) -> dict[str, Tensor]:
    """The original's buffers: positions (1, N, D), and cosines and sines of the rotations (N, head_dim)."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid = config["sample_size"] // config["patch_size"]
    positions = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None]
    cos, sin = axial_rotary_embedding(grid, config["attention_head_dim"])
    return dict(zip(POSITION_BUFFERS, (positions, cos.float(), sin.float())))


def _mlp_ratio(width: int, hidden: int) -> float:
    """The ratio with the fewest digits for which SwiGLU, of width int(2/3 int(width ratio)), is `hidden` wide."""
    exact = 1.5 * hidden / width
    ratios = (*(round(exact, digits) for digits in range(5)), (1.5 * hidden + 1) / width)  # the last one always fits
    return next(ratio for ratio in ratios if int(2 / 3 * int(width * ratio)) == hidden)
