"""LightningDiT's own checkpoints to and from `LightningDiTTransformer2DModel`."""

from collections.abc import Mapping

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from favae import LightningDiTTransformer2DModel
from favae.adapters.checkpoints import Entry, count, give, need, shapes_of, take, without
from favae.errors import CheckpointError
from favae.models.lightningdit_transformer_2d import axial_rotary_embedding

FIXED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")  # computed by ours, stored by theirs

RENAMED = {
    "patch_embed.proj": Entry("x_embedder.proj"),
    "time_embedding.linear_1": Entry("t_embedder.mlp.0"),
    "time_embedding.linear_2": Entry("t_embedder.mlp.2"),
    "class_embedding.embedding_table": Entry("y_embedder.embedding_table"),
    "norm_out": Entry("final_layer.norm_final"),
    "modulation_out": Entry("final_layer.adaLN_modulation.1"),
    "proj_out": Entry("final_layer.linear"),
}
RENAMED_IN_BLOCK = {
    "norm1": Entry("norm1"),
    "norm2": Entry("norm2"),
    "attn.to_q": Entry("attn.qkv", 0, 3),
    "attn.to_k": Entry("attn.qkv", 1, 3),
    "attn.to_v": Entry("attn.qkv", 2, 3),
    "attn.norm_q": Entry("attn.q_norm"),
    "attn.norm_k": Entry("attn.k_norm"),
    "attn.to_out": Entry("attn.proj"),
    "ff.gate": Entry("mlp.w12", 0, 2),
    "ff.linear_in": Entry("mlp.w12", 1, 2),
    "ff.linear_out": Entry("mlp.w3"),
    "modulation": Entry("adaLN_modulation.1"),
}


def transformer_from_lightningdit(state: Mapping[str, Tensor]) -> tuple[dict[str, object], dict[str, Tensor]]:
    """LightningDiT as a [`LightningDiTTransformer2DModel`].

    Of the original's settings, SwiGLU, RoPE and RMSNorm must be on and `learn_sigma` off, as in all of its published
    models; `use_qknorm` and `wo_shift` may be either. Its fixed position embeddings are compared, and not kept: ours
    computes them. Where an exponential moving average of them has drifted by rounding, ours are the exact ones.

    Args:
        state: of the network or its moving average. The last class is the null class of guidance.
    Returns:
        The config and the state dict.
    Raises:
        CheckpointError: for names that are missing or not of this layout, for other shapes and other embeddings.
    Source: Yao et al., CVPR 2025 (arXiv 2501.01423).
    """
    width, channels, patch, _ = need(state, "x_embedder.proj.weight", 4).shape
    head_dim = need(state, "feat_rope.freqs_cos", 2).shape[1]
    if head_dim == 0 or width % head_dim:
        raise CheckpointError(f"feat_rope.freqs_cos is for heads of {head_dim}, which do not make a width of {width}")
    grid = round(need(state, "pos_embed", 3).shape[1] ** 0.5)
    config = {
        "sample_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": count(state, "blocks.{}.attn.qkv.weight"),
        "num_attention_heads": width // head_dim,
        "attention_head_dim": head_dim,
        "mlp_ratio": _mlp_ratio(width, need(state, "blocks.0.mlp.w3.weight", 2).shape[1]),
        "num_classes": need(state, "y_embedder.embedding_table.weight", 2).shape[0] - 1,
        "class_dropout_prob": 0.1,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "wo_shift": need(state, "blocks.0.adaLN_modulation.1.weight", 2).shape[0] == 4 * width,
    }
    shapes = shapes_of(LightningDiTTransformer2DModel, config)
    for name, expected in _fixed(config).items():
        found = need(state, name).float()
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-2):  # stored in half precision
            raise CheckpointError(f"{name} is not the fixed embedding of {grid}x{grid} tokens")
    return config, take(without(state, FIXED), _entries(shapes), shapes)


def lightningdit_from_transformer(config: Mapping[str, object], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `transformer_from_lightningdit`, for the original with `use_swiglu`, `use_rope`, `use_rmsnorm`."""
    converted = give(state, _entries(shapes_of(LightningDiTTransformer2DModel, config)))
    like = next(iter(converted.values()))
    return converted | {name: tensor.to(like.dtype) for name, tensor in _fixed(config).items()}


def _entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Entry]:
    entries = {}
    for key in shapes:
        prefix, table, name = "", RENAMED, key
        if key.startswith("blocks."):
            _, index, name = key.split(".", 2)
            prefix, table = f"blocks.{index}.", RENAMED_IN_BLOCK
        module, _, parameter = name.rpartition(".")
        there = table[module]
        entries[key] = Entry(f"{prefix}{there.name}.{parameter}", there.part, there.parts)
    return entries


def _fixed(config: Mapping) -> dict[str, Tensor]:
    """The original's buffers: positions (1, N, D), and what rotates queries and keys (N, head_dim)."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    grid = config["sample_size"] // config["patch_size"]
    positions = get_2d_sincos_pos_embed(width, grid, base_size=grid, output_type="pt").float()[None]
    cos, sin = axial_rotary_embedding(grid, grid, config["attention_head_dim"])
    return dict(zip(FIXED, (positions, cos.float(), sin.float())))


def _mlp_ratio(width: int, hidden: int) -> float:
    """The roundest ratio whose SwiGLU, int(2/3 int(width ratio)) wide, is as wide."""
    exact = 1.5 * hidden / width
    ratios = (*(round(exact, digits) for digits in range(5)), (1.5 * hidden + 1) / width)  # the last always fits
    return next(ratio for ratio in ratios if int(2 / 3 * int(width * ratio)) == hidden)
