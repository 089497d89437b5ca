"""Autoencoders in the pipelines of diffusers: swapping them, and the normalisation of their latents."""

import copy
import logging

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

__all__ = ["fold_latent_statistics", "swap_vae"]

logger = logging.getLogger(__name__)

# What a pipeline applies to latents before it decodes them, by the beginning of its name; the longest that fits counts.
APPLIES = {
    "DiTPipeline": "scale",
    "LightningDiTPipeline": "scale, shift, statistics",
    "StableDiffusion": "scale",
    "StableDiffusionXL": "scale, statistics of 4 channels",
    "StableDiffusion3": "scale, shift",
    "Flux": "scale, shift",
    "PixArt": "scale",
    "Lumina2": "scale, shift",
    "Sana": "scale",
}
# Their names begin alike; their autoencoders, or what they make of them, do not.
OTHER_FAMILIES = ("Flux2", "FluxFill", "StableDiffusionLDM3D", "SanaVideo", "SanaImageToVideo", "SanaWM")
BINNED = ("PixArt", "Sana")  # call with use_resolution_binning=False after another factor
NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def swap_vae(pipe: DiffusionPipeline, vae: AutoencoderKL) -> DiffusionPipeline:
    """Gives a pipeline another autoencoder, with everything that it derived from the old one.

    The new one has the old one's latent channels. Another factor changes the size of the images, not of the latents
    (PixArt and Sana then need `use_resolution_binning=False`, and a warning says so). Images come out right if the
    generator was trained on these latents: an `AutoencoderKLFA.from_autoencoder_kl` of the pipeline's own autoencoder
    has them (only its decoder is new), and takes over the old one's scaling and statistics; with another encoder the
    generator must be trained on its latents, and a warning says so.

    Args:
        pipe: of DiT, Stable Diffusion (text, image to image, inpainting), SDXL, SD3, Flux, PixArt, Lumina2, Sana, or
            ours; changed in place. Before offloading is switched on.
        vae: an `AutoencoderKL` or a subclass; moved to the old one's device and dtype.
    Returns:
        The same pipeline. Saved and loaded it is the same, but for two: Lumina2 takes every factor to be 8, and Sana
        looks for a setting of its own autoencoder; load them with their own, and swap again.
    Raises:
        ValueError: if it cannot work: why, and what would.
    """
    name, kind = type(pipe).__name__, type(vae).__name__
    families = [family for family in APPLIES if name.startswith(family) and not name.startswith(OTHER_FAMILIES)]
    if not families or getattr(pipe, "vae", None) is None:
        raise ValueError(f"a {name} is no pipeline whose autoencoder can be swapped; there are {', '.join(APPLIES)}")
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(f"a {name} takes an AutoencoderKL or a subclass such as AutoencoderKLFA, not a {kind}")
    old, config = pipe.vae, vae.config
    if getattr(pipe, "hf_device_map", None) or _hooked(pipe):
        raise ValueError(f"this {name} is offloaded, cast or spread over devices; swap the autoencoder first")
    if config.latent_channels != old.config.get("latent_channels"):
        raise ValueError(
            f"this {name} generates {old.config.get('latent_channels')} latent channels, the {kind} has "
            f"{config.latent_channels}: AutoencoderKLFA.from_autoencoder_kl(pipe.vae) gives these latents a new "
            f"decoder; for those of the {kind} a generator must be trained"
        )
    for key in ("in_channels", "out_channels"):
        expected = old.config.get(key, 3)
        if config[key] != expected:
            raise ValueError(f"this {name} has an autoencoder of {key}={expected}, the {kind} has {config[key]}")
    if _same_weights(old, vae, ("encoder", "quant_conv")):
        vae.register_to_config(**{key: old.config.get(key) for key in NORMALISATION})
    _check_normalisation(name, APPLIES[max(families, key=len)], vae)
    if not _same_latents(old, vae):
        logger.warning(
            "the %s has another encoder than the pipeline's autoencoder: images come out right only if the generator "
            "was trained on its latents; AutoencoderKLFA.from_autoencoder_kl(pipe.vae) keeps those it was trained on",
            kind,
        )

    factor, old_factor = 2 ** (len(config.block_out_channels) - 1), getattr(pipe, "vae_scale_factor", None)
    if vae.dtype != old.dtype:
        vae = vae.to(old.dtype)
    pipe.register_modules(vae=vae.to(old.device).eval())
    vae.use_tiling, vae.use_slicing = getattr(old, "use_tiling", False), getattr(old, "use_slicing", False)
    if old_factor is None:  # DiTPipeline derives nothing
        return pipe
    if factor != old_factor and name.startswith(BINNED):
        logger.warning("call the %s with use_resolution_binning=False: its bins are for factor %d", name, old_factor)
    pipe.vae_scale_factor = factor
    for attribute, processor in list(vars(pipe).items()):
        if isinstance(processor, VaeImageProcessor):
            own = processor.config.vae_scale_factor * factor // old_factor
            setattr(pipe, attribute, type(processor).from_config(processor.config, vae_scale_factor=own))
    if hasattr(pipe, "default_image_size"):
        pipe.default_image_size = pipe.default_sample_size * factor
    return pipe


