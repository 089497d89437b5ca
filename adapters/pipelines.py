"""Autoencoders in the pipelines of diffusers: putting in another one, and the normalization of the latents."""

import copy
import logging

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from favae.autoencoders import spatial_compression_ratio

__all__ = ["fold_latent_statistics", "swap_vae"]

logger = logging.getLogger(__name__)

# What pipelines apply to latents before they decode them besides `scaling_factor`, by the beginning of their names. The
# longest beginning counts.
LATENT_NORMALIZATION_BY_PIPELINE: dict[str, tuple[str, ...]] = {
    "DiTPipeline": (),
    "LightningDiTPipeline": ("shift_factor", "latents_mean", "latents_std"),
    "StableDiffusion": (),
    "StableDiffusionXL": ("latents_mean", "latents_std"),
    "StableDiffusion3": ("shift_factor",),
    "Flux": ("shift_factor",),
    "PixArt": (),
    "Lumina2": ("shift_factor",),
    "Sana": (),
}
# The names of these begin alike, but they have other autoencoders, or do something else with their latents.
UNSUPPORTED_PIPELINES = ("Flux2", "FluxFill", "StableDiffusionLDM3D", "SanaVideo", "SanaImageToVideo", "SanaWM")
PIPELINES_WITH_RESOLUTION_BINS = ("PixArt", "Sana")
NORMALIZATION_SETTINGS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def swap_vae(pipe: DiffusionPipeline, vae: AutoencoderKL) -> DiffusionPipeline:
    """Puts another autoencoder into a pipeline and updates everything that the pipeline derived from the old one.

    The new autoencoder must have the old one's latent channels. If its compression ratio differs, the images change
    their size and the latents keep theirs; PixArt and Sana must then be called with `use_resolution_binning=False`, and
    a warning says so.

    Images come out right only if the generator was trained on the new autoencoder's latents. An
    `AsymmetricAutoencoderKLFA` of the pipeline's own autoencoder has the same latents and takes over the old scaling
    and statistics. For any other encoder a warning says that the generator must be trained on its latents.

    Args:
        pipe: a pipeline of DiT, Stable Diffusion (text, image to image, inpainting), SDXL, SD3, Flux, PixArt, Lumina2,
            Sana, or ours. It is changed in place. Offloading must be enabled afterwards.
        vae: an `AutoencoderKL` or a subclass. It is moved to the old one's device and dtype.
    Returns:
        The same pipeline. It can be saved and loaded, with two exceptions: Lumina2 assumes a ratio of 8, and Sana needs
        a setting of its own autoencoder. Load these with their own autoencoders and swap again.
    Raises:
        ValueError: if the autoencoder cannot work in this pipeline; the message says why and what would help.
    """
    name = type(pipe).__name__
    _check_models(pipe, vae)
    old = pipe.vae

    # 1. Normalization: that of the old autoencoder if the latents are the same, otherwise the new one's own.
    same_encoder = isinstance(old, AutoencoderKL) and _same_weights(old.encoder, vae.encoder)
    if same_encoder and _same_weights(old.quant_conv, vae.quant_conv):
        vae.register_to_config(**{key: old.config[key] for key in NORMALIZATION_SETTINGS})
    _check_normalization(name, vae)
    if not (same_encoder and _same_normalized_moments(old, vae)):
        logger.warning(
            "the %s has another encoder than the pipeline's autoencoder: images come out right only if the generator "
            "was trained on its latents; AsymmetricAutoencoderKLFA.from_autoencoder_kl(pipe.vae) keeps the old latents",
            type(vae).__name__,
        )

    # 2. The autoencoder itself.
    if vae.dtype != old.dtype:  # casting warns even where it changes nothing
        vae.to(dtype=old.dtype)
    vae.to(device=old.device).eval()
    vae.use_tiling, vae.use_slicing = getattr(old, "use_tiling", False), getattr(old, "use_slicing", False)
    pipe.register_modules(vae=vae)

    # 3. Everything that the pipeline has derived from the compression ratio.
    if hasattr(pipe, "vae_scale_factor"):
        _set_compression_ratio(pipe, spatial_compression_ratio(vae))
    return pipe


def _normalization_of(pipeline_name: str) -> tuple[str, ...] | None:
    """What a pipeline applies besides the scaling factor; None for pipelines that are not supported."""
    beginnings = [name for name in LATENT_NORMALIZATION_BY_PIPELINE if pipeline_name.startswith(name)]
    if not beginnings or pipeline_name.startswith(UNSUPPORTED_PIPELINES):
        return None
    return LATENT_NORMALIZATION_BY_PIPELINE[max(beginnings, key=len)]


def _check_models(pipe: DiffusionPipeline, vae: nn.Module) -> None:
    """Raises ValueError if the pipeline's autoencoder cannot be replaced, or not by this one."""
    name, old = type(pipe).__name__, getattr(pipe, "vae", None)
    if old is None or _normalization_of(name) is None:
        supported = ", ".join(LATENT_NORMALIZATION_BY_PIPELINE)
        raise ValueError(f"the autoencoder of a {name} cannot be swapped; supported are {supported}")
    if _is_offloaded(pipe):
        raise ValueError(f"this {name} is offloaded, cast or spread over devices; swap its autoencoder before that")
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"a {name} takes an AutoencoderKL or a subclass, not a {type(vae).__name__}")
    expected = {"latent_channels": None, "in_channels": 3, "out_channels": 3}
    for key, default in expected.items():
        if vae.config[key] != old.config.get(key, default):
            raise ValueError(
                f"this {name} needs an autoencoder of {key}={old.config.get(key, default)}, this one has "
                f"{vae.config[key]}; AsymmetricAutoencoderKLFA.from_autoencoder_kl(pipe.vae) makes one that fits"
            )


