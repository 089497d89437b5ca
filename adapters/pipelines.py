"""Autoencoders in the pipelines of diffusers: putting in another one, and the normalization of the latents."""

import copy
import functools
import inspect
import logging
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ModelMixin, ModularPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import Tensor, nn
from torch.nn import functional as F

from favae.adapters.latent_normalization import LatentNormalization, read_normalization
from favae.adapters.latent_statistics import count_channels, fold_latent_statistics, is_video, latent_statistics
from favae.autoencoders import encode, takes_frames
from favae.models import AutoencoderTinyFA
from favae.models.pipeline_autoencoders import PackedNormAutoencoder, SingleFrameAutoencoder
from favae.normalization import NO_LATENT_STATISTICS, has_batch_norm, normalize_latents

__all__ = ["fold_latent_statistics", "swap_vae"]

logger = logging.getLogger(__name__)

FACTORS = ("vae_scale_factor", "vae_scale_factor_spatial")
SWAP_AGAIN = "a loaded %s does not compute its sizes from this autoencoder: swap again after saving and loading it"
FOLD = "fold_latent_statistics(vae) makes that unnecessary"


def swap_vae(pipe: DiffusionPipeline | ModularPipeline, vae: ModelMixin) -> DiffusionPipeline | ModularPipeline:
    """Puts another autoencoder into a pipeline and updates everything that the pipeline derived from the old one.

    The new autoencoder must have the old one's latent channels. If its compression ratio differs, the images change
    their size and the latents keep theirs; pipelines with resolution bins must then be called with
    `use_resolution_binning=False`, and a warning says so.

    Images come out right only if the generator was trained on the new autoencoder's latents. An
    `AsymmetricAutoencoderKLFA` of the pipeline's own autoencoder has the same latents and takes over the old scaling
    and statistics. For any other encoder a warning says that the generator must be trained on its latents.

    What the pipeline does with the scaling and the statistics is read from its source, see `read_normalization`.

    Args:
        pipe: a pipeline of images, or a modular one with its components loaded. It is changed in place. Offloading must
            be enabled afterwards.
        vae: an `AutoencoderKL`, an `AutoencoderTiny`, a subclass or one of ours, or what the pipeline has already. It
            is moved to the old one's device and dtype. Pipelines of FLUX.2 (batch norm) and of Qwen-Image and Wan
            (videos of one frame) get it inside a `PackedNormAutoencoder` or a `SingleFrameAutoencoder`.
    Returns:
        The same pipeline. It can be saved and loaded; a warning names those that compute a size from something else
        than the autoencoder, and must be swapped again.
    Raises:
        ValueError: if the autoencoder cannot work in this pipeline; the message says why and what would help.
    """
    name, normalization = type(pipe).__name__, read_normalization(pipe)
    _check_models(pipe, vae, normalization)
    old = pipe.vae

    # 1. Device and dtype, and what of the old one's way to run is to be kept.
    nn.Module.to(vae, device=old.device, dtype=old.dtype)  # that of diffusers warns of every cast
    vae.eval()
    inside = getattr(old, "autoencoder", old)
    vae.use_tiling, vae.use_slicing = getattr(inside, "use_tiling", False), getattr(inside, "use_slicing", False)

    # 2. Normalization: that of the old autoencoder if the latents are the same, otherwise the new one's own.
    (old_latents, old_ratio), (latents, ratio) = (_encode_test_image(model) for model in (old, vae))
    same = _nearly_equal(old_latents, latents, vae.dtype)
    settings = _settings_for(name, normalization, old if same else vae, as_video=is_video(old))
    known = same or _nearly_equal(normalize_latents(old, old_latents), normalize_latents(vae, latents), vae.dtype)
    if not known or (not same and normalization.has_raw_conditions):
        logger.warning(
            "the %s has other latents than the pipeline's autoencoder%s: images come out right only if the generator "
            "was trained on its latents%s",
            type(vae).__name__,
            _difference(normalize_latents(old, old_latents), normalize_latents(vae, latents)),
            _way_to_old_latents(old),
        )
    new = _with_interface(vae, old, settings, same, ratio)
    widths = "encoder_block_out_channels"
    if widths in old.config and widths not in new.config:  # Sana and DreamLite count them for the compression ratio
        new.register_to_config(**{widths: (1,) * ratio.bit_length()})

    # 3. The autoencoder itself, and everything that the pipeline has derived from the old one.
    if isinstance(pipe, ModularPipeline):
        _update_components(pipe, new, old_ratio, ratio)
    else:
        before, statistics = _derived_attributes(pipe), {key: new.config.get(key) for key in NO_LATENT_STATISTICS}
        pipe.register_modules(vae=new)
        after = _derived_attributes(pipe)
        set_by_pipeline = {key: new.config[key] for key, own in statistics.items() if new.config.get(key) != own}
        if set_by_pipeline:
            pipe.register_modules(vae=old)
            new.register_to_config(**{key: statistics[key] for key in set_by_pipeline})
            raise ValueError(
                f"a {name} is for autoencoders with {set_by_pipeline}, which it writes into any other whenever it is "
                "made"
            )
        _update_derived_attributes(pipe, before, after, old_ratio, ratio)
    return pipe


