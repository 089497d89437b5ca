"""A linear path around an autoencoder: patches to latents and back, over the lowest frequencies."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# An orthonormal basis of colours: brightness, red against blue, green against both.
OPPONENT_COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
CHROMA_ENERGY = (0.05, 0.01)  # of brightness at the same frequency; measured on the photographs of scikit-image
LOGVAR_AT_START = -10.0  # of the posterior: noise of 0.007, against latents of about 1
CORRELATION_LENGTH = 5  # of photographs, in patches: their covariance is taken as exp(-distance / length)


@functools.cache
def _strongest(size: int, count: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours (channels, channels), and of each basis patch its colour (count,) and brightness (count, size, size)."""
    if count > channels * size**2:
        raise ValueError(f"a patch of {channels} x {size} x {size} has fewer than {count} basis patches")
    cosines = np.cos(math.pi / size * (np.arange(size) + 0.5) * np.arange(size)[:, None])
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)  # (frequency, position)
    colours = np.array(OPPONENT_COLOURS) if channels == 3 else np.eye(channels)
    energy = [1.0, *CHROMA_ENERGY] if channels == 3 else [1.0] * channels
    power = {
        (c, u, v): energy[c] / (u**2 + v**2) if u or v else math.inf
        for c in range(channels)
        for u in range(size)
        for v in range(size)
    }
    chosen = sorted(power, key=lambda key: (-power[key], key))[:count]
    waves = np.stack([np.outer(cosines[u], cosines[v]) for _, u, v in chosen])
    return colours / np.linalg.norm(colours, axis=1, keepdims=True), np.array([c for c, _, _ in chosen]), waves


def frequency_basis(size: int, count: int, channels: int = 3) -> Tensor:
    """The `count` strongest of the DCT's basis patches, by the power that photographs have on average.

    Power is taken as 1 / (u^2 + v^2) at the frequency (u, v), half cycles per patch, and as a small share of that for
    the two chromatic directions (for 3 channels; others have no preferred one). Means come first.

    Args:
        size: side of the patch.
    Returns:
        (count, channels, size, size), orthonormal, strongest first.
    Raises:
        ValueError: if a patch has fewer than `count` numbers.
    """
    colours, which, waves = _strongest(size, count, channels)
    return torch.from_numpy(colours[which][:, :, None, None] * waves[:, None]).float()


@functools.cache
def _expected(size: int, count: int, channels: int) -> np.ndarray:
    colours, which, waves = _strongest(size, count, channels)
    side = 3 * size
    along = np.abs(np.arange(side)[:, None] - np.arange(side))
    of_offset = np.exp(-np.hypot(*np.indices((side, side))) / (CORRELATION_LENGTH * size))
    covariance = of_offset[along[:, None, :, None], along[None, :, None, :]]  # (row, column, row, column)
    middle = slice(size, 2 * size)
    result = np.zeros((count, channels, side, side))
    for c in range(channels):
        own = np.flatnonzero(which == c)
        if not len(own):
            continue
        seen = np.zeros((3, 3, len(own), side, side))  # each basis patch at each of the nine places
        for i in range(3):
            for j in range(3):
                seen[i, j, :, i * size : (i + 1) * size, j * size : (j + 1) * size] = waves[own]
        seen = seen.reshape(-1, side**2)
        with_pixels = seen @ covariance.reshape(side**2, side**2)  # (9 k, side^2)
        among = with_pixels @ seen.T
        to_middle = with_pixels.reshape(-1, side, side)[:, middle, middle].reshape(-1, size**2)
        weights = np.linalg.solve(among, to_middle).reshape(3, 3, len(own), size, size)
        # What the middle gets from the patch at (i, j) is what a patch in the middle gives to the place opposite.
        flipped = weights[::-1, ::-1].transpose(2, 0, 3, 1, 4).reshape(len(own), side, side)
        result[own] += colours[c][None, :, None, None] * flipped[:, None]
    return result


def expected_patches(size: int, count: int, channels: int = 3) -> Tensor:
    """What each coordinate in `frequency_basis` says about its patch and the eight around it.

    Their sum, weighted by the coordinates of all patches, is the expectation of an image given them, if images are
    Gaussian with a covariance exp(-distance / L): the best linear guess, smooth across the borders of patches, with
    exactly these coordinates.

    Returns:
        (count, channels, 3 size, 3 size).
    """
    return torch.from_numpy(_expected(size, count, channels)).float()


class PatchesToLatents(nn.Conv2d):
    """(B, 3, H, W) -> (B, latent_channels, H/f, W/f): each patch's coordinates in `frequency_basis`, to begin with.

    Divided by f, so that the first latent channel is a patch's mean brightness times the root of 3.
    """

    def __init__(self, in_channels: int, latent_channels: int, size: int):
        super().__init__(in_channels, latent_channels, size, stride=size, bias=False)
        with torch.no_grad():
            self.weight.copy_(frequency_basis(size, latent_channels, in_channels) / size)


class LatentsToPatches(nn.ConvTranspose2d):
    """(B, latent_channels, h, w) -> (B, 3, f h, f w), with the latents given for coordinates, to begin with.

    Args:
        size: f, the side of a patch.
        overlapping: each latent also draws on the eight patches around its own, by `expected_patches`; those beyond
            the border are taken to be like those at it. Without, patches are independent, and their borders show.
    """

    def __init__(self, latent_channels: int, out_channels: int, size: int, overlapping: bool = True):
        super().__init__(latent_channels, out_channels, 3 * size if overlapping else size, stride=size, bias=False)
        self.overlapping = overlapping
        with torch.no_grad():
            basis = (expected_patches if overlapping else frequency_basis)(size, latent_channels, out_channels)
            self.weight.copy_(basis * size)

    def forward(self, latents: Tensor) -> Tensor:
        if not self.overlapping:
            return super().forward(latents)
        images = super().forward(F.pad(latents, (1, 1, 1, 1), mode="replicate"))
        edge = 2 * self.stride[0]
        return images[..., edge:-edge, edge:-edge]


@torch.no_grad()
def start_linear(vae: nn.Module, encoders: list, decoders: list) -> None:
    """Silences the networks of an autoencoder with a shortcut, so that training starts from the linear codec.

    Last layers of encoders and decoders are zero (the variances small), and the 1x1 convolutions around the latent
    the identity.
    """
    for network in (*encoders, *decoders):
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
    for network in encoders:
        half = network.conv_out.out_channels // 2
        network.conv_out.bias[half:] = LOGVAR_AT_START
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        if convolution is not None:
            nn.init.dirac_(convolution.weight)
            nn.init.zeros_(convolution.bias)
