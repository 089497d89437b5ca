"""Meters of latents: how hard they will be for a generator, before one is trained.

Latents are (N, C, h, w), of N images. Every meter standardizes each channel over the set first, so that the scale of a
channel does not count. Values can be compared between latents of one size, of models that
reconstruct about equally well.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.fft import dctn
from torch import Tensor

from favae.errors import DataError

FLIP_FLOPS = 5  # rounds of the estimate of a covariance, as published
SAMPLES_PER_PARAMETER = 5  # numbers per row of a covariance; fewer bias VIV down
NEIGHBORS = 5  # of LNC
PART = 1024  # images that are handled at once
SMALLEST_STD = 1e-6  # of a channel that is not constant; that of the posterior with the smallest log-variance
INTERPOLATION_NEIGHBORS = 10  # of the interpolated FID


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std of each channel over all images and positions, (C, 1, 1) each, float64; of a constant one std 1."""
    count = latents[:, 0].numel()
    mean = sum(part.double().sum((0, 2, 3)) for part in latents.split(PART)).view(-1, 1, 1) / count
    squares = ((part.double() - mean).square().sum((0, 2, 3)) for part in latents.split(PART))
    std = (sum(squares).view(-1, 1, 1) / count).sqrt()
    return mean, torch.where(std > SMALLEST_STD + torch.finfo(torch.float32).eps * mean.abs(), std, 1)


