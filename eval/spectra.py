"""Spectra of images, and where in them high frequencies are missed."""

import torch
import torch.nn.functional as F
from torch import Tensor

ZOOM = 4  # a window is 1 / ZOOM of each side


def radial_spectrum(images: Tensor) -> Tensor:
    """Power at each distance from the origin of frequency space, mean over channels and directions.

    Args:
        images: (B, C, H, W) with H = W, any unit u.
    Returns:
        (B, H // 2 + 1), float32, in u^2 per coefficient of the orthonormal FFT; entry r is the ring of r cycles per
        image.
    """
    size = images.shape[-1]
    power = torch.fft.fft2(images.float(), norm="ortho").abs().square().mean(1).flatten(1)
    frequency = torch.fft.fftfreq(size, device=images.device) * size
    ring = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().round().long().flatten()
    count = torch.bincount(ring)
    total = power.new_zeros(len(images), len(count)).index_add_(1, ring, power)
    return (total / count)[:, : size // 2 + 1]


def high_frequency_error(difference: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H, W): the squared error beyond what its 4 x 4 means explain."""
    low = F.interpolate(F.avg_pool2d(difference, 4, ceil_mode=True), size=difference.shape[-2:], mode="bilinear")
    return (difference - low).square().mean(dim=1)


def worst_windows(error: Tensor) -> Tensor:
    """(N, H, W) -> (N, 4): top, left, height and width of the window with the largest sum, of 1 / ZOOM of each side."""
    height, width = (max(1, side // ZOOM) for side in error.shape[-2:])
    corner = F.pad(error.double().cumsum(1).cumsum(2), (1, 0, 1, 0))  # sums over rectangles that begin at the top left
    right = corner[:, :, width:] - corner[:, :, :-width]
    sums = right[:, height:] - right[:, :-height]
    best = sums.flatten(1).argmax(dim=1)
    size = torch.tensor([height, width]).expand(len(best), 2)
    return torch.cat([torch.stack([best // sums.shape[-1], best % sums.shape[-1]], dim=1), size], dim=1)
