"""`favae compress`, `decompress` and `evaluate compression`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from favae.cli_options import (
    add_data_options,
    add_feature_options,
    add_loading_options,
    add_lpips_option,
    add_model_option,
    add_output_option,
    add_resolution_option,
    data_name,
    open_data,
    open_extractors,
    open_lpips,
    open_other_data,
)
from favae.commands import add_command
from favae.errors import ConfigError, DataError, hint
from favae.ranges import Positive, in_range

logger = logging.getLogger(__name__)

COMPRESS = """Write images to small files by a compression model.

    favae compress photographs/ cat.jpg --model runs/photos_fa_hific/final --output compressed

NAME.jpg becomes NAME.jpg.fav, in the folders that it was in. Prints bytes and bits per pixel of each. What cannot be
read in a folder is left out with a warning. Files are read by the same weights alone, on any device. It needs the extra
[compression]."""

DECOMPRESS = """Write what `favae compress` has written as PNG files.

    favae decompress compressed --model runs/photos_fa_hific/final --output images

NAME.jpg.fav becomes NAME.jpg.fav.png. A file that is damaged, foreign or of other weights is an error."""

EVALUATE = """Measure compression models by the files that they write, beside other formats at the same rates.

    favae evaluate compression --model fa=runs/fa_low/final --model fa=runs/fa_high/final --data IMAGES \\
        --resolution 256 --output runs/compression

A name that is given several times is one curve of as many rates. Every image is written and read: bpp counts whole
files. Other formats are measured at the rate of each model and at eight qualities. Prints a table; writes results.json
and rate_distortion.png, and into the former BD-rates where a curve has four rates or more.

With --training-data, tokenizers are measured as well: their tokens, or their latents rounded to each --step times the
std of their channel, coded by how often they occur in these images, or in 10,000 of them.

High, LH1 and so on: mean squared errors of Haar bands. power kept: the share of the radial spectrum that is left from
half of the Nyquist frequency up to it. Other columns are those of evaluate reconstruction, but all are of images that
are clamped to [-1, 1], as files of Pillow's formats hold them. Images are center crops."""


def add_commands(commands) -> None:
    for name, run, help, description in (
        ("compress", compress, "write images to small files", COMPRESS),
        ("decompress", decompress, "read the files of favae compress", DECOMPRESS),
    ):
        parser = add_command(commands, name, run, help=help, description=description)
        parser.add_argument("files", nargs="+", metavar="PATH", help="files, or folders of them")
        parser.add_argument("--model", required=True, help="a saved HyperpriorModelFA: a folder or a hub name")
        add_output_option(parser, "folder")


def add_evaluation(tasks) -> None:
    """Adds `evaluate compression` to the tasks of `evaluate`."""
    parser = add_command(
        tasks,
        "compression",
        evaluate_compression,
        help="measure files of compressed images",
        description=EVALUATE,
        after_interrupt="results.json holds the rows that were finished; the same command measures all of them again",
    )
    add_model_option(parser)
    add_resolution_option(parser)
    add_output_option(parser, "folder")
    parser.add_argument(
        "--formats",
        nargs="*",
        choices=["jpeg", "webp", "avif"],
        help="that models are compared with (default: those that Pillow has here)",
    )
    add_lpips_option(parser)
    parser.add_argument("--training-data", metavar="IMAGES", help="for tokenizers that were not made for files")
    parser.add_argument(
        "--step",
        type=in_range(Positive),
        nargs="+",
        help="with --training-data (default: 0.25 0.5 1 2)",
    )
    add_data_options(parser, "--data", split="validation")
    add_feature_options(parser)
    add_loading_options(parser)