def _check_models(pipe: DiffusionPipeline, vae: ModelMixin, normalization: LatentNormalization) -> None:
    """Raises ValueError if the pipeline's autoencoder cannot be replaced, or not by this one."""
    name, old = type(pipe).__name__, getattr(pipe, "vae", None)
    if old is None:
        raise ValueError(f"this {name} has no autoencoder that could be swapped, which would be its component vae")
    if not normalization.decoding:
        raise ValueError(
            f"the autoencoder of a {name} cannot be swapped: nothing in its source says how it normalizes latents; if "
            "it holds other pipelines, swap theirs"
        )
    if _is_offloaded(pipe):
        raise ValueError(f"this {name} is offloaded, cast or spread over devices; swap its autoencoder before that")
    if not is_video(old) and ("latent_channels" not in old.config or takes_frames(old)):
        raise ValueError(f"the autoencoder of a {name} is for videos or sounds, not for single images")
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny, AutoencoderTinyFA, type(old))):
        raise ValueError(f"a {name} takes an AutoencoderKL or a subclass, not a {type(vae).__name__}")
    for key in ("latent_channels", "in_channels", "out_channels"):
        needed, given = count_channels(old, key), count_channels(vae, key)
        if given != needed:
            raise ValueError(
                f"this {name} needs an autoencoder of {key}={needed}, this one has {given}{_way_to_old_latents(old)}"
            )
    lacking = [part for part in normalization.upcast_parts if _part(vae, part) is None]
    if vae.config.get("force_upcast") and lacking:
        raise ValueError(f"a {name} upcasts by {lacking[0]}, which this autoencoder lacks; set force_upcast=False")
    if normalization.needs_posterior and isinstance(vae, (AutoencoderTiny, AutoencoderTinyFA)):
        logger.warning(
            "a %s encodes images by a posterior, which an %s lacks: it can only be called without an image",
            name,
            type(vae).__name__,
        )


def _part(module: nn.Module, path: str) -> Any:
    """A part of a module, by a path such as "decoder.mid_block"; None if there is none."""
    return functools.reduce(lambda part, name: getattr(part, name, None), path.split("."), module)


def _way_to_old_latents(old: ModelMixin) -> str:
    if type(old) is not AutoencoderKL:
        return ""
    return "; AsymmetricAutoencoderKLFA.from_autoencoder_kl(pipe.vae) has the old latents"


def _is_offloaded(pipe: DiffusionPipeline) -> bool:
    """Whether something moves or casts the weights of the autoencoder, which it would not do for another."""
    hooked = any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in pipe.vae.modules())
    spread = bool(getattr(pipe, "hf_device_map", None) or getattr(pipe, "_all_hooks", None))
    return hooked or spread or pipe.vae.device.type == "meta"


