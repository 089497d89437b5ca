"""From what a generator draws to images: what the pipelines share."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents (B, C, h, w) -> images (B, 3, H, W) around [-1, 1].

    Latents are scaled back to z std / `scaling_factor` + mean with the autoencoder's `latents_mean` and `latents_std`,
    or, where these are None, to z / `scaling_factor` + `shift_factor`.
    """
    config = vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1)
        latents = latents * std / config.scaling_factor + mean  # as SDXL
    else:
        latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    return vae.decode(latents.to(vae.dtype)).sample
