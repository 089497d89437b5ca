"""Files in the layouts of other programs, opened as models and written from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, VQModel
from safetensors.torch import save_file
from torch import Tensor

from favae import LightningDiTTransformer2DModel, VQModelFA
from favae.adapters.checkpoints import CONTAINERS, read_checkpoint
from favae.adapters.favae_vq import vq_model_fa_from_favae_vq
from favae.adapters.ldm import autoencoder_kl_from_ldm, ldm_from_autoencoder_kl
from favae.adapters.lightningdit import lightningdit_from_transformer, transformer_from_lightningdit
from favae.adapters.taming import taming_from_vq_model, vq_model_from_taming
from favae.errors import CheckpointError
from favae.files import atomic_path


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        kind: what it becomes.
        convert: the original's state -> config and state of ours.
        revert: config and state of ours -> the original's state; None where there is no way back.
        containers: where in a file the original's program looks for the tensors, the first that is there.
        written: the containers that it expects.
    """

    kind: type[ModelMixin]
    convert: Callable[[Mapping[str, Tensor]], tuple[dict, dict[str, Tensor]]]
    revert: Callable[[Mapping, Mapping[str, Tensor]], dict[str, Tensor]] | None
    containers: tuple[str, ...] = CONTAINERS
    written: tuple[str, ...] = ("state_dict",)


FORMATS = {
    "vavae": Layout(AutoencoderKL, autoencoder_kl_from_ldm, ldm_from_autoencoder_kl),
    "lightningdit": Layout(
        LightningDiTTransformer2DModel,
        transformer_from_lightningdit,
        lightningdit_from_transformer,
        containers=("ema", "model", "state_dict"),
        written=("model", "ema"),
    ),
    "mar": Layout(
        AutoencoderKL,
        partial(autoencoder_kl_from_ldm, scaling_factor=0.2325),
        ldm_from_autoencoder_kl,
        containers=("model", "state_dict"),
        written=("model",),
    ),
    "taming-vq": Layout(VQModel, vq_model_from_taming, taming_from_vq_model),
    "favae-vq": Layout(VQModelFA, vq_model_fa_from_favae_vq, None, containers=("model", "state_dict")),
}


def from_single_file(
    path: str | Path, format: str, latents_stats: str | Path | None = None, scaling_factor: float | None = None
) -> ModelMixin:
    """Opens a file of another program as a model.

    Args:
        path: .safetensors, or what `torch.save` wrote; nothing in it is executed.
        format: "vavae" (VA-VAE, and LDM's autoencoders), "lightningdit" (its moving average, if the file has one),
            "mar" (KL-16), "taming-vq" or "favae-vq".
        latents_stats: a statistics file of LightningDiT for an `AutoencoderKL`; see `read_latent_statistics`.
        scaling_factor: of an autoencoder, in place of the format's own.
    Returns:
        In evaluation mode, of the file's dtype: `AutoencoderKL`, `LightningDiTTransformer2DModel`, `AutoencoderKL`,
        `VQModel` or `VQModelFA`.
    Raises:
        CheckpointError: if the file cannot be read, has another layout, or the other arguments do not fit.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    layout = FORMATS[format]
    if latents_stats is not None and layout.kind is not AutoencoderKL:
        raise CheckpointError(f"latent statistics belong to an AutoencoderKL; {format} is a {layout.kind.__name__}")
    if scaling_factor is not None and layout.kind is LightningDiTTransformer2DModel:
        raise CheckpointError(f"a scaling factor belongs to an autoencoder; {format} has none")
    state = read_checkpoint(path, layout.containers)
    try:
        config, state = layout.convert(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is no {format} checkpoint: {error}") from error
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    if latents_stats is not None:
        config |= read_latent_statistics(latents_stats, config["latent_channels"])
    model = layout.kind.from_config(config)
    model.load_state_dict(state, assign=True)
    return model.eval()


def to_single_file(model: ModelMixin, path: str | Path, format: str) -> None:
    """Writes a model as a file of another program.

    Args:
        model: of the class that `from_single_file` makes of the format, none of its subclasses.
        path: .safetensors, the tensors alone; or .pt, in the containers that the original's code expects.
    Raises:
        CheckpointError: if there is no way back, the model is of another class, or the original cannot express it.
    """
    path, layout = Path(path), FORMATS[format]
    if layout.revert is None:
        raise CheckpointError(f"there is no way back to {format}")
    if type(model) is not layout.kind:
        raise CheckpointError(
            f"{format} is written from a {layout.kind.__name__}, this model is of the class {type(model).__name__}"
        )
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{path}: the file must end in .safetensors or .pt")
    state = layout.revert(model.config, model.state_dict())
    with atomic_path(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(state, temporary)
        else:
            torch.save({container: state for container in layout.written}, temporary)


def read_latent_statistics(path: str | Path, channels: int) -> dict[str, list[float]]:
    """LightningDiT's statistics of its latents as the config of an autoencoder.

    Args:
        path: a file with `mean` and `std`, (1, C, 1, 1) each.
        channels: of the autoencoder's latents.
    Returns:
        `latents_mean` and `latents_std`.
    Raises:
        CheckpointError: if it has neither, or they are not one number per channel.
    """
    state = read_checkpoint(path, containers=())
    if not {"mean", "std"} <= state.keys():
        raise CheckpointError(f"{path} lacks mean and std: no latent statistics of LightningDiT")
    mean, std = state["mean"].double().flatten(), state["std"].double().flatten()
    if not len(mean) == len(std) == channels:
        raise CheckpointError(f"{path} has statistics of {len(mean)} channels, the autoencoder has {channels}")
    if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise CheckpointError(f"{path}: the deviations must be above 0, and all statistics finite")
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
