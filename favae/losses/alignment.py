"""Alignment with the features of a frozen vision model: of latents, and of the hidden states of a generator."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.losses.shapes import check_same_shape
from favae.precision import no_autocast


def vision_foundation_alignment(
    projected: Tensor, features: Tensor, *, distmat_margin: float = 0.25, cosine_margin: float = 0.5
) -> Tensor:
    """Pulls latents towards a feature map, position by position and in how positions relate to each other.

    L = mean_{i,j} relu(|cos(z_i, z_j) - cos(f_i, f_j)| - distmat_margin)
        + mean_i relu(1 - cosine_margin - cos(z_i, f_i))

    where i, j run over the h*w positions of one image.

    Args:
        projected: z, (B, C, h, w), the latents after a linear map to the channels of the features.
        features: f, (B, C, h, w), not differentiated. Any floating dtypes; computed in float32.
        distmat_margin, cosine_margin: differences smaller than these cost nothing.
    Returns:
        Scalar >= 0.
    Raises:
        ValueError: if the shapes differ.
    Source: Yao et al., CVPR 2025 (VA-VAE, arXiv 2501.01423), eq. 3-6; their defaults.
    """
    check_same_shape(projected, features)
    with no_autocast(projected.device):
        z = F.normalize(projected.float().flatten(2), dim=1)  # (B, C, N)
        f = F.normalize(features.detach().float().flatten(2), dim=1)
        distances = (z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs()  # (B, N, N)
        cosine = (z * f).sum(dim=1)  # (B, N)
        return F.relu(distances - distmat_margin).mean() + F.relu(1 - cosine_margin - cosine).mean()


class PrincipalComponents(nn.Module):
    """The strongest directions of a feature map, each with variance 1: a small teacher made of a large one.

    Aligned to these, latents themselves say what the features say, without a projector that learns between them. The
    components are the best linear compression of the features, in place of the network that GAE (arXiv 2603.10365)
    trains for it.

    Args:
        channels: of the features, D. components: how many directions, C <= D.
    """

    mean: Tensor
    directions: Tensor

    def __init__(self, channels: int, components: int):
        super().__init__()
        if components > channels:
            raise ValueError(f"features of {channels} channels have fewer than {components} components")
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("directions", torch.zeros(components, channels))

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Finds them in feature maps (N, D, h, w)."""
        rows = features.double().movedim(1, -1).flatten(0, -2)
        self.mean.copy_(rows.mean(dim=0))
        values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))  # smallest first
        strongest = slice(-len(self.directions), None)
        scale = values[strongest].clamp_min(values[-1] * 1e-12).rsqrt()
        self.directions.copy_((vectors[:, strongest] * scale).T.flip(0))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, C, h, w), float32, strongest first."""
        centered = features.float() - self.mean[:, None, None]
        return torch.einsum("cd,bdhw->bchw", self.directions, centered)


def representation_alignment(projected: Tensor, features: Tensor) -> Tensor:
    """Pulls a generator's hidden states towards a feature map, position by position.

    L = mean_i (1 - cos(h_i, g_i)),   g = (f - mean_i f) / std_i f  per image and channel

    where i runs over the h*w positions of one image. What all positions have in common is left out of the features, so
    that only their structure in space counts.

    Args:
        projected: h, (B, C, h, w), the hidden states after a projector to the channels of the features.
        features: f, (B, C, h, w), not differentiated. Any floating dtypes; computed in float32.
    Returns:
        Scalar in [0, 2].
    Raises:
        ValueError: if the shapes differ.
    Source: Yu et al., ICLR 2025 (REPA, arXiv 2410.06940); the normalization: Singh et al., 2025 (iREPA, arXiv
        2512.10794), here with all of the mean subtracted.
    """
    check_same_shape(projected, features)
    with no_autocast(projected.device):
        f = features.detach().float()
        f = (f - f.mean((2, 3), keepdim=True)) / (f.std((2, 3), correction=0, keepdim=True) + 1e-6)
        return 1 - F.cosine_similarity(projected.float(), f, dim=1).mean()
