"""Checkpoints of other programs to folders that `from_pretrained` opens, and back.

favae convert vavae.pt vavae --format vavae --latents-stats latents_stats.pt
favae convert lightningdit.pt pipeline --format lightningdit --vae vavae
favae convert vavae vavae.pt --format vavae --reverse
"""

import argparse
import sys
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel
from favae.adapters.single_file import FORMATS, from_single_file, to_single_file
from favae.autoencoders import load_autoencoder
from favae.errors import CheckpointError, FavaeError
from favae.files import atomic_path

TIMESTEP_SHIFT = 0.3  # s of all configs that LightningDiT ships; diffusers' schedulers call 1 / s their shift


def convert(arguments: argparse.Namespace) -> None:
    """SRC, a file of another program, to DST, a folder of `save_pretrained`."""
    source, destination = arguments.source, arguments.destination
    if destination.is_dir() and any(destination.iterdir()):
        raise CheckpointError(f"{destination} is not empty; name a new folder")
    if destination.exists() and not destination.is_dir():
        raise CheckpointError(f"{destination} is a file; name a new folder")
    statistics = arguments.latents_stats
    if arguments.vae is None:
        model = from_single_file(source, arguments.format, statistics, arguments.scaling_factor)
    elif arguments.format != "lightningdit" or statistics or arguments.scaling_factor is not None:
        raise CheckpointError("--vae makes a pipeline of a lightningdit, whose autoencoder brings its own statistics")
    else:
        model = _pipeline(from_single_file(source, arguments.format), arguments.vae)
    with atomic_path(destination.resolve()) as folder:
        model.save_pretrained(folder)


def _pipeline(transformer: LightningDiTTransformer2DModel, vae: str) -> LightningDiTPipeline:
    try:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / TIMESTEP_SHIFT)
        return LightningDiTPipeline(transformer=transformer, vae=load_autoencoder(vae), scheduler=scheduler)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{vae}: {error}") from error


def revert(arguments: argparse.Namespace) -> None:
    """SRC, a folder of `save_pretrained`, to DST, a file of another program."""
    for option in ("latents_stats", "scaling_factor", "vae"):
        if getattr(arguments, option) is not None:
            raise CheckpointError(f"--{option.replace('_', '-')} has no place in a {arguments.format} file (--reverse)")
    if arguments.destination.exists():
        raise CheckpointError(f"{arguments.destination} exists; name a new file")
    to_single_file(_open(str(arguments.source), arguments.format), arguments.destination, arguments.format)


def _open(path: str, format: str) -> ModelMixin:
    if FORMATS[format].kind is not LightningDiTTransformer2DModel:
        return load_autoencoder(path)
    try:
        folder = "transformer" if (Path(path) / "model_index.json").is_file() else None
        return LightningDiTTransformer2DModel.from_pretrained(path, subfolder=folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: no transformer could be opened here ({str(error).splitlines()[0]})") from error


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="favae")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "convert",
        help="checkpoints of other programs, to and from diffusers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", type=Path, metavar="SRC", help="a .pt, .ckpt, .pth or .safetensors file")
    command.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    command.add_argument("--format", choices=FORMATS, required=True, help="the layout of the file")
    command.add_argument("--reverse", action="store_true", help="from the folder SRC to the .pt or .safetensors DST")
    command.add_argument("--latents-stats", type=Path, metavar="FILE", help="LightningDiT's latents_stats.pt (vavae)")
    command.add_argument("--scaling-factor", type=float, help="of an autoencoder, in place of the format's own")
    command.add_argument("--vae", metavar="FOLDER", help="makes a pipeline of a lightningdit and this autoencoder")
    arguments = parser.parse_args(argv)
    try:
        revert(arguments) if arguments.reverse else convert(arguments)
    except (FavaeError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
