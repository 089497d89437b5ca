"""The numbers by which pipelines normalize an autoencoder's latents, and how to make them unnecessary."""

import copy

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor, nn

from favae.normalization import NO_LATENT_STATISTICS, has_batch_norm, latent_mean_and_std


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL) -> AutoencoderKL:
    """Writes the normalization of the latents into the first and the last 1x1 convolution around them.

    Pipelines differ in which of `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` they read.
    Afterwards `encode` gives normalized latents, z' = (z - mean) / std with the posterior's variance divided by std^2,
    `decode` takes them, and the config says 1, 0, None, None, so that every pipeline is right.

    Args:
        vae: an `AutoencoderKL` or a subclass, changed in place; see `latent_statistics` for mean and std. Missing
            convolutions are added.
    Returns:
        The same autoencoder.
    Raises:
        ValueError: if the statistics in its config are incomplete or do not fit, or no convolution can hold them: those
            of FLUX.2's autoencoder differ between the 2 x 2 latents that its pipelines pack into one, and latents on a
            sphere are normalized after the convolution.
    """
    if not isinstance(vae, AutoencoderKL) or has_batch_norm(vae):
        raise ValueError(
            f"the latent statistics of a {type(vae).__name__} cannot be folded: it is no AutoencoderKL with one mean "
            "and std per channel; swap_vae keeps the statistics that a pipeline's autoencoder has"
        )
    mean, std = latent_statistics(vae)
    if vae.config.get("latent_norm") is not None:
        raise ValueError(f"latents with latent_norm={vae.config.latent_norm} cannot be folded: they are on a sphere")
    both = {"use_quant_conv": True, "use_post_quant_conv": True}
    given = {name: value for name, value in both.items() if name in vae.config}  # ours always has the two
    if not given and vae.quant_conv is None:
        raise ValueError(f"a saved {type(vae).__name__} has no convolutions that could hold latent statistics")
    first = _identity(2 * len(mean)) if vae.quant_conv is None else copy.deepcopy(vae.quant_conv).float().cpu()
    # what it gives is [mean | logvar] along the channels
    _scale_output(first, torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()]))
    last = vae.post_quant_conv or _identity(vae.config.latent_channels)
    _scale_input(last, std, mean)
    like = next(vae.decoder.parameters())
    learns = next(vae.encoder.parameters()).requires_grad
    vae.quant_conv, vae.post_quant_conv = first.to(like).requires_grad_(learns), last.to(like)
    vae.register_to_config(**given | NO_LATENT_STATISTICS)
    return vae


def latent_statistics(vae: ModelMixin) -> tuple[Tensor, Tensor]:
    """The mean and std (C,) that the config says latents are normalized with, float32; see `latent_mean_and_std`.

    Raises:
        ValueError: if the config does not have both of `latents_mean` and `latents_std`, one number per channel, or
            neither.
    """
    channels = count_channels(vae, "latent_channels")
    given = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
    if given != [None, None] and (None in given or [len(v) for v in given] != [channels] * 2 or min(given[1]) <= 0):
        raise ValueError(f"latents_mean and latents_std must both be {channels} numbers, the latter positive")
    mean, std = latent_mean_and_std(vae)
    return mean.flatten().expand(channels), std.flatten().expand(channels)


def _identity(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(convolution.weight)
    nn.init.zeros_(convolution.get_parameter("bias"))
    return convolution


def _scale_output(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """convolution(x) becomes scale * convolution(x) + shift, per output channel."""
    weight, bias = convolution.weight, convolution.get_parameter("bias")
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    weight.copy_(weight.float() * scale[:, None, None, None])
    bias.copy_(bias.float() * scale + shift)


def _scale_input(convolution: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """convolution(x) becomes convolution(scale * x + shift), per input channel."""
    weight, bias = convolution.weight, convolution.get_parameter("bias")
    scale, shift = scale.to(weight.device), shift.to(weight.device)
    bias.copy_(bias.float() + weight.float()[:, :, 0, 0] @ shift)
    weight.copy_(weight.float() * scale[None, :, None, None])


def count_channels(vae: ModelMixin, key: str) -> int:
    """The number of an autoencoder's channels; `key` is `latent_channels`, `in_channels` or `out_channels`."""
    config = vae.config
    if key == "latent_channels":
        return config["z_dim"] if is_video(vae) else config[key]
    # one of Wan's counts the pixels of a patch as channels
    pixels = (config.get("patch_size") or 1) ** 2 if is_video(vae) else 1
    return config.get(key, config.get("input_channels", config.get("in_channels", 3))) // pixels


def is_video(vae: ModelMixin) -> bool:
    """Whether images and latents have a time axis, and the config mean and std of the latents."""
    return "z_dim" in vae.config
