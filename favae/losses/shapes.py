"""The check that losses share: torch would broadcast two tensors of different shapes without an error."""

from torch import Tensor


def check_same_shape(first: Tensor, second: Tensor) -> None:
    """Raises ValueError if the shapes differ."""
    if first.shape != second.shape:
        raise ValueError(f"the tensors {tuple(first.shape)} and {tuple(second.shape)} of a loss differ in shape")
