"""The block of `CATTransformerModel`: causal self-attention, attention to a text, feed-forward; and its cache."""

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class LayerCache:
    """Keys and values of one block, (B, slots, heads or 1, head_dim), and those of its text.

    Memory for all slots is taken at the first token, and every later token is written at an index that is a tensor: the
    shapes never change, so one compiled graph serves all positions.
    """

    slots: int
    key: Tensor | None = None
    value: Tensor | None = None
    text: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Writes keys and values to the slots (n,) and returns those of all slots; unwritten slots are zero.

        Values may be the same tensor as the keys; then they are stored once.
        """
        if self.key is None or self.value is None:
            self.key = key.new_zeros(len(key), self.slots, *key.shape[2:])
            self.value = self.key if value is key else torch.zeros_like(self.key)
        self.key.index_copy_(1, slot, key)
        if value is not key:
            self.value.index_copy_(1, slot, value)
        return self.key, self.value


class CATAttention(nn.Module):
    """Attention to a context that may begin with a learned null key and value.

    Args:
        dim: width of the stream.
        num_heads, head_dim: of the attention; their product need not be the width.
        context_dim: width of the context.
        shared_key_value: all query heads share one key head, and its keys are the values too.
        has_null: whether there is a null key and value.
    """

    def __init__(
        self, dim: int, *, num_heads: int, head_dim: int, context_dim: int, shared_key_value: bool, has_null: bool
    ):
        super().__init__()
        self.heads, self.head_dim = num_heads, head_dim
        width = head_dim if shared_key_value else num_heads * head_dim
        self.to_q = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = None if shared_key_value else nn.Linear(context_dim, width, bias=False)
        self.null_key = nn.Parameter(torch.empty(width)) if has_null else None
        self.null_value = nn.Parameter(torch.empty(width)) if has_null and not shared_key_value else None
        self.null_count = int(has_null)
        self.to_out = nn.Linear(num_heads * head_dim, dim)

    def key_value(self, context: Tensor, with_null: bool) -> tuple[Tensor, Tensor]:
        """(B, L, context_dim) -> keys and values (B, L, heads or 1, head_dim); the null, if there is one, in front."""
        key = self._split_heads(self.to_k(context), self.null_key if with_null else None)
        if self.to_v is None:
            return key, key
        return key, self._split_heads(self.to_v(context), self.null_value if with_null else None)

    def _split_heads(self, projected: Tensor, null: Tensor | None) -> Tensor:
        if null is not None:
            projected = torch.cat([null.to(projected.dtype).expand(len(projected), 1, -1), projected], dim=1)
        return projected.unflatten(-1, (-1, self.head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        context: Tensor | tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """
        Args:
            hidden_states: (B, N, dim), the queries.
            context: (B, L, context_dim), before which the null stands; or its keys and values, by `key_value`.
            mask: broadcasts to (B, heads, N, L); bool, True where attention is allowed, or a bias that is added.
            is_causal: query n sees keys 0 to n, without a mask.
        Returns:
            (B, N, dim).
        """
        query = self.to_q(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, N, heads, head_dim)
        if isinstance(context, Tensor):
            context = self.key_value(context, with_null=True)
        key, value = (x.expand(-1, -1, self.heads, -1) for x in context)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        return self.to_out(dispatch_attention_fn(query, key, value, attn_mask=mask, is_causal=is_causal).flatten(2))


class RelativePosition(nn.Module):
    """A bias per head for the rows and columns between the cell that a query predicts and the cell that a key holds.

    Bias = table[row of the query - row of the key, column of the query - column of the key], and one entry for the
    start token. The published code takes a query's place in the sequence, start token included, for its cell, which
    shifts keys by one cell; this one does not.

    Args:
        size: height and width of the grid.
        num_heads: of the attention.
    """

    index: Tensor

    def __init__(self, size: int, num_heads: int):
        super().__init__()
        self.bias = nn.Embedding(size * (2 * size - 1) + 1, num_heads)
        query = torch.arange(size**2).unsqueeze(1)
        key = torch.arange(-1, size**2 - 1).unsqueeze(0)  # the start token, then all tokens but the last
        row = (query // size - key // size).clamp_min(0)  # negative for later tokens, which are masked
        index = row * (2 * size - 1) + query % size - key % size + size - 1
        index[:, 0] = size * (2 * size - 1)
        self.register_buffer("index", index, persistent=False)

    def forward(self, cells: Tensor) -> Tensor:
        """Biases (heads, queries, N) of the queries that predict these cells (queries,), row by row; the first key is
        the start token."""
        return self.bias(self.index[cells]).permute(2, 0, 1)


class CATBlock(nn.Module):
    """Causal self-attention, attention to the text, feed-forward; each after a norm and added to the stream.

    Args:
        dim: width of the stream, D.
        num_heads, head_dim: of both attentions.
        text_dim: width of the text embeddings.
        mlp_ratio: width of the feed-forward divided by D.
        dropout: of what each part adds.
        shared_key_value: see `CATAttention`; self-attention then has a null key beside the tokens, as published.
        relative_position_size: height and width of the grid for a `RelativePosition`; None for none.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        text_dim: int,
        mlp_ratio: float,
        dropout: float,
        shared_key_value: bool,
        relative_position_size: int | None,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CATAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=dim,
            shared_key_value=shared_key_value,
            has_null=shared_key_value,
        )
        self.relative_position = None
        if relative_position_size is not None:
            self.relative_position = RelativePosition(relative_position_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = CATAttention(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            context_dim=text_dim,
            shared_key_value=shared_key_value,
            has_null=True,
        )
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def initialize_outputs(self, std: float) -> None:
        """Normal weights of this std for the layers that write into the stream."""
        for layer in (self.attn.to_out, self.cross_attn.to_out, self.ff[-1]):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=std)

    def _causal_mask(self, cells: Tensor | None, key: Tensor, visible: Tensor | None) -> dict:
        """The arguments `mask` or `is_causal` of self-attention for queries that predict these cells; None for all.

        Keys (B, slots, heads or 1, head_dim) are those of the null, if there is one, of the start token, and of all
        tokens but the last. The query that predicts cell n sees the null and the first visible[n] of the others; None
        for those of the cells before n.
        """
        null, slots, device = self.attn.null_count, key.shape[1], key.device
        if cells is None and null == 0 and self.relative_position is None and visible is None:
            return {"is_causal": True}
        cells = torch.arange(slots - null, device=device) if cells is None else cells
        seen = cells + 1 if visible is None else visible[cells]
        allowed = torch.arange(slots, device=device) < seen.unsqueeze(1) + null  # (queries, slots)
        if self.relative_position is None:
            return {"mask": allowed[None, None]}
        bias = F.pad(self.relative_position(cells), (null, 0))
        return {"mask": bias.masked_fill(~allowed, -torch.inf).unsqueeze(0)}  # (1, heads, queries, slots)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        text_mask: Tensor,
        visible: Tensor | None = None,
        cells: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: (B, N, D); with a cache (B, n, D), of some positions.
            encoder_hidden_states: (B, L, text_dim), the text embeddings.
            text_mask: (B, 1, 1, 1 + L), bool; the first entry is the null's.
            visible: (N,), int64, how many positions each position sees, itself included; None: it and those before.
            cells: (n,), int64, the cells that the positions predict.
            cache: of the positions before them; changed in place.
        Returns:
            The shape of `hidden_states`.
        """
        # 1. Causal self-attention
        is_first = cache is None or cache.key is None
        normed = self.norm1(hidden_states)
        key, value = self.attn.key_value(normed, with_null=is_first)
        if cache is not None and cells is not None:
            slots = torch.arange(key.shape[1], device=cells.device) if is_first else cells + self.attn.null_count
            key, value = cache.update(key, value, slots)
        attended = self.attn(normed, (key, value), **self._causal_mask(cells, key, visible))
        hidden_states = hidden_states + self.dropout(attended)

        # 2. Attention to the text, which is projected once
        text = None if cache is None else cache.text
        if text is None:
            text = self.cross_attn.key_value(encoder_hidden_states, with_null=True)
        if cache is not None:
            cache.text = text
        attended = self.cross_attn(self.norm2(hidden_states), text, mask=text_mask)
        hidden_states = hidden_states + self.dropout(attended)

        # 3. Feed-forward
        return hidden_states + self.dropout(self.ff(self.norm3(hidden_states)))
