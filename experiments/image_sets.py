"""Sets of images that the generators' experiments measure, and a metric for the borders of patches."""

import torch
from torch import Tensor
from torch.utils.data import Dataset


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


def seams(images: Tensor, patch_size: int) -> float:
    """How much neighboring pixels differ across the borders of patches, in units of how much they differ elsewhere.

    Args:
        images: (N, 3, H, W) with H = W, any unit.
        patch_size: pixels along each side of a patch.
    Returns:
        1 for images that have no borders of patches.
    """
    images = images.float()
    across_columns = (images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))
    across_rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((0, 1, 3))
    border = torch.arange(1, images.shape[-1]) % patch_size == 0
    ratios = [steps[border].mean() / steps[~border].mean() for steps in (across_columns, across_rows)]
    return float(torch.stack(ratios).mean())
