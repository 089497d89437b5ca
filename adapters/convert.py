"""Checkpoints of other programs to folders that `from_pretrained` opens, and back."""

import logging
from pathlib import Path

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.adapters.single_file import FORMATS, from_single_file, to_single_file
from favae.autoencoders import load_autoencoder
from favae.errors import CheckpointError
from favae.files import atomic_path

logger = logging.getLogger(__name__)

TIMESTEP_SHIFT = 0.3  # s in all configs that LightningDiT ships; diffusers' schedulers call 1 / s their shift


def convert_to_folder(
    file: str | Path,
    folder: str | Path,
    *,
    format: str,
    latents_stats: str | Path | None = None,
    scaling_factor: float | None = None,
) -> None:
    """Writes the model in a file of another program to a new folder.

    Args:
        file, format, latents_stats, scaling_factor: as for `from_single_file`.
        folder: must not exist, or be empty.
    Raises:
        CheckpointError: if the file cannot be read as this format, or the folder is not empty.
    """
    _check_new_folder(Path(folder))
    _save(from_single_file(file, format, latents_stats, scaling_factor), Path(folder))


def convert_to_pipeline(file: str | Path, folder: str | Path, *, vae: str) -> None:
    """Writes LightningDiT's transformer and an autoencoder as a `LightningDiTPipeline` to a new folder.

    Args:
        file: of LightningDiT.
        folder: must not exist, or be empty.
        vae: folder or hub name of the autoencoder.
    Raises:
        CheckpointError: if the file cannot be read, the autoencoder does not fit, or the folder is not empty.
        ModelError: if the autoencoder cannot be opened.
    """
    _check_new_folder(Path(folder))
    transformer = from_single_file(file, "lightningdit")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / TIMESTEP_SHIFT)
    autoencoder = load_autoencoder(vae)
    if autoencoder.config.get("latents_mean") is None:
        logger.warning("%s has no latents_mean, which LightningDiT normalizes by; --latents-stats writes it", vae)
    try:
        pipeline = LightningDiTPipeline(transformer=transformer, vae=autoencoder, scheduler=scheduler)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{vae}: {error}") from error
    _save(pipeline, Path(folder))


def convert_to_file(folder: str | Path, file: str | Path, *, format: str) -> None:
    """Writes a saved model as a new file of another program.

    Args:
        folder: of an autoencoder, a transformer, or a pipeline that has one.
        file: a .pt or .safetensors file that does not exist.
        format: as for `to_single_file`.
    Raises:
        CheckpointError: if the file exists, or the format cannot hold the model.
        ModelError: if there is no autoencoder in the folder.
    """
    if Path(file).exists():
        raise CheckpointError(f"{file} exists; name a new file")
    if FORMATS[format].model_class is LightningDiTTransformer2DModel:
        model = _open_transformer(Path(folder))
    else:
        model = load_autoencoder(str(folder))
    to_single_file(model, file, format)


def _open_transformer(folder: Path) -> LightningDiTTransformer2DModel:
    subfolder = "transformer" if (folder / "model_index.json").is_file() else None
    try:
        return LightningDiTTransformer2DModel.from_pretrained(folder, subfolder=subfolder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: no transformer could be opened ({str(error).splitlines()[0]})") from error


def _check_new_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder")


def _save(model: ModelMixin | DiffusionPipeline, folder: Path) -> None:
    with atomic_path(folder.resolve()) as temporary:
        model.save_pretrained(temporary)
