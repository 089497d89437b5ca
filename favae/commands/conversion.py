"""`favae convert`: checkpoints of other programs."""

import argparse
from pathlib import Path

from favae.commands import add_command
from favae.errors import ConfigError
from favae.ranges import Positive, in_range

DESCRIPTION = """Convert checkpoints of other programs to folders that from_pretrained opens, and back.

    favae convert vavae.pt vavae --format vavae --latents-stats latents_stats.pt
    favae convert lightningdit.pt pipeline --format lightningdit --vae vavae
    favae convert vavae vavae.pt --format vavae --reverse"""

FORMAT_NAMES = ("vavae", "lightningdit", "mar", "taming-vq", "favae-vq")  # the keys of adapters' FORMATS


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "convert",
        convert,
        help="convert checkpoints of other programs to diffusers folders, and back",
        description=DESCRIPTION,
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a .pt, .ckpt, .pth or .safetensors file")
    parser.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--format", choices=FORMAT_NAMES, required=True, help="the layout of the file")
    parser.add_argument("--reverse", action="store_true", help="from the folder SRC to the .pt or .safetensors DST")
    parser.add_argument("--latents-stats", type=Path, metavar="FILE", help="LightningDiT's latents_stats.pt (vavae)")
    parser.add_argument(
        "--scaling-factor", type=in_range(Positive), help="of an autoencoder, in place of the format's own"
    )
    parser.add_argument("--vae", metavar="FOLDER", help="makes a pipeline of a lightningdit and this autoencoder")


def convert(arguments: argparse.Namespace) -> None:
    from favae.adapters.convert import convert_to_file, convert_to_folder, convert_to_pipeline

    options = {"latents_stats": arguments.latents_stats, "scaling_factor": arguments.scaling_factor}
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if arguments.reverse:
        if given or arguments.vae:
            raise ConfigError(f"{(given or ['--vae'])[0]} cannot be combined with --reverse")
        convert_to_file(arguments.source, arguments.destination, format=arguments.format)
    elif arguments.vae:
        if given or arguments.format != "lightningdit":
            raise ConfigError("--vae makes a pipeline of a lightningdit, whose autoencoder has its own statistics")
        convert_to_pipeline(arguments.source, arguments.destination, vae=arguments.vae)
    else:
        convert_to_folder(arguments.source, arguments.destination, format=arguments.format, **options)
