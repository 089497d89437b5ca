"""From an autoencoder's latents to those of generators and back, for any diffusers autoencoder of images."""

import diffusers
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

AUTOENCODER_RAE = getattr(diffusers, "AutoencoderRAE", ())  # older versions lack it
NO_LATENT_STATISTICS = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
MIN_LOGVAR = -30.0  # diffusers clamps the log-variance of a posterior to at least this


def normalize_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """The latents as a generator sees them.

    (z - `latents_mean`) `scaling_factor` / `latents_std`, or without these (z - `shift_factor`) `scaling_factor`. An
    autoencoder with a batch norm `bn`, as FLUX.2's, has statistics of its own for each of 2 x 2 neighbors.

    Args:
        latents: (B, C, h, w), as `favae.autoencoders.encode` gives them; h and w even if there is a batch norm.
    Returns:
        (B, C, h, w), float32.
    Raises:
        ValueError: if there is a batch norm, and h or w is odd.
    """
    if has_batch_norm(vae) and (latents.shape[-2] % 2 or latents.shape[-1] % 2):
        height, width = latents.shape[-2:]
        raise ValueError(
            f"the batch norm of a {type(vae).__name__} needs latents of even sides, got {height} x {width}"
        )
    mean, std = latent_mean_and_std(vae, latents.device)
    if has_batch_norm(vae):
        return F.pixel_shuffle((F.pixel_unshuffle(latents.float(), 2) - mean) / std, 2)
    return (latents.float() - mean) / std


def denormalize_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """The inverse of `normalize_latents`."""
    mean, std = latent_mean_and_std(vae, latents.device)
    if has_batch_norm(vae):
        return F.pixel_shuffle(F.pixel_unshuffle(latents.float(), 2) * std + mean, 2)
    return latents.float() * std + mean


def has_batch_norm(vae: ModelMixin) -> bool:
    """Whether the latents are normalized by a batch norm of 2 x 2 neighbors, stacked along the channels."""
    return getattr(vae, "bn", None) is not None


def latent_mean_and_std(vae: ModelMixin, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """What latents are normalized with; float32.

    Returns:
        Mean and std, (C, 1, 1) each; (4 C, 1, 1) with a batch norm; (1, 1, 1) if all channels have the same.
    """
    config = vae.config
    if isinstance(vae, AUTOENCODER_RAE):  # which normalizes its latents itself
        return _per_channel(0.0, device), _per_channel(1.0, device)
    if has_batch_norm(vae):
        eps = config.get("batch_norm_eps", vae.bn.eps)
        return _per_channel(vae.bn.running_mean, device), _per_channel((vae.bn.running_var + eps).sqrt(), device)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("shift_factor") or 0.0, 1.0
    return _per_channel(mean, device), _per_channel(std, device) / (config.get("scaling_factor") or 1.0)


def _per_channel(values: float | list[float] | Tensor, device: torch.device | str) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