def _check_normalization(name: str, vae: AutoencoderKL) -> None:
    """Raises ValueError if the pipeline of this name does not apply what the autoencoder's config asks for."""
    applied = _normalization_of(name) or ()
    for key in NORMALIZATION_SETTINGS[1:]:
        if vae.config[key] and key not in applied:
            raise ValueError(f"a {name} does not apply {key}; fold_latent_statistics(vae) makes that unnecessary")
    if vae.config.shift_factor is None:  # pipelines that apply it need a number
        vae.register_to_config(shift_factor=0.0)
    if vae.config.force_upcast and vae.post_quant_conv is None and "XL" in name:
        raise ValueError(f"a {name} upcasts by post_quant_conv, which this autoencoder lacks; set force_upcast=False")


def _is_offloaded(pipe: DiffusionPipeline) -> bool:
    """Whether something moves or casts the weights of the autoencoder, which it would not do for another."""
    hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in pipe.vae.modules())
    spread = bool(getattr(pipe, "hf_device_map", None) or getattr(pipe, "_all_hooks", None))
    return hooked or spread or pipe.vae.device.type == "meta"


def _same_weights(first: nn.Module | None, second: nn.Module | None) -> bool:
    if first is None or second is None:
        return first is second
    states = first.state_dict(), second.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key].to(value)) for key, value in states[0].items()
    )


def _same_normalized_moments(old: AutoencoderKL, new: AutoencoderKL) -> bool:
    """Whether autoencoders with the same encoder normalize alike, be it by their config or a folded convolution."""
    first, second = (normalized_moments(vae).state_dict() for vae in (old, new))
    return all(torch.allclose(first[key], second[key], rtol=1e-3, atol=1e-5) for key in first)


def _set_compression_ratio(pipe: DiffusionPipeline, ratio: int) -> None:
    """Updates a pipeline for an autoencoder of another compression ratio."""
    old, name = pipe.vae_scale_factor, type(pipe).__name__
    if ratio != old and name.startswith(PIPELINES_WITH_RESOLUTION_BINS):
        logger.warning("call the %s with use_resolution_binning=False: its bins are for images of ratio %d", name, old)
    pipe.vae_scale_factor = ratio
    for attribute, processor in list(vars(pipe).items()):
        if isinstance(processor, VaeImageProcessor):
            # some have a multiple of the ratio, for packed latents
            own = processor.config.vae_scale_factor * ratio // old
            setattr(pipe, attribute, type(processor).from_config(processor.config, vae_scale_factor=own))
    if hasattr(pipe, "default_image_size"):
        pipe.default_image_size = pipe.default_sample_size * ratio


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
        ValueError: if the statistics in its config are incomplete or do not fit.
    """
    mean, std = latent_statistics(vae)
    first = normalized_moments(vae)
    last = vae.post_quant_conv or _identity(vae.config.latent_channels)
    _scale_input(last, std, mean)
    like = next(vae.decoder.parameters())
    learns = next(vae.encoder.parameters()).requires_grad
    vae.quant_conv, vae.post_quant_conv = first.to(like).requires_grad_(learns), last.to(like)
    vae.register_to_config(
        use_quant_conv=True,
        use_post_quant_conv=True,
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=None,
        latents_std=None,
    )
    return vae


def latent_statistics(vae: AutoencoderKL) -> tuple[Tensor, Tensor]:
    """The mean and std (C,) that the latents are normalized with, float32.

    They are `latents_mean` and `latents_std / scaling_factor` of the config, or `shift_factor` and
    `1 / scaling_factor` if it has no `latents_mean`.

    Raises:
        ValueError: if the config does not have both of `latents_mean` and `latents_std`, one number per channel, or
            neither.
    """
    config, channels = vae.config, vae.config.latent_channels
    mean, std = config.latents_mean, config.latents_std
    if mean is None and std is None:
        mean, std = [config.shift_factor or 0.0] * channels, [1.0] * channels
    if mean is None or std is None or not len(mean) == len(std) == channels or min(std) <= 0:
        raise ValueError(f"latents_mean and latents_std must both be {channels} numbers, the latter positive")
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32) / config.scaling_factor


@torch.no_grad()
def normalized_moments(vae: AutoencoderKL) -> nn.Conv2d:
    """A copy of `quant_conv`, or an identity, that gives the moments of the normalized latents; float32, on the CPU."""
    mean, std = latent_statistics(vae)
    convolution = _identity(2 * len(mean)) if vae.quant_conv is None else copy.deepcopy(vae.quant_conv).float().cpu()
    # the moments are [mean | logvar] along the channels
    _scale_output(convolution, torch.cat([1 / std, torch.ones_like(std)]), torch.cat([-mean / std, -2 * std.log()]))
    return convolution


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
