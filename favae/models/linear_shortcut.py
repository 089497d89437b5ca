"""A linear path around an autoencoder: from patches to latents and back, by their lowest frequencies."""

import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

# An orthogonal basis of colors: brightness, red against blue, green against both.
OPPONENT_COLORS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-1.0, 2.0, -1.0))
# The energy of the two color differences, relative to brightness at the same frequency, in photographs of scikit-image.
CHROMA_ENERGY = (0.05, 0.01)
# Log-variance of an untrained posterior: a std of 0.007, where latents are about 1.
INITIAL_LOGVAR = -10.0
# The covariance of photographs is taken as exp(-distance / length), with this length in patches.
CORRELATION_LENGTH = 5


@functools.cache
def _strongest_waves(size: int, count: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The basis patches with the most energy.

    Returns:
        The colors (channels, channels), one per row; for each basis patch the row of its color (count,); and its
        brightness pattern (count, size, size).
    """
    if count > channels * size**2:
        raise ValueError(f"a patch of {channels} x {size} x {size} has fewer than {count} basis patches")

    # the waves of the DCT, and the colors that they can have
    cosines = scipy.fft.dct(np.eye(size), norm="ortho", axis=0)  # (frequency, position)
    colors = np.array(OPPONENT_COLORS) if channels == 3 else np.eye(channels)
    colors = colors / np.linalg.norm(colors, axis=1, keepdims=True)

    # sort them by the energy that photographs have on average
    color_energy = [1.0, *CHROMA_ENERGY] if channels == 3 else [1.0] * channels
    energy = {
        (c, u, v): color_energy[c] / (u**2 + v**2) if u or v else math.inf
        for c in range(channels)
        for u in range(size)
        for v in range(size)
    }
    chosen = sorted(energy, key=lambda key: (-energy[key], key))[:count]
    waves = np.stack([np.outer(cosines[u], cosines[v]) for _, u, v in chosen])
    return colors, np.array([c for c, _, _ in chosen]), waves


def frequency_basis(size: int, count: int, channels: int = 3) -> Tensor:
    """The `count` basis patches of the DCT that have the most energy in photographs on average.

    The energy at the frequency (u, v), in half cycles per patch, is taken as 1 / (u^2 + v^2). Of three channels, the
    two color differences have a small share of it; other numbers of channels have no preferred colors. Means come
    first.

    Args:
        size: side of the patch in pixels.
    Returns:
        (count, channels, size, size), orthonormal, strongest first.
    Raises:
        ValueError: if a patch has fewer than `count` numbers.
    """
    colors, color_of_wave, waves = _strongest_waves(size, count, channels)
    return torch.from_numpy(colors[color_of_wave][:, :, None, None] * waves[:, None]).float()


@functools.cache
def _expected_patches(size: int, count: int, channels: int) -> np.ndarray:
    """`expected_patches` in float64."""
    colors, color_of_wave, waves = _strongest_waves(size, count, channels)
    side = 3 * size

    # the covariance of the pixels of nine patches, (row, column, row, column)
    distance = np.abs(np.arange(side)[:, None] - np.arange(side))
    by_offset = np.exp(-np.hypot(*np.indices((side, side))) / (CORRELATION_LENGTH * size))
    covariance = by_offset[distance[:, None, :, None], distance[None, :, None, :]]

    middle = slice(size, 2 * size)
    result = np.zeros((count, channels, side, side))
    for color in range(channels):  # colors are taken as independent
        own = np.flatnonzero(color_of_wave == color)
        if not len(own):
            continue
        # each basis patch at each of the nine places
        placed = np.zeros((3, 3, len(own), side, side))
        for i in range(3):
            for j in range(3):
                placed[i, j, :, i * size : (i + 1) * size, j * size : (j + 1) * size] = waves[own]
        placed = placed.reshape((-1, side**2))

        # the conditional expectation of the middle patch, given the coordinates of all nine
        with_pixels = placed @ covariance.reshape((side**2, side**2))
        among_coordinates = with_pixels @ placed.T
        with_middle = with_pixels.reshape((-1, side, side))[:, middle, middle].reshape((-1, size**2))
        weights = np.linalg.solve(among_coordinates, with_middle).reshape((3, 3, len(own), size, size))

        # What the middle gets from the patch at (i, j) is what a patch in the middle gives to the opposite place.
        flipped = weights[::-1, ::-1].transpose(2, 0, 3, 1, 4).reshape((len(own), side, side))
        result[own] += colors[color][None, :, None, None] * flipped[:, None]
    return result


def expected_patches(size: int, count: int, channels: int = 3) -> Tensor:
    """What each coordinate in `frequency_basis` says about its patch and the eight around it.

    The sum of these, weighted by the coordinates of all patches, is the expectation of an image given its coordinates,
    if images are Gaussian with the covariance exp(-distance / L). It is the best linear estimate, smooth across the
    borders of patches, and has exactly these coordinates.

    Returns:
        (count, channels, 3 size, 3 size).
    Raises:
        ValueError: if a patch has fewer than `count` numbers.
    """
    return torch.from_numpy(_expected_patches(size, count, channels)).float()


class PatchesToLatents(nn.Conv2d):
    """(B, C, H, W) -> (B, latent_channels, H/f, W/f): at first, the coordinates of each patch in `frequency_basis`.

    They are divided by f, so that the first of three-channel images is sqrt(3) times the patch's mean brightness.
    """

    def __init__(self, in_channels: int, latent_channels: int, size: int):
        super().__init__(in_channels, latent_channels, size, stride=size, bias=False)
        with torch.no_grad():
            self.weight.copy_(frequency_basis(size, latent_channels, in_channels) / size)


class LatentsToPatches(nn.ConvTranspose2d):
    """(B, latent_channels, h, w) -> (B, C, f h, f w): at first, the image with these latents as coordinates.

    Args:
        size: f, the side of a patch.
        overlapping: let each latent also act on the eight patches around its own, by `expected_patches`; beyond the
            border of the image latents are repeated. Otherwise patches are independent, and their borders show.
    """

    def __init__(self, latent_channels: int, out_channels: int, size: int, overlapping: bool = True):
        super().__init__(latent_channels, out_channels, 3 * size if overlapping else size, stride=size, bias=False)
        self.overlapping = overlapping
        make_basis = expected_patches if overlapping else frequency_basis
        with torch.no_grad():
            self.weight.copy_(make_basis(size, latent_channels, out_channels) * size)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.overlapping:
            return super().forward(input)
        images = super().forward(F.pad(input, (1, 1, 1, 1), mode="replicate"))
        edge = 2 * self.stride[0]
        return images[..., edge:-edge, edge:-edge]


@torch.no_grad()
def start_linear(quant_convs: Sequence[nn.Conv2d], encoders: Sequence[Encoder], decoders: Sequence[Decoder]) -> None:
    """Silences the networks beside a shortcut, so that training starts from the linear codec.

    The last layers of encoders and decoders become zero, with small variances, and the 1x1 convolutions around the
    latent the identity.
    """
    for network in (*encoders, *decoders):
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
    for encoder in encoders:
        half = encoder.conv_out.out_channels // 2
        encoder.conv_out.bias[half:] = INITIAL_LOGVAR
    for convolution in quant_convs:
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.get_parameter("bias"))


def shortcut_weights(model: nn.Module) -> list[Tensor]:
    """The weights of the shortcuts that are trained."""
    shortcuts = [module for module in model.modules() if isinstance(module, (PatchesToLatents, LatentsToPatches))]
    return [shortcut.weight for shortcut in shortcuts if shortcut.weight.requires_grad]


def share_left(step: int, steps: int) -> float:
    """By what to multiply weights after a training step, so that they are linearly less and, after `steps`, nothing.

    Args:
        step: how many steps were done before this one.
    """
    return max(0.0, (steps - step - 1) / (steps - step)) if step < steps else 0.0
