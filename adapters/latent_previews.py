"""Previews of latents without a decoder: a linear map from each latent to the color of its patch."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from favae.autoencoders import decode, encode, image_channels, load_autoencoder, measure_budget
from favae.channels import in_color
from favae.data.images import ImageDataset, read_in_order, to_uint8
from favae.distributed import process_state
from favae.errors import DataError, NonFiniteError
from favae.files import atomic_path, read_json, write_text
from favae.models.hub import LATENT_RGB_KEYS
from favae.normalization import normalize_latents

CELL, MARGIN, LINE = 256, 12, 28  # pixels of an image in the picture, between images, and of a line of text


@dataclass
class LatentRgb:
    """color = latent @ factors + bias, of normalized latents, in [-1, 1].

    This is what ComfyUI's `LatentFormat` calls `latent_rgb_factors` and `latent_rgb_factors_bias`.

    Attributes:
        factors: (C, 3).
        bias: (3,).
        explained: the share of the variance of the patches' mean colors that the map explains.
    """

    factors: Tensor
    bias: Tensor
    explained: float

    def settings(self) -> dict[str, list]:
        """What is saved in a model's config."""
        factors = [[round(value, 6) for value in row] for row in self.factors.tolist()]
        return dict(zip(LATENT_RGB_KEYS, (factors, [round(value, 6) for value in self.bias.tolist()])))


@torch.no_grad()
def fit_latent_rgb(vae: ModelMixin, batches: Iterable[Tensor]) -> LatentRgb:
    """Least squares of the patches' mean colors on the normalized latents.

    Args:
        vae: any autoencoder of images.
        batches: of images, (B, C, H, W) in [-1, 1], whose colors are seen `in_color`.
    Raises:
        DataError: if there are fewer latents than the map has numbers.
        NonFiniteError: if a latent is not finite.
    """
    gram = products = squares = total = 0.0
    count = 0
    for images in batches:
        latents = normalize_latents(vae, encode(vae, images.to(vae.device))).cpu().double()
        colors = F.interpolate(in_color(images.cpu().double()), size=latents.shape[-2:], mode="area")
        inputs = F.pad(latents.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)
        targets = colors.movedim(1, -1).flatten(0, 2)
        gram, products = gram + inputs.T @ inputs, products + inputs.T @ targets
        squares, total, count = squares + targets.square().sum(0), total + targets.sum(0), count + len(targets)
    if not isinstance(gram, Tensor) or count < len(gram):
        raise DataError(f"the images have {count} latents, too few for a linear map; give more images")
    if not torch.isfinite(gram).all():
        raise NonFiniteError("the latents are not finite; the weights may be damaged")
    solution = torch.linalg.lstsq(gram, products, driver="gelsd").solution
    residual = (squares - ((2 * products - gram @ solution) * solution).sum(0)).sum()
    variance = (squares - total.square() / count).sum()
    return LatentRgb(solution[:-1].float(), solution[-1].float(), float(1 - residual / variance.clamp(min=1e-12)))


def latent_rgb(vae: ModelMixin, latents: Tensor, *, normalized: bool = False) -> Tensor:
    """Previews by the map in the config of an autoencoder.

    Args:
        latents: (B, C, h, w), as `favae.autoencoders.encode` gives them, or normalized, as generators sample them.
    Returns:
        (B, 3, h, w) around [-1, 1], one pixel per latent, float32.
    Raises:
        DataError: if the config has no map; `favae preview` writes it.
    """
    factors, bias = (vae.config.get(key) for key in LATENT_RGB_KEYS)
    if factors is None or bias is None:
        raise DataError(f"this {type(vae).__name__} has no latent_rgb_factors; favae preview writes them")
    latents = (latents if normalized else normalize_latents(vae, latents)).float()
    previews = torch.einsum("bchw,ck->bkhw", latents, torch.tensor(factors, device=latents.device))
    return previews + torch.tensor(bias, device=latents.device)[:, None, None]


@torch.no_grad()
def save_previews(path: Path, vae: ModelMixin, images: Tensor) -> None:
    """Writes a picture with a row for each image: itself, the preview of its latent, and what is decoded from it.

    Args:
        images: (B, C, H, W) in [-1, 1].
    """
    latents = encode(vae, images.to(vae.device))
    decoded = in_color(decode(vae, latents).clamp(-1, 1))
    columns = {"image": in_color(images), "preview": latent_rgb(vae, latents), "decoded": decoded}
    height = round(CELL * images.shape[-2] / images.shape[-1])
    picture = Image.new(
        "RGB", (len(columns) * (CELL + MARGIN) + MARGIN, LINE + len(images) * (height + MARGIN)), "white"
    )
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for i, (title, tensors) in enumerate(columns.items()):
        left = MARGIN + i * (CELL + MARGIN)
        size = f"{tensors.shape[-1]} x {tensors.shape[-2]}"
        draw.text((left, 4), f"{title}, {size}", fill="black", font=font)
        for k, tensor in enumerate(to_uint8(tensors).cpu()):
            cell = Image.fromarray(np.ascontiguousarray(tensor.permute(1, 2, 0).numpy()))
            method = Image.Resampling.NEAREST if cell.width <= CELL else Image.Resampling.LANCZOS
            picture.paste(cell.resize((CELL, height), method), (left, LINE + k * (height + MARGIN)))
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def fit_and_save_previews(
    model: str,
    config_file: Path,
    images: ImageDataset,
    picture: Path,
    *,
    num_examples: int,
    batch_size: int,
    num_workers: int,
) -> LatentRgb:
    """Fits the map, writes it into a model's config, and a picture of what it gives.

    Args:
        model: folder of the autoencoder, or of its pipeline.
        config_file: the autoencoder's config.json. Everything else in it stays as it is.
        images: that the map is fitted to.
        num_examples: images in the picture.
    Raises:
        ModelError: if the autoencoder cannot be opened, or takes no images of this size.
        DataError: if there are too few images.
    """
    vae = load_autoencoder(model).to(process_state().device)
    measure_budget(vae, images.resolution)  # refuses what does not fit
    images = images.with_channels(image_channels(vae))
    examples: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for batch in read_in_order(images, batch_size, num_workers, description="latents"):
            examples.extend(batch["image"][: num_examples - len(examples)])
            yield batch["image"]

    fitted = fit_latent_rgb(vae, batches())
    write_text(config_file, json.dumps(read_json(config_file) | fitted.settings(), indent=2) + "\n")
    vae.register_to_config(**fitted.settings())
    save_previews(picture, vae, torch.stack(examples))
    return fitted
