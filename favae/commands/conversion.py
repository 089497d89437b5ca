"""`favae convert`, `export` and `half-precision`: models of other programs here, ours in theirs, and in float16."""

import argparse
import math
from pathlib import Path

from favae.cli_options import add_data_options, open_data
from favae.commands import add_command
from favae.errors import ConfigError, DataError, ModelError
from favae.files import atomic_path
from favae.ranges import Count, Pixels, Positive, in_range

CONVERT = """Convert checkpoints of other programs to folders that from_pretrained opens.

    favae convert vavae.pt vavae --format ldm --latents-stats latents_stats.pt
    favae convert lightningdit.pt pipeline --format lightningdit --vae vavae

ldm: autoencoders of Stable Diffusion, VA-VAE, and others of latent diffusion; flux2: FLUX.2's; taesd: TAESD's and
TAEF2's, SRC being the folder with the files of encoder and decoder. favae export is the way back
from all but taesd and favae-vq."""

EXPORT = """Export a model to another program.

    favae export vae vae.safetensors --format ldm         ComfyUI, A1111, Forge, VA-VAE's code (a .pt file)
    favae export vae vae.safetensors --format flux2       FLUX.2's layout, with the batch norm of the latents
    favae export vae onnx --format onnx                   folders vae_encoder and vae_decoder, as optimum's

ldm and flux2 hold stock networks (AutoencoderKL, AutoencoderKLFlux2), onnx holds any. The others are the formats of
favae convert."""

HALF_PRECISION = """Scale an autoencoder's weights so that float16 holds its activations; its images stay.

    favae half-precision stabilityai/sdxl-vae vae --data photos

Works for AutoencoderKL and models of the same layers, ours too. The new config says that pipelines need not upcast."""

# The keys of adapters' FORMATS, and what has a file for each half.
FORMAT_NAMES = ("ldm", "flux2", "taesd", "lightningdit", "mar", "taming-vq", "favae-vq")
EXPORT_FORMAT_NAMES = ("ldm", "flux2", "onnx", "lightningdit", "mar", "taming-vq")


def add_commands(commands) -> None:
    parser = add_command(
        commands,
        "convert",
        convert,
        help="convert checkpoints of other programs to diffusers folders",
        description=CONVERT,
    )
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="a .pt, .ckpt, .pth or .safetensors file; for taesd, a folder"
    )
    parser.add_argument("destination", type=Path, metavar="DST", help="a new folder")
    parser.add_argument("--format", choices=FORMAT_NAMES, required=True, help="the layout of the file")
    parser.add_argument("--latents-stats", type=Path, metavar="FILE", help="LightningDiT's latents_stats.pt (VA-VAE)")
    parser.add_argument(
        "--scaling-factor", type=in_range(Positive), help="of an autoencoder, in place of the format's own"
    )
    parser.add_argument("--vae", metavar="FOLDER", help="makes a pipeline of a lightningdit and this autoencoder")

    parser = add_command(
        commands,
        "export",
        export,
        help="write a model as a file of ComfyUI, A1111, FLUX.2's or VA-VAE's code, or as ONNX",
        description=EXPORT,
    )
    parser.add_argument("model", metavar="MODEL", help="a saved model or pipeline: a folder or a hub name")
    parser.add_argument(
        "destination", type=Path, metavar="OUT", help="a new .safetensors or .pt file; for onnx, a new folder"
    )
    parser.add_argument("--format", choices=EXPORT_FORMAT_NAMES, required=True, help="the layout to write")

    parser = add_command(
        commands,
        "half-precision",
        half_precision,
        help="scale an autoencoder's weights so that its activations do not overflow in float16",
        description=HALF_PRECISION,
    )
    parser.add_argument("model", metavar="MODEL", help="a saved autoencoder or pipeline: a folder or a hub name")
    parser.add_argument("destination", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument(
        "--resolution", type=in_range(Pixels), default=256, help="height and width of center crops (default: 256)"
    )
    parser.add_argument(
        "--num-images", type=in_range(Count), default=8, help="how many images are looked at (default: 8)"
    )
    add_data_options(parser, "--data", split="train")


def convert(arguments: argparse.Namespace) -> None:
    from favae.adapters.convert import convert_to_folder, convert_to_pipeline

    options = {"latents_stats": arguments.latents_stats, "scaling_factor": arguments.scaling_factor}
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if arguments.vae:
        if given or arguments.format != "lightningdit":
            raise ConfigError("--vae makes a pipeline of a lightningdit, whose autoencoder has its own statistics")
        convert_to_pipeline(arguments.source, arguments.destination, vae=arguments.vae)
    else:
        convert_to_folder(arguments.source, arguments.destination, format=arguments.format, **options)


def export(arguments: argparse.Namespace) -> None:
    from favae.adapters import export as adapters_export

    adapters_export.export(arguments.model, arguments.destination, format=arguments.format)


def half_precision(arguments: argparse.Namespace) -> None:
    from favae.adapters.convert import check_new_folder
    from favae.adapters.half_precision import limit_activations
    from favae.autoencoders import image_channels, load_autoencoder
    from favae.data.images import ImageDataset, skip_missing
    from favae.data.sources import Selection

    check_new_folder(arguments.destination)
    vae = load_autoencoder(arguments.model)
    source = Selection(open_data(arguments), arguments.num_images)
    data = ImageDataset(source, arguments.resolution, channels=image_channels(vae))
    batch = skip_missing([data[i] for i in range(len(data))])
    if batch is None:
        raise DataError("not one of the images can be read")
    report = limit_activations(vae, batch["image"])
    if not math.isfinite(report.half_difference):
        raise ModelError(f"{arguments.model}: float16 overflows where weights cannot be scaled")
    vae.register_to_config(force_upcast=False)
    with atomic_path(arguments.destination.resolve()) as folder:
        vae.save_pretrained(folder)
    print(f"largest activation: {report.largest_before:,.0f} before, {report.largest_after:,.0f} after")
    print(f"images in [-1, 1] differ by at most {report.difference:.1g}, in float16 {report.half_difference:.1g}")
