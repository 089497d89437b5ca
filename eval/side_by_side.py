"""A few images through several autoencoders, as one picture, for `favae reconstruct`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from favae.autoencoders import image_channels, load_autoencoder, reconstruct, spatial_compression_ratio
from favae.channels import in_color
from favae.data.decoding import UnusableImage, read_image
from favae.data.folders import FolderSource
from favae.data.images import center_crop, to_tensor, to_uint8
from favae.distributed import process_state
from favae.errors import DataError, ModelError, NonFiniteError
from favae.eval.autoencoder_evaluation import check_same_channels
from favae.eval.figures import INK, MUTED
from favae.eval.reconstruction import peak_signal_to_noise_ratio
from favae.eval.results import number_duplicates
from favae.eval.spectra import ZOOM, high_frequency_error, worst_windows
from favae.files import atomic_path

SMALLEST_CELL, LARGEST_CELL = 320, 640  # pixels on the longer side of an image in the picture
MARGIN, LINE = 12, 24  # pixels between cells, and of a line of text
FRAME = "#e02020"


@dataclass
class Comparison:
    """One image and its reconstructions.

    Attributes:
        name: of the image's file.
        original: (C, H, W) in [-1, 1]. reconstructions: of the same shape, clamped, by the model's name.
        psnr: in dB, on 8 bits, by the model's name.
        note: how the image was changed before it was encoded; "" if it was not.
    """

    name: str
    original: Tensor
    reconstructions: dict[str, Tensor]
    psnr: dict[str, float]
    note: str


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Image files, and those of folders.

    Raises:
        DataError: if a path is missing, or a folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            files += FolderSource(path, min_size=1, labels=False).files
        elif Path(path).is_file():
            files.append(Path(path))
        else:
            raise DataError(f"{path}: no such file or folder")
    return files


def open_image(file: Path, ratio: int, resolution: int | None, channels: int = 3) -> tuple[Tensor, str]:
    """An image of a size that is a multiple of the compression ratio, and how it was changed.

    Args:
        ratio: pixels per latent along each side.
        resolution: height and width of the center crop; None keeps the size, but for at most ratio - 1 pixels.
        channels: C, see `ImageDataset`.
    Returns:
        (C, H, W) in [-1, 1], and a note, "" if the image is as it was.
    Raises:
        DataError: if the file is not an image, or smaller than the compression ratio.
    """
    try:
        image = read_image(file, channels)
    except UnusableImage as error:
        raise DataError(f"{file} cannot be read as an image ({error})") from error
    size = image.size
    if resolution is not None:
        return to_tensor(center_crop(image, resolution)), f"{size[0]} x {size[1]}, resized and cropped"
    width, height = (side - side % ratio for side in size)
    if not (width and height):
        raise DataError(f"{file} has {size[0]} x {size[1]} pixels; these models need at least {ratio} x {ratio}")
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    note = "" if size == (width, height) else f"cropped from {size[0]} x {size[1]} to a multiple of {ratio}"
    return to_tensor(image.crop((left, top, left + width, top + height))), note


@torch.no_grad()
def compare_on_images(
    files: Sequence[Path], models: Sequence[tuple[str, str]], *, resolution: int | None = None
) -> list[Comparison]:
    """Reconstructs each image by each model.

    Args:
        files: of images.
        models: (name, path) each; a path is a folder or a hub name.
        resolution: see `open_image`.
    Raises:
        DataError: if an image cannot be read.
        ModelError: if a model cannot be opened, takes images of other channels than another, or none of this size.
        NonFiniteError: if a reconstruction is not finite.
    """
    device = process_state().device
    names = number_duplicates([name for name, _ in models])
    opened = {name: load_autoencoder(path).to(device) for name, (_, path) in zip(names, models)}
    ratio = math.lcm(*(spatial_compression_ratio(vae) for vae in opened.values()))
    first, other = next(iter(opened.items()))
    for name, vae in opened.items():
        check_same_channels(name, vae, first, other)
    comparisons = []
    for file in files:
        original, note = open_image(file, ratio, resolution, image_channels(other))
        reconstructions = {name: _reconstruct(vae, original, name).cpu() for name, vae in opened.items()}
        psnr = {
            name: float(peak_signal_to_noise_ratio(original[None], reconstruction[None]))
            for name, reconstruction in reconstructions.items()
        }
        comparisons.append(Comparison(file.name, original, reconstructions, psnr, note))
    return comparisons


def _reconstruct(vae: ModelMixin, image: Tensor, name: str) -> Tensor:
    height, width = image.shape[-2:]
    try:
        result = reconstruct(vae, image[None].to(vae.device))[0]
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name} takes no images of {width} x {height} pixels ({str(error).splitlines()[0]})"
        ) from error
    if result.shape != image.shape:
        raise ModelError(f"{name} gives an image of {width} x {height} pixels back at another size")
    if not torch.isfinite(result).all():
        raise NonFiniteError(f"the reconstruction of {name} is not finite; try float32 weights, or another checkpoint")
    return result.clamp(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# The picture


def save_side_by_side(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Writes a picture of all comparisons, one below the other.

    Each has three rows: the original and the reconstructions; the window of them in which the reconstructions miss most
    of the high frequencies, enlarged (a frame shows it in the original); the absolute errors, on one scale.
    """
    panels = [_panel(comparison) for comparison in comparisons]
    width = max(panel.width for panel in panels)
    picture = Image.new("RGB", (width, sum(panel.height for panel in panels)), "white")
    top = 0
    for panel in panels:
        picture.paste(panel, (0, top))
        top += panel.height
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def _panel(comparison: Comparison) -> Image.Image:
    """The three rows of one image, below a heading."""
    images = {"original": comparison.original, **comparison.reconstructions}
    errors = {name: image - comparison.original for name, image in comparison.reconstructions.items()}
    height, width = comparison.original.shape[-2:]

    # Enlarged pixels stay sharp, and images that are too large for the picture are averaged.
    scale = _scale(width, height)
    size = (round(width * scale), round(height * scale))
    resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    shown = {name: to_uint8(in_color(image)).permute(1, 2, 0).numpy() for name, image in images.items()}
    pixels = {name: Image.fromarray(values) for name, values in shown.items()}
    whole = {name: image.resize(size, resampling) for name, image in pixels.items()}

    # The window where the reconstructions together miss most of the high frequencies.
    combined = sum(high_frequency_error(error[None]) for error in errors.values())
    top, left, rows, columns = worst_windows(combined)[0].tolist()
    window = (left, top, left + columns, top + rows)
    zoom = Image.Resampling.NEAREST if scale * ZOOM >= 1 else Image.Resampling.LANCZOS
    zoomed = {name: image.crop(window).resize(size, zoom) for name, image in pixels.items()}
    _frame(whole["original"], [round(value * scale) for value in window])
    _frame(zoomed["original"], (0, 0, size[0] - 1, size[1] - 1))

    # Errors of all models on one scale, whose end few pixels exceed.
    absolute = {name: error.abs().mean(dim=0) for name, error in errors.items()}
    largest = max(float(np.quantile(error, 0.999)) for error in absolute.values()) or 1.0
    maps = {name: _heat(error / largest).resize(size, resampling) for name, error in absolute.items()}
    maps["original"] = Image.new("RGB", size, "white")
    legend = f"absolute error, mean over\nchannels; brightest:\n{largest * 127.5:.0f} of 255 levels"
    ImageDraw.Draw(maps["original"]).multiline_text((0, 0), legend, fill=MUTED, font=ImageFont.load_default(size=14))

    titles = {"original": "original"} | {name: f"{name}: {psnr:.2f} dB" for name, psnr in comparison.psnr.items()}
    note = f", {comparison.note}" if comparison.note else ""
    return _grid(f"{comparison.name}, {width} x {height}{note}", titles, [whole, zoomed, maps])


