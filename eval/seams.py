"""How visible the borders of patches are in images."""

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from favae.autoencoders import spatial_compression_ratio
from favae.errors import ModelError


def neighbor_differences(images: Tensor) -> Tensor:
    """Mean absolute differences of neighboring pixels at each place between columns, and between rows.

    Args:
        images: (B, C, H, W), any unit.
    Returns:
        (B, W - 1 + H - 1), float32.
    """
    images = images.float()
    between_columns = images.diff(dim=3).abs().mean((1, 2))
    between_rows = images.diff(dim=2).abs().mean((1, 3))
    return torch.cat([between_columns, between_rows], dim=1)


def seams(differences: np.ndarray, size: tuple[int, int], patch_size: int) -> float | None:
    """How much neighbors differ across the borders of patches, in units of how much they differ elsewhere.

    Args:
        differences: (W - 1 + H - 1,), the mean of `neighbor_differences` over images.
        size: (H, W). patch_size: pixels along each side of a patch; the pixels that a latent stands for.
    Returns:
        1 for images without borders of patches; None if an image is one patch, or each pixel is.
    """
    height, width = size
    ratios = []
    for steps in (differences[: width - 1], differences[width - 1 :]):
        border = np.arange(1, len(steps) + 1) % patch_size == 0
        if border.all() or not border.any() or not steps[~border].any():
            return None
        ratios.append(steps[border].mean() / steps[~border].mean())
    return float(np.mean(ratios))


def relative_seams(
    differences: np.ndarray | None, reference: np.ndarray | None, size: tuple[int, int], patch_size: int | None
) -> float | None:
    """`seams` of images by those of real images: (W - 1 + H - 1,) both. None if something is not known."""
    if patch_size is None or differences is None or reference is None:
        return None
    own, real = seams(differences, size, patch_size), seams(reference, size, patch_size)
    return own / real if own is not None and real else None


def patch_size_of(vae: ModelMixin) -> int | None:
    """Pixels along each side of what one latent stands for; None if the autoencoder does not tell."""
    try:
        return spatial_compression_ratio(vae)
    except ModelError:
        return None
