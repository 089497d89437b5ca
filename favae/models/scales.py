"""The order of tokens that describe an image from coarse to fine: scale by scale, or band by band."""

from dataclasses import dataclass
from typing import Literal

TokenOrder = Literal["next_scale", "next_band"]


@dataclass(frozen=True)
class Stage:
    """Tokens that a generator samples at once.

    Attributes:
        side: cells along each side of their grid.
        per_cell: tokens of each cell, which follow each other.
    """

    side: int
    per_cell: int = 1

    @property
    def tokens(self) -> int:
        return self.side**2 * self.per_cell


def make_stages(order: TokenOrder, scales: tuple[int, ...]) -> list[Stage]:
    """The stages of a latent of scales[-1] x scales[-1] positions.

    "next_scale" has one stage for each scale, with one token for each cell. "next_band" begins with the low band of the
    first scale; each further stage has the three high bands, LH, HL and HH of each cell, that lead to the next scale,
    so there are as many tokens as the latent has positions.

    Raises:
        ValueError: if scales do not grow, or, for bands, do not double.
    """
    if not scales or any(small >= large for small, large in zip((0, *scales), scales)):
        raise ValueError(f"scales must grow, got {scales}")
    if order == "next_scale":
        return [Stage(side) for side in scales]
    if any(large != 2 * small for small, large in zip(scales, scales[1:])):
        raise ValueError(f"next_band needs scales that double, such as 1, 2, 4, got {scales}")
    return [Stage(scales[0]), *(Stage(side, 3) for side in scales[:-1])]
