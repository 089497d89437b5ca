"""Latents together with the images that they were made of, for losses that need both."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from favae.data.image_record import check_images
from favae.data.images import ImageDataset
from favae.data.latents import MomentsDataset, TokenDataset
from favae.errors import CacheError


class LatentsWithImages:
    """A latent cache whose batches also have image (B, C, H, W) in [-1, 1], in the same view as the latent.

    Args:
        dataset: the latents.
        images: that the cache was made of, at the same resolution.

    Raises:
        CacheError: if they are not the images that the cache was made of, as `check_images` compares them.
    """

    def __init__(self, dataset: MomentsDataset | TokenDataset, images: ImageDataset):
        check_images(dataset.folder, dataset.files, dataset.manifest.get("images"), images.source)
        self.dataset, self.images = dataset, images

    def __len__(self) -> int:
        return len(self.dataset)

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return self.dataset.epoch(rng)

    def read(self, indices: np.ndarray, views: np.ndarray, choices: np.ndarray | None = None) -> dict[str, Tensor]:
        """As the data set's `read`, with the images.

        Raises:
            CacheError: if an image cannot be read any more.
        """
        images = torch.stack([self._image(index) for index in self.dataset.image_indices(indices)])
        mirrored = torch.from_numpy(np.asarray(views, bool)).view(-1, 1, 1, 1)
        batch = self.dataset.read(indices, views, choices)
        return batch | {"image": torch.where(mirrored, images.flip(-1), images)}

    def training_batch(self, entries: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return self.read(*entries)

    def _image(self, index: int) -> Tensor:
        item = self.images[index]
        if item is None:
            name = self.images.source.name(index)
            raise CacheError(f"{name} cannot be read, but could be when {self.dataset.folder} was written")
        return item["image"]
