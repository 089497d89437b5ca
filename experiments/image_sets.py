"""Folders that scripts wrote, and sets of images in memory, as experiments read and measure them."""

import math
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from favae.eval.seams import neighbor_differences, seams


def written_folder(name: str) -> Path:
    """The folder that scripts/NAME.py wrote: the value of FAVAE_NAME. Raises SystemExit if that is not set."""
    variable = f"FAVAE_{name.upper()}"
    if variable not in os.environ:
        raise SystemExit(f"error: {variable} must be the folder that scripts/{name}.py wrote")
    return Path(os.environ[variable]).resolve()


class InMemoryImages(Dataset):
    """Images in memory, in the form that the evaluators read.

    Args:
        images: (N, 3, H, W), uint8.
    """

    def __init__(self, images: Tensor):
        self.images, self.size = images, tuple(images.shape[-2:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "index": index}


def read_images(dataset: Dataset) -> Tensor:
    """All images of a set of images as one tensor, (N, 3, H, W), uint8."""
    return torch.stack([dataset[i]["image"] for i in range(len(dataset))])


def seams_of(images: Tensor, patch_size: int) -> float:
    """`favae.eval.seams.seams` of images in memory, (N, 3, H, W), uint8; NaN where that is None."""
    found = seams(neighbor_differences(images).double().mean(dim=0).numpy(), images.shape[-2:], patch_size)
    return math.nan if found is None else found
