"""What a tokenizer's decoder is given in place of the latents, and what it should make of them."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from favae.losses.latent_spectra import keep_low_frequencies
from favae.training.tokenizer_losses import SMALLEST_SCALE, TokenizerLossConfig

MASKED_SHARES = (1.0, 1.25, 1.5)  # of `keep_low_frequencies`, as published
IMAGE_BLOCK = 8  # pixels, likewise


def regularize(
    latents: Tensor,
    images: Tensor,
    losses: TokenizerLossConfig,
    *,
    low_channels: int,
    low_pass: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Disturbs latents as the losses say. Without such a loss, both are returned as they are.

    Args:
        latents: (B, C', h, w). images: (B, C, H, W).
        low_channels: how many channels, from the first, are not the high band's.
        low_pass: takes the high band from images; None if the model has no bands.
    Returns:
        What is decoded, and the target: the images, or their low-pass version, smaller or turned if the latents are.
    """
    target = images
    decoded = add_noise(latents, losses.latent_noise)
    is_high = (torch.arange(latents.shape[1], device=latents.device) >= low_channels).view(1, -1, 1, 1)
    if losses.high_dropout:
        dropped = _coins(latents, losses.high_dropout)
        decoded = torch.where(dropped & is_high, 0, decoded)
        if losses.high_dropout_target == "low_pass" and low_pass is not None:
            target = torch.where(dropped, low_pass(images), images)
    if losses.high_noise:
        std = losses.high_noise * torch.rand(len(latents), 1, 1, 1, device=latents.device)
        decoded = torch.where(is_high, decoded + std * torch.randn_like(decoded), decoded)
    if losses.prefix.probability and losses.prefix.widths is not None:
        decoded = _keep_prefix(decoded, losses.prefix.probability, losses.prefix.widths)
    if torch.rand(()) < losses.frequency_masking.probability:
        share = MASKED_SHARES[int(torch.randint(len(MASKED_SHARES), ()))]
        decoded = keep_low_frequencies(decoded, share, losses.frequency_masking.latent_block)
        target = keep_low_frequencies(target, share, IMAGE_BLOCK)
    if torch.rand(()) < losses.equivariance:  # last, since blocks do not fill every size
        decoded, target = _scaled_and_turned(decoded, target)
    return decoded, target


def add_noise(latents: Tensor, size: float) -> Tensor:
    """Noise of std |N(0, size^2)|, one draw for each image."""
    if not size:
        return latents
    std = size * torch.randn(len(latents), 1, 1, 1, device=latents.device).abs()
    return latents + std * torch.randn_like(latents)


def _coins(latents: Tensor, probability: float) -> Tensor:
    """One for each image, (B, 1, 1, 1) bool."""
    return torch.rand(len(latents), 1, 1, 1, device=latents.device) < probability


def _keep_prefix(latents: Tensor, probability: float, widths: list[int]) -> Tensor:
    """Sets all but a random number of channels to zero, in a share of the images."""
    drawn = torch.tensor(widths, device=latents.device)[torch.randint(len(widths), (len(latents),))]
    is_later = torch.arange(latents.shape[1], device=latents.device) >= drawn[:, None]
    return torch.where(_coins(latents, probability) & is_later[:, :, None, None], 0, latents)


def _scaled_and_turned(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both made smaller by one factor and turned by quarters of a turn; the whole batch alike.

    Source: EQ-VAE, arXiv 2502.09509: bilinear, one to three quarters; the factor is one of whole numbers of latents.
    """
    sides = torch.tensor(latents.shape[-2:])
    smallest = math.ceil(sides.min() * SMALLEST_SCALE)
    scale = int(torch.randint(smallest, int(sides.min()), ())) / sides.min() if sides.min() > 1 else 1.0
    size = (sides * scale).round().int().tolist()
    ratio = images.shape[-1] // latents.shape[-1]
    turns = int(torch.randint(1, 4, ()))
    small = F.interpolate(latents, size=size, mode="bilinear")
    small_images = F.interpolate(images, size=[ratio * side for side in size], mode="bilinear")
    return torch.rot90(small, turns, (2, 3)), torch.rot90(small_images, turns, (2, 3))
