"""Images as tensors: crops, and a data set of a source's images in [-1, 1]."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from favae.data.decoding import UnusableImage
from favae.distributed import process_state
from favae.errors import DataError
from favae.signals import end_quietly_on_signals

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # in all processes: each skips other images

MAX_ASPECT_RATIO = 8  # of images that are scaled as a whole


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` and crops the middle.

    Source: the preprocessing of class-conditional ImageNet, Dhariwal and Nichol, 2021.
    """
    return _scaled_window(image, size, lambda room: room // 2)


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Scales the shorter side to `size` and crops a window whose position is uniform."""
    return _scaled_window(image, size, lambda room: int(rng.integers(room + 1)))


def random_window(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Crops a window whose position is uniform, at the image's own scale; smaller images are scaled up before."""
    if min(image.size) < size:
        return random_crop(image, size, rng)
    left, top = int(rng.integers(image.width - size + 1)), int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def _scaled_window(image: Image.Image, size: int, place: Callable[[int], int]) -> Image.Image:
    """A window of the scaled image.

    Args:
        place: gives the left or upper side of the window, of as many pixels as it can be moved.
    """
    image = _halved(image, size)
    width, height = _scaled_size(image, size)
    left, top = place(width - size), place(height - size)
    if max(width, height) <= MAX_ASPECT_RATIO * size:
        return shorter_side_to(image, size).crop((left, top, left + size, top + size))
    # Of a strip, the window alone is scaled: 65,000 x 16 pixels would be a gigabyte otherwise.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), min((top + size) * y, image.height))
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def shorter_side_to(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` pixels: halved by a box filter while that is possible, then bicubic."""
    image = _halved(image, size)
    target = _scaled_size(image, size)
    return image if image.size == target else image.resize(target, Image.Resampling.BICUBIC)


def _halved(image: Image.Image, size: int) -> Image.Image:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _scaled_size(image: Image.Image, size: int) -> tuple[int, int]:
    scale = size / min(image.size)
    return max(size, round(image.width * scale)), max(size, round(image.height * scale))


def jitter_colors(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue at random; see `ImageDataset` for `strength`."""
    if image.mode == "RGBA":
        alpha = image.getchannel("A")
        image = jitter_colors(image.convert("RGB"), strength, rng)
        image.putalpha(alpha)
        return image
    for adjust in (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation):
        image = adjust(image, rng.uniform(1 - strength, 1 + strength))
    return F.adjust_hue(image, rng.uniform(-strength / 2, strength / 2))


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) float32 in [-1, 1], of a gray, RGB or RGBA image. Colors that cannot be seen become white."""
    pixels = np.array(image)
    if image.mode == "RGBA":
        pixels[pixels[..., 3] == 0, :3] = 255
    return torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """round((x + 1) * 127.5), clamped: the one conversion to 8 bits in this project. Any shape, [-1, 1]."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def without_high_frequencies(images: Tensor, radius: float) -> Tensor:
    """Keeps the disc of frequencies up to `radius` of the highest along an axis: (B, C, H, W) -> the same."""
    rows, columns = (torch.fft.fftfreq(size, d=0.5, device=images.device) for size in images.shape[-2:])
    kept = torch.hypot(rows[:, None], columns[None]) <= radius
    return torch.fft.ifft2(torch.fft.fft2(images.float()) * kept).real.to(images.dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets


class ImageIdentity(NamedTuple):
    """What tells an image from others without decoding it. It does not depend on where the set is."""

    name: str  # the image's own, within the set: its file below the set's folder, or the number of its row
    size: int  # bytes that it is stored in; 0 if it is computed
    time: int  # of the last change of its file, in nanoseconds since 1970; 0 if unknown. Copies may have another one.


MIN_SIZE = 16  # pixels that the shorter side of an image must have, unless something else is asked for


class Source(Protocol):
    """Images by index, whatever they are stored in. Labels are looked at when somebody asks for classes."""

    @property
    def classes(self) -> list[str]:
        """The classes' names. Raises `DataError` if labels are missing or no classes."""
        ...

    @property
    def has_captions(self) -> bool:
        """Whether there may be captions."""
        ...

    def __len__(self) -> int: ...

    def label(self, index: int) -> int:
        """The class, as an index of `classes`."""
        ...

    def name(self, index: int) -> str:
        """What messages call the image."""
        ...

    def identity(self, index: int) -> ImageIdentity:
        """What tells the image from others without decoding it."""
        ...

    def checksum(self, index: int) -> int:
        """CRC-32 of the bytes that store the image, or of its pixels if it is computed. Raises as `read` does."""
        ...

    def read(self, index: int, channels: int = 3) -> Image.Image:
        """The image, upright, in gray (1 channel), RGB (3) or RGBA (4). Raises `UnusableImage` if it cannot be read."""
        ...

    def captions(self, index: int) -> list[str]:
        """Any number of captions, none of them empty."""
        ...


class ImageDataset(Dataset):
    """Images of a source as tensors.

    `dataset[i]` is {"image": (C, R, R) in [-1, 1], "index": int} for the center crop, or None if the image cannot be
    read; a warning names it, and `skip_missing` leaves it out of batches. Training reads random views.

    Args:
        source: where the images come from.
        resolution: height and width R of the tensors.
        crop: of a random view. For "random" and "center", the shorter side is scaled to the resolution before; a
            "window" is at a random place, at the image's own scale.
        flip: whether half of the random views are mirrored.
        color_jitter: j, how much the colors of random views change: brightness, contrast and saturation by a factor in
            1 - j ... 1 + j, the hue by up to j / 2 of a turn.
        channels: C of the tensors: 1 is gray, 3 is RGB with what is transparent over white, 4 is RGBA.

    Attributes:
        unreadable: (len(source),) bool, which images could not be read so far, by this process and its DataLoader's
            workers together.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        *,
        crop: Literal["random", "center", "window"] = "random",
        flip: bool = True,
        color_jitter: float = 0.0,
        channels: int = 3,
    ):
        self.source = source
        self.resolution = resolution
        self.crop = crop
        self.flip = flip
        self.color_jitter = color_jitter
        self.channels = channels
        self.unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()

    def with_channels(self, channels: int) -> "ImageDataset":
        """The same images with another number of channels."""
        other = copy.copy(self)
        other.channels = channels
        return other

    @property
    def classes(self) -> list[str]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def label(self, index: int) -> int:
        """The class of an image, as an index of `classes`."""
        return self.source.label(index)

    def _read(self, index: int) -> Image.Image | None:
        try:
            return self.source.read(index, self.channels)
        except UnusableImage as error:
            if not self.unreadable[index]:
                self.unreadable[index] = True
                name, count = self.source.name(index), int(self.unreadable.sum())
                logger.warning("skipped %s: %s (%d of %d skipped so far)", name, error, count, len(self))
            return None

    def _item(self, index: int, image: Image.Image) -> dict:
        return {"image": to_tensor(image), "index": index}

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
        size = self.resolution
        if self.crop == "center":
            crop = center_crop(image, size)
        else:
            crop = (random_crop if self.crop == "random" else random_window)(image, size, rng)
        if self.flip and rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            crop = jitter_colors(crop, self.color_jitter, rng)
        return self._item(candidate % len(self), crop)

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """The indices of all images in random order."""
        return (rng.permutation(len(self)),)

    def training_batch(self, entries: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> dict:
        """Collated random views of images whose indices an epoch gave, each with a seed of its own."""
        (indices,) = entries
        views = [self.random_view(int(i), np.random.default_rng(seed)) for i, seed in zip(indices, seeds)]
        return default_collate(views)


def read_in_order(
    images: Dataset, batch_size: int, num_workers: int = 0, *, description: str | None = None
) -> Iterator[dict]:
    """Batches of all images that can be read. It takes no random number from training.

    Args:
        description: of a progress bar, which the main process shows; None: there is none.
    """
    loader = DataLoader(
        images,
        batch_size,
        num_workers=num_workers,
        collate_fn=skip_missing,
        worker_init_fn=end_quietly_on_signals,
        generator=torch.Generator(),
    )
    hide = description is None or not process_state().is_main_process
    yield from (batch for batch in tqdm(loader, desc=description, disable=hide) if batch is not None)


def skip_missing(items: list[dict | None]) -> dict | None:
    """Collates the items that are not None, and gives None if there are none."""
    items = [item for item in items if item is not None]
    return default_collate(items) if items else None