@torch.no_grad()
def _encode_test_image(vae: ModelMixin) -> tuple[Tensor, int]:
    """The latents (1, C, h, w) of one small image, float32, and the image's pixels per latent along each side."""
    size = 64  # a multiple of every compression ratio that is used
    noise = torch.rand((1, count_channels(vae, "in_channels"), 8, 8), generator=torch.Generator().manual_seed(0))
    image = F.interpolate(noise * 2 - 1, (size, size), mode="bicubic").clamp(-1, 1)  # smooth, as photographs are
    dtype = vae.dtype
    nn.Module.to(vae, torch.promote_types(dtype, torch.float32))  # in float16, SDXL's is not finite
    latents = encode(vae, image.to(vae.device))
    nn.Module.to(vae, dtype)
    return latents, size // latents.shape[-1]


def _difference(old: Tensor, new: Tensor) -> str:
    """How far two latents are from each other, if that can be said."""
    if old.shape != new.shape:
        return ""
    return f", from which they differ by {(old - new).pow(2).mean().sqrt() / old.std():.0%} of their std"


def _nearly_equal(first: Tensor, second: Tensor, dtype: torch.dtype) -> bool:
    """Whether two latents are the same but for what rounding to this dtype explains."""
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    return first.shape == second.shape and bool((first - second).abs().max() <= tolerance * first.std())


