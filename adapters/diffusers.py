"""Autoencoders in the pipelines of diffusers."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

__all__ = ["fold_latent_statistics"]


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL) -> AutoencoderKL:
    """Writes the normalisation of the latents into the first and the last 1x1 convolution around them.

    Pipelines differ in what they read of `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std`. Afterwards
    `encode` gives normalised latents, z' = (z - mean) / std with the posterior's variance divided by std^2, `decode`
    takes them, and the config says 1, 0, None, None: every pipeline is right.

    Args:
        vae: an `AutoencoderKL` or a subclass, changed in place. mean and std are `latents_mean` and
            `latents_std / scaling_factor` of its config, or `shift_factor` and `1 / scaling_factor` where it has no
            `latents_mean`. Missing convolutions are added.
    Returns:
        The same autoencoder.
    Raises:
        ValueError: if only one of `latents_mean` and `latents_std` is there, or they are not one number per channel.
    """
    config, channels = vae.config, vae.config.latent_channels
    if (config.latents_mean is None) != (config.latents_std is None):
        raise ValueError("latents_mean and latents_std belong together; this autoencoder has one of them")
    if config.latents_mean is None:
        mean, std = torch.full((channels,), float(config.shift_factor or 0)), torch.ones(channels)
    else:
        mean, std = torch.tensor(config.latents_mean).flatten(), torch.tensor(config.latents_std).flatten()
    if len(mean) != channels or len(std) != channels or not bool((std > 0).all()):
        raise ValueError(f"latents_mean and latents_std must be {channels} numbers, the deviations above 0")
    std = std / config.scaling_factor

    first = vae.quant_conv or _identity(2 * channels)
    last = vae.post_quant_conv or _identity(channels)
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    # the moments are [mean | logvar] along the channels
    _after(first, torch.cat([1 / std, ones]), torch.cat([-mean / std, zeros - 2 * std.log()]))
    _before(last, std, mean)
    like = next(vae.parameters())
    vae.quant_conv, vae.post_quant_conv = first.to(like), last.to(like)
    vae.register_to_config(
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=None,
        latents_std=None,
    )
    return vae


def _identity(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return convolution


def _after(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """convolution(x) becomes scale * convolution(x) + shift, per output channel."""
    weight, bias = convolution.weight, convolution.bias
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    weight.copy_(weight.float() * scale[:, None, None, None])
    bias.copy_(bias.float() * scale + shift)


def _before(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """convolution(x) becomes convolution(scale * x + shift), per input channel."""
    weight, bias = convolution.weight, convolution.bias
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    bias.copy_(bias.float() + weight.float()[:, :, 0, 0] @ shift)
    weight.copy_(weight.float() * scale[None, :, None, None])
