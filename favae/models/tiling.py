"""Large images in tiles."""

from collections.abc import Callable

import torch
from torch import Tensor


def map_tiles(function: Callable[[Tensor], Tensor], sample: Tensor, tile: int, overlap: int, unit: int = 1) -> Tensor:
    """Applies a function to overlapping square tiles and cross-fades what it gives.

    All tiles have the full size, the last ones lie flush with the border: a sliver at the edge, with the statistics and
    the attention of a few pixels, would not look like its neighbours.

    Args:
        function: (B, C, t, t) -> (B, C', r t, r t), with the same ratio r for all.
        sample: (B, C, H, W), multiples of `unit`.
        tile, overlap: t and what neighbours share at least; multiples of `unit`, 0 <= overlap < tile.
        unit: where tiles may begin.
    Returns:
        (B, C', r H, r W).
    Raises:
        ValueError: for another overlap.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}; the overlap must be from 0 to below the tile")
    size = [min(tile, length) for length in sample.shape[-2:]]
    starts = [_starts(length, t, max(t - overlap, unit)) for length, t in zip(sample.shape[-2:], size)]
    total = weights = None
    for top in starts[0]:
        for left in starts[1]:
            output = function(sample[..., top : top + size[0], left : left + size[1]])
            height, width = output.shape[-2:]

            def scaled(length: int) -> int:
                return length * height // size[0]  # noqa: B023

            if total is None:
                shape = (*output.shape[:-2], *(scaled(length) for length in sample.shape[-2:]))
                total, weights = output.new_zeros(shape, dtype=torch.float32), output.new_zeros(shape[-2:]).float()
            faded = _ramp(height, scaled(overlap), output)[:, None] * _ramp(width, scaled(overlap), output)
            area = (..., slice(scaled(top), scaled(top) + height), slice(scaled(left), scaled(left) + width))
            total[area] += faded * output
            weights[area] += faded
    return (total / weights).to(output.dtype)


def _starts(length: int, tile: int, step: int) -> list[int]:
    return [*range(0, length - tile, step), length - tile]


def _ramp(length: int, overlap: int, like: Tensor) -> Tensor:
    """Rises over the overlap and falls over it at the end, float32."""
    distance = torch.arange(1, length + 1, device=like.device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