def _settings_for(name: str, normalization: LatentNormalization, vae: ModelMixin, as_video: bool) -> dict[str, Any]:
    """What the config must say so that a pipeline of this name normalizes an autoencoder's latents as its own does.

    Raises:
        ValueError: if the pipeline cannot normalize them.
    """
    if has_batch_norm(vae):
        return {}
    if is_video(vae):
        return {key: list(vae.config[key]) for key in ("latents_mean", "latents_std")}
    own: dict[str, Any] = {key: vae.config.get(key) for key in NO_LATENT_STATISTICS}
    own["shift_factor"] = own["shift_factor"] or 0.0  # pipelines that apply it need a number
    mean, std = latent_statistics(vae)
    applied = normalization.applied

    statistics = {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
    if as_video and "latents_mean" in applied:
        return statistics

    # 1. As it is, where the pipeline applies all that differs from "nothing".
    needed = {"scaling_factor"} if own["scaling_factor"] != 1 else set()
    needed |= {"latents_mean"} if own["latents_mean"] else {"shift_factor"} if own["shift_factor"] else set()
    fits = normalization.channels in (None, len(mean)) or not own["latents_mean"]
    if needed <= applied and fits and ("scaling_factor" in applied or own["latents_mean"]):
        return own

    # 2. By other settings, which the pipeline does apply.
    uniform = bool((mean == mean[0]).all() and (std == std[0]).all())
    if uniform and "scaling_factor" in applied and (mean[0] == 0 or "shift_factor" in applied):
        settings = {"scaling_factor": 1 / float(std[0]), "shift_factor": float(mean[0])}
        return {**settings, "latents_mean": None, "latents_std": None}
    if "latents_mean" in applied and normalization.channels in (None, len(mean)):
        # not every pipeline that applies mean and std divides by `scaling_factor` as well
        return {"scaling_factor": 1.0, "shift_factor": 0.0, **statistics}
    if uniform and mean[0] == 0 and std[0] == 1:
        return own

    # 3. Not at all.
    lacking = min(needed - applied) if needed - applied else "latents_mean"
    one_sided = [
        side
        for side, found in (("decodes", normalization.decoding), ("encodes", normalization.encoding))
        if lacking in found
    ]
    how = f"applies {lacking} only when it {one_sided[0]}" if one_sided else f"does not apply {lacking}"
    raise ValueError(f"a {name} {how}; {FOLD}")


def _with_interface(vae: ModelMixin, old: ModelMixin, settings: dict[str, Any], same: bool, ratio: int) -> ModelMixin:
    """Writes the normalization into an autoencoder, inside an adapter if it needs one to look as the old one does."""
    if has_batch_norm(old):
        new = vae
        if not has_batch_norm(vae):
            widths = (1,) * ratio.bit_length()
            channels, eps = old.config.latent_channels, old.config.batch_norm_eps
            new = PackedNormAutoencoder.around(
                vae, latent_channels=channels, block_out_channels=widths, batch_norm_eps=eps
            )
            new.bn.running_var.fill_(1 - eps)  # of an autoencoder whose latents need no normalization
            new.bn.to(vae.device, vae.dtype)
        if same:
            new.register_to_config(batch_norm_eps=old.config.batch_norm_eps)
            new.bn.load_state_dict(old.bn.state_dict())
        return new
    if is_video(old) and not is_video(vae):
        statistics = {key: settings[key] for key in ("latents_mean", "latents_std")}
        return SingleFrameAutoencoder.around(
            vae,
            z_dim=len(statistics["latents_mean"]),
            **statistics,
            scale_factor_spatial=ratio,
            scale_factor_temporal=old.config.get("scale_factor_temporal", 4),
            temperal_downsample=(False,) * (ratio.bit_length() - 1),
        )
    changed = {key: value for key, value in settings.items() if value != vae.config.get(key)}
    if changed:
        vae.register_to_config(**changed)
    return vae


def _update_components(pipe: ModularPipeline, vae: ModelMixin, old_ratio: int, ratio: int) -> None:
    """Puts an autoencoder into a modular pipeline, whose factors follow it by themselves, but not image processors."""
    pipe.update_components(vae=vae)
    processors = {key: value for key, value in pipe.components.items() if _counts_pixels(key, value)}
    if ratio != old_ratio and processors:
        with _silent():
            pipe.update_components(**{key: _scaled(value, old_ratio, ratio) for key, value in processors.items()})
        logger.warning(SWAP_AGAIN, type(pipe).__name__)


def _derived_attributes(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The numbers and image processors that a new pipeline of this class computes from the same components."""
    known = {**pipe.config, **pipe.components}
    parameters = inspect.signature(type(pipe).__init__).parameters
    try:
        with _silent():
            again = type(pipe)(**{name: known[name] for name in parameters if name in known})
    except Exception:  # what constructors raise is theirs
        return {}
    return {
        name: value
        for name, value in vars(again).items()
        if isinstance(value, (int, float, tuple)) or _counts_pixels(name, value)
    }


@contextmanager
def _silent():
    """Without the warnings that constructors of pipelines give."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def _update_derived_attributes(
    pipe: DiffusionPipeline, before: dict[str, Any], after: dict[str, Any], old_ratio: int, ratio: int
) -> None:
    """Updates a pipeline for an autoencoder of another compression ratio.

    Args:
        before, after: `_derived_attributes` with the old autoencoder and with the new one.
    """
    name = type(pipe).__name__
    proportional = {key: value for key, value in vars(pipe).items() if _counts_pixels(key, value)}
    factors = {key: _scaled(proportional[key], old_ratio, ratio) for key in FACTORS if key in proportional}
    for key, value in after.items():
        if _description(value) != _description(before.get(key)):
            setattr(pipe, key, value)
    if any(after.get(key) != factor for key, factor in factors.items()):
        for key, value in proportional.items():
            setattr(pipe, key, _scaled(value, old_ratio, ratio))
        logger.warning(SWAP_AGAIN, name)
    if ratio != old_ratio and "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        message = "call the %s with use_resolution_binning=False: its bins are for images of ratio %d"
        logger.warning(message, name, old_ratio)


def _counts_pixels(key: str, value: Any) -> bool:
    """Whether an attribute is proportional to the compression ratio."""
    is_processor = isinstance(value, ConfigMixin) and "vae_scale_factor" in value.config
    return is_processor or key in FACTORS


def _scaled(value: Any, old_ratio: int, ratio: int) -> Any:
    """A factor, or an image processor with one, for another compression ratio. Some factors are multiples of it."""
    if not isinstance(value, ConfigMixin):
        return value * ratio // old_ratio
    processor = copy.copy(value)
    processor.register_to_config(vae_scale_factor=value.config.vae_scale_factor * ratio // old_ratio)
    return processor


def _description(value: Any) -> Any:
    """What can be compared of an attribute."""
    return (type(value), dict(value.config)) if isinstance(value, ConfigMixin) else value
