"""Files in the layouts of other programs, opened as models and written from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, ModelMixin, VQModel
from safetensors.torch import save_file
from torch import Tensor

from favae import LightningDiTTransformer2DModel, VQModelFA
from favae.adapters.checkpoints import CONTAINERS, read_checkpoint
from favae.adapters.favae_vq import vq_model_fa_from_favae_vq
from favae.adapters.flux2 import flux2_from_original, original_from_flux2
from favae.adapters.ldm import (
    autoencoder_kl_from_ldm,
    autoencoder_tensors,
    check_attention,
    ldm_from_autoencoder_kl,
)
from favae.adapters.lightningdit import lightningdit_from_transformer, transformer_from_lightningdit
from favae.adapters.taming import taming_from_vq_model, vq_model_from_taming
from favae.errors import CheckpointError
from favae.files import atomic_path


@dataclass(frozen=True)
class Layout:
    """How another program stores a model.

    Attributes:
        model_class: what the model becomes here.
        convert: the original's state -> our config and state.
        revert: our config and state -> the original's state; None if there is no way back.
        containers: keys under which the original's program may keep the tensors; the first one that a file has counts.
        written_containers: the keys that it expects.
    """

    model_class: type[ModelMixin]
    convert: Callable[[Mapping[str, Tensor]], tuple[dict, dict[str, Tensor]]]
    revert: Callable[[Mapping, Mapping[str, Tensor]], dict[str, Tensor]] | None
    containers: tuple[str, ...] = CONTAINERS
    written_containers: tuple[str, ...] = ("state_dict",)


def _autoencoder_from(
    state: Mapping[str, Tensor], *, of_mar: bool, scaling_factor: float | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    check_attention(autoencoder_tensors(state), of_mar=of_mar)
    return autoencoder_kl_from_ldm(state, scaling_factor)


def _autoencoder_to(config: Mapping, state: Mapping[str, Tensor], *, of_mar: bool) -> dict[str, Tensor]:
    converted = ldm_from_autoencoder_kl(config, state)
    check_attention(converted, of_mar=of_mar)
    return converted


FORMATS = {
    "ldm": Layout(AutoencoderKL, partial(_autoencoder_from, of_mar=False), partial(_autoencoder_to, of_mar=False)),
    "flux2": Layout(AutoencoderKLFlux2, flux2_from_original, original_from_flux2),
    "lightningdit": Layout(
        LightningDiTTransformer2DModel,
        transformer_from_lightningdit,
        lightningdit_from_transformer,
        containers=("ema", "model", "state_dict"),
        written_containers=("model", "ema"),
    ),
    "mar": Layout(
        AutoencoderKL,
        partial(_autoencoder_from, of_mar=True, scaling_factor=0.2325),
        partial(_autoencoder_to, of_mar=True),
        containers=("model", "state_dict"),
        written_containers=("model",),
    ),
    "taming-vq": Layout(VQModel, vq_model_from_taming, taming_from_vq_model),
    "favae-vq": Layout(VQModelFA, vq_model_fa_from_favae_vq, None, containers=("model", "state_dict")),
}


def find_layout(format: str) -> Layout:
    """Raises CheckpointError for a format that is not there."""
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return FORMATS[format]


def from_single_file(
    path: str | Path, format: str, latents_stats: str | Path | None = None, scaling_factor: float | None = None
) -> ModelMixin:
    """Opens a file of another program as a model.

    Args:
        path: .safetensors, or what `torch.save` wrote; nothing in it is executed.
        format: "ldm" (LDM's autoencoders, Stable Diffusion's, VA-VAE), "flux2", "lightningdit" (its moving average, if
            the file has one), "mar" (KL-16), "taming-vq" or "favae-vq".
        latents_stats: a statistics file of LightningDiT for an `AutoencoderKL`; see `read_latent_statistics`. They are
            of latents that nothing scales, so the scaling factor is 1 with them.
        scaling_factor: of an autoencoder, in place of the file's own, the format's own, or that 1.
    Returns:
        A model in evaluation mode, in the file's dtype: an `AutoencoderKL`, an `AutoencoderKLFlux2`, a
        `LightningDiTTransformer2DModel`, an `AutoencoderKL`, a `VQModel` or a `VQModelFA`.
    Raises:
        CheckpointError: if the file cannot be read, has another layout, or the other arguments do not fit.
    """
    layout = find_layout(format)
    if latents_stats is not None and layout.model_class is not AutoencoderKL:
        raise CheckpointError(f"latent statistics are for an AutoencoderKL, not a {layout.model_class.__name__}")
    if scaling_factor is not None and "scaling_factor" not in signature(layout.model_class).parameters:
        raise CheckpointError(f"a {layout.model_class.__name__} has no scaling factor")
    state = read_checkpoint(path, layout.containers)
    try:
        config, state = layout.convert(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not a {format} checkpoint: {error}") from error
    if latents_stats is not None:
        config |= {"scaling_factor": 1.0, **read_latent_statistics(latents_stats, config["latent_channels"])}
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    model = layout.model_class.from_config(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_single_file(model: ModelMixin, path: str | Path, format: str) -> None:
    """Writes a model as a file of another program.

    Args:
        model: of the class that `from_single_file` makes of the format; subclasses are refused.
        path: .safetensors, which gets the tensors alone, or .pt, with the containers that the original's code expects.
    Raises:
        CheckpointError: if the format or the model cannot be written, or the name ends in something else.
    """
    path, layout = Path(path), find_layout(format)
    if layout.revert is None:
        raise CheckpointError(f"there is no way back to {format}")
    if type(model) is not layout.model_class:
        raise CheckpointError(
            f"the format {format} has no place for the networks of this {type(model).__name__}: it is written from a "
            f"stock {layout.model_class.__name__}"
        )
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{path}: the file must end in .safetensors or .pt")
    state = layout.revert(model.config, model.state_dict())
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({container: state for container in layout.written_containers}, temporary)


def read_latent_statistics(path: str | Path, channels: int) -> dict[str, list[float]]:
    """LightningDiT's statistics of its latents, as settings of an autoencoder.

    Args:
        path: a file with `mean` and `std`, (1, C, 1, 1) each.
        channels: of the autoencoder's latents.
    Returns:
        `latents_mean` and `latents_std`.
    Raises:
        CheckpointError: if the file has no such statistics, or not finite ones of so many channels.
    """
    state = read_checkpoint(path, containers=())
    if not {"mean", "std"} <= state.keys():
        raise CheckpointError(f"{path} lacks mean and std: not a statistics file of LightningDiT")
    mean, std = state["mean"].double().flatten(), state["std"].double().flatten()
    if not len(mean) == len(std) == channels:
        raise CheckpointError(f"{path} has statistics of {len(mean)} channels, the autoencoder has {channels}")
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise CheckpointError(f"{path}: mean and std must be finite, and std above 0")
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
