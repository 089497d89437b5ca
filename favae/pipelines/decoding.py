"""From normalized latents to images: what the pipelines share."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Scales normalized latents back and decodes them.

    The decoder gets z std / `scaling_factor` + mean, with the autoencoder's `latents_mean` and `latents_std`, or, where
    these are None, z / `scaling_factor` + `shift_factor`.

    Args:
        latents: (B, C, h, w).
    Returns:
        Images (B, 3, H, W) around [-1, 1].
    """
    config = vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1)
        latents = latents * std / config.scaling_factor + mean  # in SDXL's order
    else:
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample
