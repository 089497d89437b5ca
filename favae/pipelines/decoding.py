"""From tokens or normalized latents to images: what the pipelines share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from favae.errors import NonFiniteError
from favae.normalization import has_batch_norm


def device_of(component: nn.Module, otherwise: torch.device) -> torch.device:
    """Where a part of a pipeline wants its inputs: parts may be on devices of their own, offloaded or not.

    Args:
        otherwise: the answer with versions of diffusers before 0.42, whose pipelines have one device.
    """
    try:
        from diffusers.utils.torch_utils import get_module_execution_device
    except ImportError:
        return otherwise
    return get_module_execution_device(component)


def check_autoencoder(vae: ModelMixin, channels: int) -> None:
    """Raises ValueError for an autoencoder that `decode_latents` cannot use for latents of so many channels."""
    config = vae.config
    if has_batch_norm(vae) or "scaling_factor" not in config or "latent_channels" not in config:
        raise ValueError(f"a {type(vae).__name__} does not have the latents of an AutoencoderKL, which are needed here")
    if channels != config.latent_channels:
        raise ValueError(
            f"the transformer was built for {channels} latent channels, the autoencoder has {config.latent_channels}"
        )


def decode_latents(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Scales normalized latents back and decodes them.

    The decoder gets z std / `scaling_factor` + mean, with the autoencoder's `latents_mean` and `latents_std`, or, where
    these are None or missing, z / `scaling_factor` + `shift_factor`.

    Args:
        latents: (B, C, h, w).
    Returns:
        Images (B, C, H, W) around [-1, 1].
    Raises:
        NonFiniteError: as `decode_finite`.
    """
    config = vae.config  # in full here, where `adapters.latent_normalization` reads it
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean = torch.tensor(config.latents_mean, device=latents.device).view(1, -1, 1, 1)
        std = torch.tensor(config.latents_std, device=latents.device).view(1, -1, 1, 1)
        latents = latents * std / config.scaling_factor + mean  # in SDXL's order
    else:
        latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    return decode_finite(vae, latents)


def decode_finite(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Decodes latents or tokens, in float32 if the autoencoder's config says that float16 overflows (`force_upcast`).

    Args:
        latents: as `vae.decode` takes them; latents may have any floating dtype.
    Returns:
        Images (B, C, H, W) around [-1, 1].
    Raises:
        NonFiniteError: if the latents or the images are not finite.
    """
    if not torch.isfinite(latents).all():
        raise NonFiniteError("the generator's latents are not finite; run it in float32 or bfloat16")
    with _upcast(vae):
        dtype, device = vae.dtype, device_of(vae, latents.device)
        images = vae.decode(latents.to(device, dtype if latents.is_floating_point() else latents.dtype)).sample
    if not torch.isfinite(images).all():
        remedy = "it may not belong to this generator, or its weights are damaged"
        if dtype == torch.float16:
            is_set = vae.config.get("force_upcast")  # which does nothing for weights that others move
            remedy = "run it in float32 or bfloat16" + ("" if is_set else ", or set force_upcast=True in its config")
        raise NonFiniteError(f"the images of the {type(vae).__name__} are not finite in {dtype}; {remedy}")
    return images


@contextmanager
def _upcast(vae: ModelMixin) -> Iterator[None]:
    """Casts an autoencoder to float32 inside the block, if it needs that. Weights that others move stay as they are."""
    moved = vae.device.type == "meta" or any(hasattr(part, "_diffusers_hook") for part in vae.modules())
    if vae.dtype != torch.float16 or not vae.config.get("force_upcast") or moved:
        yield
        return
    vae.float()
    try:
        yield
    finally:
        vae.half()
