"""The block of `CATTransformerModel`: causal self-attention, attention to a text, feed-forward, and their cache."""

from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class LayerCache:
    """Keys and values of one block, (B, slots, heads or 1, head_dim), and those of its text.

    Memory is taken once, at the first token, and every later token is written at a place that a tensor says: shapes
    stay what they are, so that one compiled graph serves all positions.
    """

    slots: int
    key: Tensor | None = None
    value: Tensor | None = None
    text: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
        """Writes to the slots (n,) and gives all; those that nobody wrote yet are zero."""
        if self.key is None:
            self.key = key.new_zeros(len(key), self.slots, *key.shape[2:])
            self.value = self.key if value is key else torch.zeros_like(self.key)
        self.key.index_copy_(1, slot, key)
        if value is not key:
            self.value.index_copy_(1, slot, value)
        return self.key, self.value


class CATAttention(nn.Module):
    """Attention to a context, in which a learned null key and value may come first.

    With `shared`, all query heads share one key head, whose keys are the values too.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int, shared: bool, null: bool):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = head_dim if shared else heads * head_dim
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, width, bias=False)
        self.to_v = None if shared else nn.Linear(context_dim, width, bias=False)
        self.null_key = nn.Parameter(torch.empty(width)) if null else None
        self.null_value = nn.Parameter(torch.empty(width)) if null and not shared else None
        self.null_count = int(null)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def key_value(self, context: Tensor, null: bool) -> tuple[Tensor, Tensor]:
        """(B, L, context_dim) -> keys and values (B, L, heads or 1, head_dim), after the null, if there is one."""
        key = self._heads(self.to_k(context), self.null_key if null else None)
        if self.to_v is None:
            return key, key
        return key, self._heads(self.to_v(context), self.null_value if null else None)

    def _heads(self, states: Tensor, null: Tensor | None) -> Tensor:
        if null is not None:
            states = torch.cat([null.to(states.dtype).expand(len(states), 1, -1), states], dim=1)
        return states.unflatten(-1, (-1, self.head_dim))

    def forward(
        self, hidden_states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        query = self.to_q(hidden_states).unflatten(-1, (-1, self.head_dim))  # (B, N, heads, head_dim)
        key, value = (states.expand(-1, -1, self.heads, -1) for states in (key, value))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        return self.to_out(dispatch_attention_fn(query, key, value, attn_mask=mask, is_causal=is_causal).flatten(2))


class RelativePosition(nn.Module):
    """A bias per head for how many rows and columns a key lies from a query.

    A query counts as the cell whose token it predicts, a key as the cell whose token it holds, so that "the token
    above" has the same bias everywhere. The start token, which lies nowhere, has a bias of its own. The published code
    takes a token's place in the sequence, start token included, for its cell, which shifts keys by one cell.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.bias = nn.Embedding(size * (2 * size - 1) + 1, heads)
        query = torch.arange(size**2).unsqueeze(1)
        key = torch.arange(-1, size**2 - 1).unsqueeze(0)  # the start token, then all tokens but the last
        row = (query // size - key // size).clamp_min(0)  # later tokens are masked
        index = row * (2 * size - 1) + query % size - key % size + size - 1
        index[:, 0] = size * (2 * size - 1)
        self.register_buffer("index", index, persistent=False)

    def forward(self, cells: Tensor) -> Tensor:
        """(heads, queries, N) for queries that predict these cells (queries,), row by row; the start token first."""
        return self.bias(self.index[cells]).permute(2, 0, 1)


class CATBlock(nn.Module):
    """Causal self-attention, attention to the text, feed-forward; each after a norm and added to the stream."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, text_dim: int, mlp_ratio: float, dropout: float, shared: bool, grid
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = CATAttention(dim, heads, head_dim, dim, shared, null=shared)
        self.relative_position = None if grid is None else RelativePosition(grid, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = CATAttention(dim, heads, head_dim, text_dim, shared, null=True)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def _causal(self, cells: Tensor | None, key: Tensor) -> dict:
        """What queries that predict these cells, all if None, may look at: arguments of the attention.

        Keys (B, slots, heads or 1, head_dim): a null, if there is one, the start token, and all tokens but the last.
        """
        null, slots, device = self.attn.null_count, key.shape[1], key.device
        if cells is None and null == 0 and self.relative_position is None:
            return {"is_causal": True}
        cells = torch.arange(slots - null, device=device) if cells is None else cells
        allowed = torch.arange(slots, device=device) <= cells.unsqueeze(1) + null  # (queries, slots)
        if self.relative_position is None:
            return {"mask": allowed[None, None]}
        bias = F.pad(self.relative_position(cells), (null, 0))
        return {"mask": bias.masked_fill(~allowed, -torch.inf).unsqueeze(0)}  # (1, heads, queries, slots)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        text_mask: Tensor,
        cell: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D); with a cache (B, 1, D), of the position that predicts this cell (1,) alone."""
        first = cache is None or cache.key is None
        normed = self.norm1(hidden_states)
        key, value = self.attn.key_value(normed, null=first)
        if cache is not None:
            slot = torch.arange(key.shape[1], device=cell.device) if first else cell + self.attn.null_count
            key, value = cache.update(key, value, slot)
        attended = self.attn(normed, key, value, **self._causal(cell, key))
        hidden_states = hidden_states + self.dropout(attended)

        text = self.cross_attn.key_value(encoder_hidden_states, null=True) if first else cache.text
        if cache is not None:
            cache.text = text
        attended = self.cross_attn(self.norm2(hidden_states), *text, mask=text_mask)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.ff(self.norm3(hidden_states)))
