"""Spectra of latents: a loss that brings them to those of images, and masks that cut the same frequencies of both."""

import functools

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor

from favae.precision import no_autocast

RADIAL_BINS = 16


@functools.cache
def _dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II: (size, size), float64, frequencies along the rows."""
    return torch.from_numpy(scipy.fft.dct(np.eye(size), norm="ortho", axis=0))


def dct(images: Tensor) -> Tensor:
    """Orthonormal DCT-II over the last two axes: (..., h, w), float32 or float64."""
    rows, columns = (_dct_matrix(size).to(images) for size in images.shape[-2:])
    return rows @ images @ columns.mT


def inverse_dct(spectrum: Tensor) -> Tensor:
    """The inverse of `dct`."""
    rows, columns = (_dct_matrix(size).to(spectrum) for size in spectrum.shape[-2:])
    return rows.mT @ spectrum @ columns


def spectrum_matching_loss(latents: Tensor, images: Tensor, *, delta: float = 1.0) -> Tensor:
    """The divergence of the latents' radial power spectrum from the flattened spectrum of the images.

    L = mean_B KL(p_x || p_z), p = s / sum s, s = log(1 + power), with the power in 16 rings of equal width of the DCT,
    without the mean of each channel, averaged over channels; the images' is multiplied by b^delta in ring b = 1 ... 16.

    Args:
        latents: (B, C, h, w), samples of the posterior. images: (B, C', H, W), made smaller to (h, w) here.
        delta: 0 asks for the images' spectrum, about 1 / f^2; 1 for about 1 / f.
    Returns:
        Scalar, 0 for equal spectra. The gradient is the latents' alone.
    Source: ESM, arXiv 2603.14645, but that images are made smaller with antialiasing, not blurred before.
    """
    with no_autocast(latents.device):
        latents = latents.float() if latents.dtype != torch.float64 else latents
        small = F.interpolate(images.to(latents), size=latents.shape[-2:], mode="bicubic", antialias=True).detach()
        numbers, rings = (values.to(latents) for values in _rings(*latents.shape[-2:]))
        flattened = _ring_power(small, rings) * numbers**delta
        target, found = (torch.log1p(power) + 1e-8 for power in (flattened, _ring_power(latents, rings)))
        target, found = (power / power.sum(dim=1, keepdim=True) for power in (target, found))
        return (target * (target.log() - found.log())).sum(dim=1).mean()


@functools.cache
@torch.inference_mode(False)  # which the first call may be in, and no later one could learn with what it leaves
def _rings(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The numbers b of the rings that have frequencies, (R,), and weights (R, h, w) whose sums are means over them."""
    radius = torch.hypot(*torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij"))
    ring = (RADIAL_BINS * radius / radius.max()).long().clamp(max=RADIAL_BINS - 1)
    numbers, sizes = ring.unique(return_counts=True)
    members = (ring == numbers[:, None, None]).float() / sizes[:, None, None]
    return numbers + 1, members


def _ring_power(images: Tensor, rings: Tensor) -> Tensor:
    """The mean power in each ring, without the means of channels: (B, C, h, w) -> (B, rings)."""
    power = dct(images - images.mean((2, 3), keepdim=True)).square().mean(dim=1)
    return torch.einsum("bhw,rhw->br", power, rings)


def keep_low_frequencies(images: Tensor, share: float, block: int) -> Tensor:
    """Sets the high frequencies of each block to zero: those with u + v >= (2 - share) block - 1.

    Args:
        images: (B, C, H, W), H and W multiples of `block`.
        share: how much is cut: 0 nothing, 1 the diagonal and all above it, 1.5 keeps u + v < block / 2 - 1.
        block: side of the blocks, whose DCT is cut.
    Returns:
        (B, C, H, W), float32 or float64.
    Raises:
        ValueError: if no number of blocks fills the images.
    Source: DSM, arXiv 2603.14645: shares 1, 1.25 and 1.5, blocks of 8 of latents and of images.
    """
    height, width = images.shape[-2:]
    if height % block or width % block:
        raise ValueError(f"blocks of {block} do not fill {height} x {width}")
    blocks = images.unflatten(3, (-1, block)).unflatten(2, (-1, block)).transpose(3, 4)  # (B, C, rows, columns, b, b)
    u = torch.arange(block, device=images.device)
    kept = u[:, None] + u < (2 - share) * block - 1
    with no_autocast(images.device):
        blocks = inverse_dct(dct(blocks if blocks.dtype == torch.float64 else blocks.float()) * kept)
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)
