"""`LightningDiTTransformer2DModel`: a diffusion transformer that predicts velocities of latents, by class or text."""

import math
from typing import Annotated

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    LabelEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from favae.models.cat_block import CATAttention
from favae.models.hub import HubModelMixin
from favae.models.text_conditioning import mean_of_text, prepare_text
from favae.precision import no_autocast, parameter_dtype


def axial_rotary_embedding(size: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding of a grid: half of each head turns with the row, half with the column.

    Args:
        size: tokens along each side of the grid.
        head_dim: a multiple of 4.
    Returns:
        Two tensors (size * size, head_dim), row by row; the channels 2n and 2n + 1 share an angle.
    Source: Su et al., 2021, in the axial form of EVA-02.
    """
    line = get_1d_rotary_pos_embed(head_dim // 2, torch.arange(size), use_real=True)  # cos, sin: (size, D/2)
    cos, sin = (torch.cat([part.repeat_interleave(size, dim=0), part.repeat(size, 1)], dim=1) for part in line)
    return cos, sin


class LightningDiTAttention(nn.Module):
    """Self-attention with rotary embedding and, optionally, RMS-normalized queries and keys."""

    def __init__(self, dim: int, *, num_heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, num_heads * head_dim)
        self.to_k = nn.Linear(dim, num_heads * head_dim)
        self.to_v = nn.Linear(dim, num_heads * head_dim)
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(num_heads * head_dim, dim)

    def forward(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, dim), and the rotary embedding of the N positions -> (B, N, dim)."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, N, heads, head_dim)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        query = apply_rotary_emb(self.norm_q(query), rotary, sequence_dim=1)
        key = apply_rotary_emb(self.norm_k(key), rotary, sequence_dim=1)
        return self.to_out(dispatch_attention_fn(query, key, value).flatten(2))


class SwiGLUFeedForward(nn.Module):
    """W_out(silu(W_gate x) * W_in x), of hidden width 2/3 mlp_ratio dim. Source: Shazeer, 2020."""

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden = int(2 / 3 * int(dim * mlp_ratio))
        self.gate = nn.Linear(dim, hidden)
        self.linear_in = nn.Linear(dim, hidden)
        self.linear_out = nn.Linear(hidden, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_out(F.silu(self.gate(hidden_states)) * self.linear_in(hidden_states))


def xavier_uniform_of_rows(*layers: nn.Linear) -> None:
    """Initializes layers of one input as the rows of the single matrix that published code has in their place.

    Its Xavier bound, sqrt(6 / (inputs + all outputs)), is smaller than that of each layer alone.
    """
    bound = math.sqrt(6 / (layers[0].in_features + sum(layer.out_features for layer in layers)))
    for layer in layers:
        nn.init.uniform_(layer.weight, -bound, bound)


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """hidden_states (B, N, D), shift and scale (B, D) -> (B, N, D)."""
    return hidden_states * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class LightningDiTBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN-Zero; Peebles and Xie, 2023).

    Between them, attention to the text, if there is one, is added as it is: its last layer starts at zero (PixArt,
    arXiv 2310.00426).

    Args:
        dim: width D.
        num_heads, head_dim, qk_norm: of the attention.
        mlp_ratio: of the feed-forward.
        wo_shift: whether the condition gives scales and gates alone, no shifts.
        text_dim: width of the text embeddings; None without attention to a text.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        mlp_ratio: float,
        qk_norm: bool,
        wo_shift: bool,
        text_dim: int | None = None,
    ):
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=1e-6)
        self.attn = LightningDiTAttention(dim, num_heads=num_heads, head_dim=head_dim, qk_norm=qk_norm)
        self.norm2 = RMSNorm(dim, eps=1e-6)
        self.ff = SwiGLUFeedForward(dim, mlp_ratio)
        self.wo_shift = wo_shift
        self.modulation = nn.Linear(dim, (4 if wo_shift else 6) * dim)
        self.norm_text: nn.Module | None = None
        self.text_attn: CATAttention | None = None
        if text_dim is not None:
            self.norm_text = RMSNorm(dim, eps=1e-6)
            self.text_attn = CATAttention(
                dim, num_heads=num_heads, head_dim=head_dim, context_dim=text_dim, shared_key_value=False, has_null=True
            )

    def forward(
        self,
        hidden_states: Tensor,
        condition: Tensor,
        rotary: tuple[Tensor, Tensor],
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, D), condition (B, D), text (B, L, text_dim), text_mask (B, 1, 1, 1 + L) -> (B, N, D)."""
        modulation = self.modulation(F.silu(condition))
        if self.wo_shift:
            shift1 = shift2 = torch.zeros_like(condition)
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=1)
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        attended = self.attn(modulate(self.norm1(hidden_states), shift1, scale1), rotary)
        hidden_states = hidden_states + gate1.unsqueeze(1) * attended
        if self.text_attn is not None and self.norm_text is not None and text is not None:
            hidden_states = hidden_states + self.text_attn(self.norm_text(hidden_states), text, text_mask)
        transformed = self.ff(modulate(self.norm2(hidden_states), shift2, scale2))
        return hidden_states + gate2.unsqueeze(1) * transformed


