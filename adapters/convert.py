"""Checkpoints of other programs to folders that `from_pretrained` opens; `favae.adapters.export` is the way back."""

import logging
from pathlib import Path

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin

from favae import LightningDiTPipeline
from favae.adapters.single_file import from_single_file
from favae.adapters.taesd import autoencoder_from_taesd
from favae.autoencoders import load_autoencoder
from favae.errors import CheckpointError
from favae.files import atomic_path

logger = logging.getLogger(__name__)

TAESD_PARTS = ("encoder", "decoder")
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
        file, format, latents_stats, scaling_factor: as for `from_single_file`; for "taesd", the folder with the files
            of encoder and decoder.
        folder: must not exist, or be empty.
    Raises:
        CheckpointError: if the file cannot be read as this format, or the folder is not empty.
    """
    check_new_folder(Path(folder))
    if format == "taesd":
        if latents_stats is not None or scaling_factor is not None:
            raise CheckpointError("format taesd takes neither latent statistics nor another scaling factor")
        model = autoencoder_from_taesd(*(_only_file(Path(file), part) for part in TAESD_PARTS))
    else:
        model = from_single_file(file, format, latents_stats, scaling_factor)
    _save(model, Path(folder))


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
    check_new_folder(Path(folder))
    transformer = from_single_file(file, "lightningdit")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / TIMESTEP_SHIFT)
    autoencoder = load_autoencoder(vae)
    if autoencoder.config.get("latents_mean") is None:
        logger.warning("%s has no latents_mean, which LightningDiT normalizes by; --latents-stats writes it", vae)
    try:
        pipeline = LightningDiTPipeline(transformer, autoencoder, scheduler, text_encoder=None, tokenizer=None)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{vae}: {error}") from error
    _save(pipeline, Path(folder))


def check_new_folder(folder: Path) -> None:
    """Raises CheckpointError if there is a file, or a folder that is not empty."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder")


def _only_file(folder: Path, part: str) -> Path:
    found = [file for suffix in (".safetensors", ".pth") for file in sorted(folder.glob(f"*{part}{suffix}"))]
    if len(found) != 1:
        raise CheckpointError(f"{folder} must be a folder with one file *{part}.safetensors or .pth, has {len(found)}")
    return found[0]


def _save(model: ModelMixin | DiffusionPipeline, folder: Path) -> None:
    with atomic_path(folder.resolve()) as temporary:
        model.save_pretrained(temporary)