def compress(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from favae.autoencoders import image_channels
    from favae.bitstream import LARGEST_SIDE
    from favae.data.folders import printable
    from favae.eval.compression import open_compression_model
    from favae.eval.results import format_table
    from favae.eval.side_by_side import open_image
    from favae.files import atomic_path
    from favae.models.hyperprior_model_fa import LatentCoder

    model = open_compression_model(arguments.model)
    coder, rows, skipped = LatentCoder(model), [], 0
    images = _images(arguments.files)
    for file, place in tqdm(images, desc="compress"):
        try:
            image, _ = open_image(file, 1, None, image_channels(model))
            if max(image.shape[-2:]) > LARGEST_SIDE:
                raise DataError(f"{file} has a side of more than {LARGEST_SIDE:,} pixels")
        except DataError as error:
            if file in map(Path, arguments.files):
                raise
            skipped += 1
            logger.warning("skipped %s (%d of %d)", error, skipped, len(images))
            continue
        with hint(str(file)):
            (data,) = coder.compress(image.unsqueeze(0))
        output = arguments.output / f"{place}.fav"
        with atomic_path(output) as temporary:
            temporary.write_bytes(data)
        height, width = image.shape[-2:]
        bits = f"{8 * len(data) / (height * width):.4f}"
        rows.append({"": printable(str(output)), "size": f"{width} x {height}", "bytes": f"{len(data):,}", "bpp": bits})
    if not rows:
        raise DataError("not one of the images can be read")
    print(format_table(rows))


def decompress(arguments: argparse.Namespace) -> None:
    from torchvision.transforms.functional import to_pil_image
    from tqdm import tqdm

    from favae.data.decoding import set_largest_image
    from favae.data.images import to_uint8
    from favae.eval.compression import open_compression_model
    from favae.files import atomic_path
    from favae.models.hyperprior_model_fa import LatentCoder

    set_largest_image()
    coder = LatentCoder(open_compression_model(arguments.model))
    for file, place in tqdm(_compressed(arguments.files), desc="decompress"):
        with hint(str(file)):
            (image,) = coder.decompress([file.read_bytes()])
        with atomic_path(arguments.output / place) as temporary:
            to_pil_image(to_uint8(image)).save(temporary, format="PNG")


def _images(paths: list[str]) -> list[tuple[Path, Path]]:
    """Image files, and where they are below the folder that was named."""
    from favae.eval.side_by_side import find_images

    return _apart([(file, _below(file, given)) for given in paths for file in find_images([given])])


def _compressed(paths: list[str]) -> list[tuple[Path, Path]]:
    """Files that end in .fav, and where their PNG files go: where they are below the folder that was named.

    Raises:
        DataError: if there are none.
    """
    from favae.data.folders import ending_of, walk

    found = []
    for given in paths:
        below = [Path(folder, name) for folder, names in walk(given) for name in names if ending_of(name) == ".fav"]
        files = sorted(below) if Path(given).is_dir() else [Path(given)]
        if not files:
            raise DataError(f"{given} holds no file that ends in .fav")
        places = [_below(file, given) for file in files]
        found += [(file, place.with_name(f"{place.name}.png")) for file, place in zip(files, places)]
    return _apart(found)


def _apart(found: list[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """Raises DataError if two files would be written to one place."""
    first: dict[Path, Path] = {}
    for file, place in found:
        if place in first:
            raise DataError(f"{first[place]} and {file} would both be {place} in the output; write them apart")
        first[place] = file
    return found


def _below(file: Path, given: str) -> Path:
    return file.relative_to(given) if Path(given).is_dir() else Path(file.name)


def evaluate_compression(arguments: argparse.Namespace) -> None:
    from favae.data.images import ImageDataset
    from favae.data.sources import Selection
    from favae.eval import compression
    from favae.eval.results import format_table, shown_metrics

    if arguments.step and not arguments.training_data:
        raise ConfigError("--step is for tokenizers, which need --training-data")
    available = compression.available_formats()
    formats = available if arguments.formats is None else arguments.formats
    for format in formats:
        if format not in available:
            raise ConfigError(f"--formats {format}: this Pillow writes {', '.join(available)} alone")
    images, training_images = ImageDataset(open_data(arguments), arguments.resolution), None
    if arguments.training_data:
        source = open_other_data(arguments, arguments.training_data, "train")
        training_images = ImageDataset(Selection(source, compression.COUNTED), arguments.resolution)
    rows = compression.evaluate_compression(
        arguments.model,
        images,
        open_extractors(arguments),
        arguments.output,
        data_name=data_name(arguments),
        formats=formats,
        training_images=training_images,
        **({"steps": arguments.step} if arguments.step else {}),
        lpips=open_lpips(arguments.lpips_weights),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )
    print(format_table([{"": row["label"], **shown_metrics(row)} for row in rows]))