def standardized(latents: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1 over all images and positions, float64; a constant channel stays 0."""
    mean, std = channel_statistics(latents)
    return (latents.double() - mean) / std


@dataclass
class VelocityVariance:
    """What `velocity_variance` measures.

    Attributes:
        viv: the irreducible part of a flow model's velocity loss, per number of the latent, if each class is Gaussian
            and all channels have the same spectrum.
        rho: the mean over classes of their variance; of classes of equal sizes, the share of the variance that is
            within them. Above 1 only if small classes vary more.
        phi: viv / (pi / 2 sqrt(rho)), in [0, 1]: the shape alone. 1 is white noise within each class.
    """

    viv: float
    rho: float
    phi: float


def velocity_variance(latents: Tensor, labels: Tensor) -> VelocityVariance:
    r"""VIV, the variance of the velocity that no generator can explain, with its two factors.

    For a class whose covariance has the d eigenvalues l_i, VIV = pi / (2 d) sum_i sqrt(l_i); the mean over classes is
    returned. The covariance is a product of one over channels and one over positions, found in five rounds of a
    flip-flop, whose trace is the class's variance. Channels whose spectra differ are no such product, and their VIV may
    be too low or too high: half of them smooth and half of them white noise have half of their true one. As in the
    source, the variance of n images of a class is divided by n: compare sets with as many of each class.

    Args:
        latents: (N, C, h, w). labels: (N,), the class of each.
    Raises:
        DataError: if a class has so few images that the estimate would be too low.
    Source: arXiv 2606.03578.
    """
    mean, std = channel_statistics(latents)
    channels, positions = latents.shape[1], latents.shape[2] * latents.shape[3]
    needed = math.ceil(SAMPLES_PER_PARAMETER * max(positions / channels, channels / positions))
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < needed:
        raise DataError(
            f"VIV of latents of {channels} x {latents.shape[2]} x {latents.shape[3]} needs {needed} images of each "
            f"class, and one has {int(counts.min())}"
        )
    vivs, variances = [], []
    for label in classes:
        own = ((latents[labels == label].double() - mean) / std).flatten(2)  # (n, C, hw)
        own = own - own.mean(dim=0)
        variance = own.square().mean()
        values = torch.outer(*_kronecker_eigenvalues(own)).flatten().clamp(min=0)
        values = values * (variance / values.mean()) if variance > 0 else values
        vivs.append(math.pi / 2 * values.sqrt().mean())
        variances.append(variance)
    viv, rho = float(torch.stack(vivs).mean()), float(torch.stack(variances).mean())
    return VelocityVariance(viv, rho, viv / (math.pi / 2 * math.sqrt(rho)) if rho else 0.0)


def _kronecker_eigenvalues(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a covariance over channels and one over positions, whose product fits (n, C, hw) best."""
    number, channels, positions = centered.shape
    over_positions = torch.eye(positions, dtype=centered.dtype)
    over_channels = torch.eye(channels, dtype=centered.dtype)
    for _ in range(FLIP_FLOPS):
        over_channels = _weighted_covariance(centered, over_positions) / (number * positions)
        over_positions = _weighted_covariance(centered.mT, over_channels) / (number * channels)
    return torch.linalg.eigvalsh(over_channels), torch.linalg.eigvalsh(over_positions)


def _weighted_covariance(samples: Tensor, covariance: Tensor) -> Tensor:
    """sum_i X_i W X_i^T for samples (n, a, b), where W is the pseudoinverse of a covariance (b, b)."""
    return torch.einsum("nab,bc,ndc->ad", samples, torch.linalg.pinv(covariance, hermitian=True), samples)


def power_spectrum(latents: Tensor) -> np.ndarray:
    """The mean square of the orthonormal DCT-II of standardized latents, per channel: (C, h, w)."""
    mean, std = channel_statistics(latents)
    parts = (((part.double() - mean) / std).numpy() for part in latents.split(PART))
    return sum(np.square(dctn(part, axes=(2, 3), norm="ortho")).sum(axis=0) for part in parts) / len(latents)


def high_frequency_share(spectrum: np.ndarray, above: float) -> float:
    """SEC: the share of the energy at u + v > above * (h - 1 + w - 1), for DCT frequencies u and v from 0 on.

    White noise has 0.84 to 0.87 above a quarter, and 0.44 to 0.48 above a half, from 8 x 8 to 32 x 32; constant latents
    have 0.

    Args:
        spectrum: (C, h, w), of `power_spectrum`.
    Source: arXiv 2606.03578, but that channels are standardized here.
    """
    energy = spectrum.mean(axis=0)
    u, v = np.indices(energy.shape)
    high = energy[u + v > above * (energy.shape[0] + energy.shape[1] - 2)].sum()
    return float(high / energy.sum()) if energy.sum() else 0.0


def interpolated(latents: Tensor, fraction: float = 0.5) -> Tensor:
    """Each latent moved along a great circle towards one of the ten others that are nearest by the cosine.

    Which of the ten is random, with the softmax of their negative mean squared distances. This is done on standardized
    latents, which are centered as such a circle wants it; the result has the scale of what was given.

    Args:
        latents: (N, C, h, w), N > 10. fraction: of the way, 0 ... 1.
    Raises:
        DataError: if there are too few images.
    Source: arXiv 2603.05630, but that the others are of the same set, not of the training set.
    """
    if len(latents) <= INTERPOLATION_NEIGHBORS:
        raise DataError(f"interpolation needs more than {INTERPOLATION_NEIGHBORS} images, got {len(latents)}")
    points = standardized(latents).flatten(1)
    directions = F.normalize(points, dim=1)
    generator, moved = torch.Generator().manual_seed(0), []
    for rows in torch.arange(len(points)).split(PART):
        cosines = directions[rows] @ directions.mT
        cosines[torch.arange(len(rows)), rows] = -torch.inf
        nearest = cosines.topk(INTERPOLATION_NEIGHBORS).indices
        distances = (points[nearest] - points[rows, None]).square().mean(dim=2)
        chosen = torch.multinomial(F.softmax(-distances, dim=1), 1, generator=generator)
        partners = nearest.gather(1, chosen).squeeze(1)
        angle = cosines.gather(1, partners[:, None]).clamp(-1, 1).acos().clamp(min=1e-6)
        weights = [torch.sin(part * angle) / torch.sin(angle) for part in (1 - fraction, fraction)]
        moved.append(weights[0] * points[rows] + weights[1] * points[partners])
    std, mean = torch.std_mean(latents.double(), dim=(0, 2, 3), correction=0, keepdim=True)
    return (torch.cat(moved).view_as(latents) * std + mean).to(latents.dtype)


def neighbor_consistency(latents: Tensor, labels: Tensor) -> float:
    """LNC: how often an image's five nearest others, by the cosine of the mean latent over positions, share its class.

    Args:
        latents: (N, C, h, w), N > 5. labels: (N,).
    Returns:
        In [0, 1]; the share of the class is what chance gives.
    Raises:
        DataError: if there are too few images, or no classes.
    Source: arXiv 2606.03578, over the whole image, without masks of the foreground.
    """
    if len(latents) <= NEIGHBORS:
        raise DataError(f"LNC needs more than {NEIGHBORS} images, got {len(latents)}")
    if len(labels.unique()) == 1:
        raise DataError("LNC needs classes, and all images are of one")
    mean, std = channel_statistics(latents)
    means = F.normalize((latents.mean(dim=(2, 3), dtype=torch.float64) - mean.flatten()) / std.flatten(), dim=1)
    same = []
    for rows in torch.arange(len(means)).split(PART):
        similarity = means[rows] @ means.mT
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        nearest = similarity.topk(NEIGHBORS).indices
        same.append((labels[nearest] == labels[rows, None]).double().mean(dim=1))
    return float(torch.cat(same).mean())