class LightningDiTTransformer2DModel(HubModelMixin, ModelMixin, ConfigMixin):
    r"""
    The diffusion transformer of LightningDiT: patches with fixed sine-cosine positions, rotary attention, SwiGLU,
    RMSNorm and adaLN-Zero. It predicts the velocity data - noise of the linear path x_t = t data + (1 - t) noise.

    Parameters:
        sample_size: height and width of the latent.
        patch_size: height and width of a token, in latent pixels.
        in_channels: latent channels.
        num_layers, num_attention_heads, attention_head_dim: the width is heads * head_dim; XL is 28, 16, 72.
        mlp_ratio: of the feed-forward, before SwiGLU's factor 2/3.
        num_classes: number of classes; the index `num_classes` is the null class of classifier-free guidance. 0 for
            none: the condition is a text, or nothing.
        class_dropout_prob: share of labels that are replaced by the null class in training.
        qk_norm: whether queries and keys are RMS-normalized: steadier in long bf16 runs, slightly worse otherwise.
        wo_shift: whether blocks are modulated by scales and gates alone.
        text_dim: width of text embeddings, which every block attends to and whose mean joins the condition; None for
            none.
        text_dropout_prob: share of texts that are left out in training.

    Raises:
        ValueError: if `sample_size` is not a multiple of `patch_size`.
    Source: Yao et al., CVPR 2025 (arXiv 2501.01423). XL/1 with 32 channels has 675 M parameters, B/1 has 130 M.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LightningDiTBlock"]
    _repeated_blocks = ["LightningDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embedding", "text_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: PositiveInt = 16,
        patch_size: PositiveInt = 1,
        in_channels: PositiveInt = 32,
        num_layers: PositiveInt = 28,
        num_attention_heads: PositiveInt = 16,
        attention_head_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 72,
        mlp_ratio: PositiveFloat = 4.0,
        num_classes: NonNegativeInt = 1000,
        class_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.1,
        qk_norm: bool = False,
        wo_shift: bool = False,
        text_dim: PositiveInt | None = None,
        text_dropout_prob: Annotated[float, Field(ge=0, le=1)] = 0.1,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size {sample_size} is not a multiple of patch_size {patch_size}")
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = PatchEmbed(sample_size, sample_size, patch_size, in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = LabelEmbedding(num_classes, dim, class_dropout_prob) if num_classes else None
        self.text_embedding = None if text_dim is None else TimestepEmbedding(text_dim, dim)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(
                dim,
                num_heads=num_attention_heads,
                head_dim=attention_head_dim,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                wo_shift=wo_shift,
                text_dim=text_dim,
            )
            for _ in range(num_layers)
        )
        self.norm_out = RMSNorm(dim, eps=1e-6)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

        grid = sample_size // patch_size
        cos, sin = axial_rotary_embedding(grid, attention_head_dim)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        blocks = [module for module in self.modules() if isinstance(module, LightningDiTBlock)]
        for block in blocks:
            xavier_uniform_of_rows(block.attn.to_q, block.attn.to_k, block.attn.to_v)
            xavier_uniform_of_rows(block.ff.gate, block.ff.linear_in)
        projection = self.patch_embed.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.out_channels, -1))
        nn.init.zeros_(projection.bias)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding.embedding_table.weight, std=0.02)
        if self.text_embedding is not None:
            nn.init.normal_(self.text_embedding.linear_1.weight, std=0.02)
            nn.init.normal_(self.text_embedding.linear_2.weight, std=0.02)
        for block in blocks:
            if block.text_attn is not None:
                for null in (block.text_attn.null_key, block.text_attn.null_value):
                    assert null is not None
                    nn.init.normal_(null, std=0.02)
                nn.init.zeros_(block.text_attn.to_out.weight)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        # adaLN-Zero: every block starts as the identity and the output as zero.
        for layer in (*(block.modulation for block in blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Args:
            hidden_states: (B, C, h, w), the normalized latent x_t.
            timestep: (B,), t from 0 (noise) to 1 (data), unlike diffusers' 0 to 1000.
            class_labels: (B,), int64, from 0 to `num_classes` (the null class); of a model with classes.
            encoder_hidden_states: (B, L, text_dim), the text embeddings; of a model with `text_dim`.
            encoder_attention_mask: (B, L), 0 or False where there is no text; None if there is text everywhere.
        Returns:
            `sample` (B, C, h, w), the velocity data - noise.
        Raises:
            ValueError: if the latent has another shape than the model was built for, if classes or texts are missing or
                too many, or if the mask does not fit the text.
        """
        size, patch = self.config.sample_size, self.config.patch_size
        expected = (self.config.in_channels, size, size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(f"built for latents of shape {expected}, got {tuple(hidden_states.shape[1:])}")
        for name, value, wanted in (
            ("class_labels", class_labels, self.class_embedding is not None),
            ("encoder_hidden_states", encoder_hidden_states, self.text_embedding is not None),
        ):
            if (value is not None) != wanted:
                raise ValueError(f"this model {'needs' if wanted else 'takes no'} {name}")

        # 1. Condition and patches
        dtype = hidden_states.dtype
        with no_autocast(hidden_states.device):  # half precision could not tell neighboring times apart
            frequencies = self.time_proj(timestep.float()).to(parameter_dtype(self.time_embedding))
            time = self.time_embedding(frequencies).to(dtype)
        condition, text, text_mask = time, None, None  # (B, D)
        # Guidance leads away from neither class nor text, so that one number decides which of them a sample lacks.
        has_both = self.class_embedding is not None and self.text_embedding is not None
        draws = torch.rand(len(time), device=time.device) if self.training and has_both else None
        if self.class_embedding is not None and class_labels is not None:
            embed = self.class_embedding
            if draws is not None:
                class_labels = torch.where(draws < embed.dropout_prob, embed.num_classes, class_labels)
                embed = embed.embedding_table
            condition = condition + embed(class_labels)
        if self.text_embedding is not None and encoder_hidden_states is not None:
            dropout = self.config.text_dropout_prob if self.training else 0.0
            text, mask = prepare_text(encoder_hidden_states, encoder_attention_mask, dtype, dropout, draws)
            condition = condition + self.text_embedding(mean_of_text(text, mask))
            text_mask = F.pad(mask, (1, 0), value=True)[:, None, None]
        rotary = (self.rotary_cos, self.rotary_sin)
        hidden_states = self.patch_embed(hidden_states).to(dtype)  # (B, N, D)

        # 2. Blocks
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, condition, rotary, text, text_mask
                )
            else:
                hidden_states = block(hidden_states, condition, rotary, text, text_mask)

        # 3. Tokens to a velocity of the latent's shape
        shift, scale = self.modulation_out(F.silu(condition)).chunk(2, dim=1)
        hidden_states = self.proj_out(modulate(self.norm_out(hidden_states), shift, scale))
        grid = size // patch
        hidden_states = hidden_states.unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, -1))
        sample = hidden_states.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, C, h, w)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)