def _check_normalisation(name: str, applies: str, vae: AutoencoderKL) -> None:
    config = vae.config
    fold = "fold_latent_statistics(vae) writes it into the autoencoder"
    has_statistics = config.latents_mean is not None and config.latents_std is not None
    four = "of 4 channels" in applies
    if has_statistics and ("statistics" not in applies or (four and config.latent_channels != 4)):
        what = "only of 4 channels" if four else "not"
        raise ValueError(f"a {name} does {what} apply latents_mean and latents_std; {fold}")
    if config.shift_factor and "shift" not in applies:
        raise ValueError(f"a {name} does not apply shift_factor={config.shift_factor}; {fold}")
    if config.shift_factor is None:  # those that apply it cannot do without
        vae.register_to_config(shift_factor=0.0)
    if config.force_upcast and vae.post_quant_conv is None and "XL" in name:
        raise ValueError(f"a {name} upcasts by post_quant_conv, which this autoencoder lacks; set force_upcast=False")


def _hooked(pipe: DiffusionPipeline) -> bool:
    """Whether something moves the autoencoder's weights, which it would not do for another."""
    hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in pipe.vae.modules())
    return hooked or bool(getattr(pipe, "_all_hooks", None)) or pipe.vae.device.type == "meta"


def _same_weights(old: nn.Module, new: nn.Module, names: tuple[str, ...]) -> bool:
    def weights(vae: nn.Module) -> dict[str, Tensor]:
        parts = {name: getattr(vae, name, None) for name in names}
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        return {f"{name}.{key}": value for name, state in states.items() for key, value in state.items()}

    first, second = weights(old), weights(new)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key].to(first[key])) for key in first)


def _same_latents(old: nn.Module, new: AutoencoderKL) -> bool:
    """Whether two autoencoders encode alike, normalisation included, which may be folded in."""
    if not _same_weights(old, new, ("encoder",)) or not isinstance(old, AutoencoderKL):
        return False
    first, second = (normalised_moments(vae).state_dict() for vae in (old, new))
    return all(torch.allclose(first[key], second[key].to(first[key]), rtol=1e-3, atol=1e-5) for key in first)


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
    mean, std = latent_statistics(vae)
    first = normalised_moments(vae)
    last = vae.post_quant_conv or _identity(vae.config.latent_channels)
    _before(last, std, mean)
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
    """Mean and deviation (C,) that pipelines normalise the latents with, whatever the config names them.

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
    return mean.float(), std.float() / config.scaling_factor


@torch.no_grad()
def normalised_moments(vae: AutoencoderKL) -> nn.Conv2d:
    """A copy of `quant_conv`, or an identity, that gives the moments of the normalised latents, float32, on the CPU."""
    mean, std = latent_statistics(vae)
    convolution = _identity(2 * len(mean)) if vae.quant_conv is None else copy.deepcopy(vae.quant_conv).float().cpu()
    ones, zeros = torch.ones_like(std), torch.zeros_like(std)
    # the moments are [mean | logvar] along the channels
    _after(convolution, torch.cat([1 / std, ones]), torch.cat([-mean / std, zeros - 2 * std.log()]))
    return convolution


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