def _grid(heading: str, titles: dict[str, str], rows: Sequence[dict[str, Image.Image]]) -> Image.Image:
    """Rows of cells of one size, below a heading and the titles of the columns."""
    font = ImageFont.load_default(size=16)
    cell = rows[0]["original"].size
    column = MARGIN + max(cell[0], *(math.ceil(font.getlength(title)) for title in titles.values()))
    panel = Image.new(
        "RGB", (column * len(titles) + MARGIN, 2 * LINE + (cell[1] + MARGIN) * len(rows) + 2 * MARGIN), "white"
    )
    draw = ImageDraw.Draw(panel)
    draw.text((MARGIN, MARGIN // 2), heading, fill=MUTED, font=ImageFont.load_default(size=14))
    for i, (name, title) in enumerate(titles.items()):
        left = MARGIN + i * column
        draw.text((left, LINE + MARGIN // 2), title, fill=INK, font=font)
        for k, row in enumerate(rows):
            panel.paste(row[name], (left, 2 * LINE + MARGIN // 2 + k * (cell[1] + MARGIN)))
    return panel


def _frame(image: Image.Image, box: Sequence[int]) -> None:
    ImageDraw.Draw(image).rectangle(tuple(box), outline=FRAME, width=2)


def _scale(width: int, height: int) -> float:
    """How much an image is enlarged in the picture: by whole pixels if it is small."""
    longer = max(width, height)
    return math.ceil(SMALLEST_CELL / longer) if longer < LARGEST_CELL else LARGEST_CELL / longer


def _heat(values: Tensor) -> Image.Image:
    """(H, W) in [0, 1] and above to colors from black to light yellow."""
    colors = matplotlib.colormaps["magma"](values.clamp(0, 1).numpy(), bytes=True)
    return Image.fromarray(np.ascontiguousarray(colors[..., :3]))
