"""`favae reconstruct`: a few images through one or more autoencoders."""

import argparse

from favae.cli_options import add_model_option, add_output_option
from favae.commands import add_command
from favae.errors import ConfigError
from favae.ranges import Pixels, in_range

DESCRIPTION = """Reconstruct images by one or more autoencoders, and put them side by side.

    favae reconstruct cat.jpg --model runs/favae/final --model sd=stabilityai/sd-vae-ft-mse --output out.png

The picture shows each image and its reconstructions, the part of them that differs most, enlarged, and the errors.
PSNR is printed for each image and model. Images keep their size, but for borders that are cropped where it is not a
multiple of the models' compression ratio."""


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        reconstruct,
        help="put images and their reconstructions side by side in one picture",
        description=DESCRIPTION,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files or folders of them")
    add_model_option(parser)
    add_output_option(parser, "file", metavar="FILE.png")
    parser.add_argument(
        "--resolution", type=in_range(Pixels), help="height and width of center crops (default: the whole image)"
    )


def reconstruct(arguments: argparse.Namespace) -> None:
    from favae.eval.results import format_table
    from favae.eval.side_by_side import compare_on_images, find_images, save_side_by_side

    if arguments.output.suffix != ".png":
        raise ConfigError(f"--output must end in .png, got {arguments.output}")
    comparisons = compare_on_images(find_images(arguments.images), arguments.model, resolution=arguments.resolution)
    save_side_by_side(arguments.output, comparisons)
    rows = []
    for comparison in comparisons:
        height, width = comparison.original.shape[-2:]
        psnr = {name: f"{value:.2f}" for name, value in comparison.psnr.items()}
        rows.append({"PSNR (dB)": comparison.name, "size": f"{width} x {height}", **psnr, " ": comparison.note})
    print(format_table(rows))
    print(f"picture: {arguments.output}")
