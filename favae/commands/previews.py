"""`favae preview`: a linear map from latents to colors, for previews while a generator samples."""

import argparse
from pathlib import Path

from favae.cli_options import add_data_options, add_loading_options, add_output_option, open_data
from favae.commands import add_command
from favae.errors import ConfigError
from favae.files import check_output
from favae.ranges import Count, Pixels, in_range

DESCRIPTION = """Fit a linear map from latents to colors, for previews of latents without a decoder.

    favae preview runs/favae/final --data photos

The map is written into the model's config.json, as latent_rgb_factors (C x 3) and latent_rgb_factors_bias (3), for
normalized latents and colors in [-1, 1], as ComfyUI's latent formats have them. The picture shows images and their
previews."""

EXAMPLES = 6  # images in the picture


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "preview",
        preview,
        help="fit previews of latents, which need no decoder, and show them",
        description=DESCRIPTION,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the folder of a saved autoencoder or pipeline")
    add_output_option(parser, "file", required=False, metavar="FILE.png", help="(default: MODEL/previews.png)")
    parser.add_argument(
        "--resolution", type=in_range(Pixels), default=256, help="height and width of center crops (default: 256)"
    )
    parser.add_argument(
        "--num-images", type=in_range(Count), default=256, help="how many images are used, at most (default: 256)"
    )
    add_data_options(parser, "--data", split="train")
    add_loading_options(parser)


def preview(arguments: argparse.Namespace) -> None:
    config_file = find_config(arguments.model)
    output = arguments.output or arguments.model / "previews.png"
    check_output(config_file, "file", "MODEL")
    check_output(output, "file", "--output")

    from favae.adapters.latent_previews import fit_and_save_previews
    from favae.data.images import ImageDataset
    from favae.data.sources import Selection

    map = fit_and_save_previews(
        str(arguments.model),
        config_file,
        ImageDataset(Selection(open_data(arguments), arguments.num_images), arguments.resolution),
        output,
        num_examples=EXAMPLES,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    print(f"the map explains {map.explained:.2%} of the patches' mean colors; written to {config_file}")
    print(f"picture: {output}")


def find_config(folder: Path) -> Path:
    """config.json of an autoencoder, alone or in a pipeline.

    Raises:
        ConfigError: if there is none.
    """
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        if file.is_file():
            return file
    raise ConfigError(f"{folder}: no folder of an autoencoder, into whose config.json previews are written")
