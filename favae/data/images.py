"""Images as tensors: what is common to all sources, crops, and a dataset of a source's images in [-1, 1]."""

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from favae.errors import DataError

logger = logging.getLogger(__name__)

READ_ERRORS = (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError)


class UnusableImage(ValueError):
    """One image that cannot be used; the message says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts where the meaning is obvious: greyscale, palette, CMYK, 16-bit greyscale; transparency over white.

    Raises:
        UnusableImage: for modes whose value range is unknown (32-bit integers beyond 16 bits, floating point).
    """
    image.load()  # decoded here, so that a damaged file fails here
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale, which PIL opens as "I;16" or as "I"
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise UnusableImage(f"integer pixels from {values.min()} to {values.max()}, at most 16 bits are understood")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UnusableImage("floating-point pixels of unknown range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` (box filter by halves, then bicubic) and crops the middle.

    The preprocessing of the class-conditional ImageNet literature (Dhariwal and Nichol, 2021).
    """
    image = shorter_side_to(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """As `center_crop`, but the window is drawn uniformly."""
    image = shorter_side_to(image, size)
    left, top = rng.integers(image.width - size + 1), rng.integers(image.height - size + 1)
    return image.crop((left, top, left + size, top + size))


def shorter_side_to(image: Image.Image, size: int) -> Image.Image:
    """By halves with a box filter, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    return image if image.size == target else image.resize(target, Image.Resampling.BICUBIC)


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """round((x + 1) * 127.5), clamped: the one conversion to 8 bits in this project. Any shape, [-1, 1]."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Datasets


class Source(Protocol):
    classes: list[str]

    def __len__(self) -> int: ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str: ...

    def read(self, index: int) -> Image.Image: ...

    has_captions: bool  # whether there may be any

    def captions(self, index: int) -> list[str]: ...


class ImageDataset(Dataset):
    """Images of a source as tensors.

    Args:
        source: where images come from.
        resolution: height and width of the result.

    `dataset[i]` is {"image": (3, R, R) in [-1, 1], "label": int, "index": int} of the centre crop, or None if the file
    cannot be decoded after all (`skip_missing` drops these from batches; the warning names the file).
    `sample(i, rng)` gives a random crop and flip of the image, and the next readable image in place of a broken one.
    """

    def __init__(self, source: Source, resolution: int, *, crop: str = "random", flip: bool = True):
        self.source = source
        self.resolution = resolution
        self.crop = crop
        self.flip = flip
        self.unreadable: set[int] = set()

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def captions(self, index: int) -> list[str]:
        """Of image `index`; none of them is empty."""
        return self.source.captions(index)

    def _read(self, index: int) -> Image.Image | None:
        try:
            return self.source.read(index)
        except READ_ERRORS as error:
            if index not in self.unreadable:
                self.unreadable.add(index)
                name = self.source.name(index)
                logger.warning("skipped %s: %s (%d unreadable so far)", name, error, len(self.unreadable))
            return None

    def _item(self, index: int, image: Image.Image) -> dict:
        return {"image": to_tensor(image), "label": self.source.label(index), "index": index}

    def __getitem__(self, index: int) -> dict | None:
        image = self._read(index)
        return None if image is None else self._item(index, center_crop(image, self.resolution))

    def random_view(self, index: int, rng: np.random.Generator) -> dict:
        """Image `index` as training sees it, cropped and flipped at random, or else the next one that can be read.

        Raises:
            DataError: if not one image can be read.
        """
        for candidate in range(index, index + len(self)):
            image = self._read(candidate % len(self))
            if image is not None:
                break
        else:
            raise DataError("not one of the images can be read")
        crop = (
            random_crop(image, self.resolution, rng) if self.crop == "random" else center_crop(image, self.resolution)
        )
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self._item(candidate % len(self), crop)

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """The indices of all images in random order."""
        return (rng.permutation(len(self)),)

    def training_batch(self, entries: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> dict:
        """Collated random views of images whose indices an epoch gave, each with a seed of its own."""
        (indices,) = entries
        views = [self.random_view(int(i), np.random.default_rng(seed)) for i, seed in zip(indices, seeds)]
        return default_collate(views)


def skip_missing(items: list[dict | None]) -> dict | None:
    """Collates what is there; None if nothing is."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None
