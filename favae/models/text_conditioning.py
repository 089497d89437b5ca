"""Text embeddings as generators take them: what is padding or left out is masked."""

import torch
from torch import Tensor


def prepare_text(
    embeddings: Tensor,
    mask: Tensor | None,
    dtype: torch.dtype,
    dropout: float = 0.0,
    draws: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Embeddings with padding set to zero, and their mask.

    Args:
        embeddings: (B, L, D). mask: (B, L), or None if there is text everywhere.
        dtype: of the result.
        dropout: share of texts that are left out as a whole.
        draws: (B,), numbers in [0, 1) that decide which; None draws them.
    Returns:
        Embeddings (B, L, D), and the mask (B, L), bool.
    Raises:
        ValueError: for a mask of another shape.
    """
    if mask is None:
        mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
    elif mask.shape != embeddings.shape[:2]:
        shapes = tuple(mask.shape), tuple(embeddings.shape)
        raise ValueError(f"a text mask of shape {shapes[0]} does not fit text embeddings of shape {shapes[1]}")
    mask = mask.bool()
    if dropout > 0:
        draws = torch.rand(len(mask), device=mask.device) if draws is None else draws
        mask = mask & (draws >= dropout).unsqueeze(1)
    # An infinite padding would spread in spite of the mask.
    return embeddings.to(dtype).masked_fill(~mask.unsqueeze(-1), 0), mask


def mean_of_text(embeddings: Tensor, mask: Tensor) -> Tensor:
    """The mean of what `prepare_text` gives over the tokens of each text: (B, D), 0 for no text."""
    count = mask.sum(1).clamp_min(1).unsqueeze(1)
    return embeddings.sum(1) / count.to(embeddings.dtype)
