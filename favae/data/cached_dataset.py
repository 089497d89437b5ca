"""What the data sets of cached moments and of cached tokens (`favae.data.latents`) have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import ModelMixin
from pydantic import PositiveInt
from safetensors import safe_open
from torch import Tensor

from favae.data.captions import CaptionedManifest
from favae.data.sharded_cache import FILL_THE_GAP, ShardedCache, tensor_shapes
from favae.data.text_embeddings import TextEmbeddings
from favae.errors import CacheError

CONTENTS = "latent cache"


class LatentManifest(CaptionedManifest):
    """What the manifest of every latent cache must have."""

    classes: list[str]
    latent_shape: list[PositiveInt]
    stores: Literal["moments", "packed_moments", "tokens"]


class CachedDataset(ShardedCache):
    """Base class of the data sets that a latent cache can be: `MomentsDataset`, also in 6 bits, and `TokenDataset`.

    Args:
        folder: of the cache.
        flip: whether an epoch has mirror images in place of half of the images.
        text_embeddings: of the captions of these images; batches then have those of one caption of each image.

    Attributes:
        manifest: of the cache. classes: their names. latent_shape: as subclasses say.

    Raises:
        CacheError: if the cache is not finished or damaged, or the text embeddings are of other captions.
    """

    contents = CONTENTS
    columns: tuple[str, ...]  # the tensors that hold the latents
    dtypes: tuple[str, ...]  # that these may have
    stores: str  # in the manifest

    def __init__(self, folder: str | Path, *, flip: bool = True, text_embeddings: TextEmbeddings | None = None):
        super().__init__(folder)
        self.flip, self.text_embeddings = flip, text_embeddings
        self.classes: list[str] = self.manifest["classes"]
        self.latent_shape: tuple[int, ...] = tuple(self.manifest["latent_shape"])
        if text_embeddings is not None:
            text_embeddings.check_captions(self)

    @property
    def about(self) -> dict:
        """What the latents and texts are of: the same for a cache that was written again from the same images."""
        about = {key: self.manifest.get(key) for key in ("tokenizer", "images", "resolution", "classes")}
        if self.manifest.get("low_pass") is not None:
            about["low_pass"] = self.manifest["low_pass"]
        if self.text_embeddings is not None:
            about |= {"text_encoder": self.text_embeddings.hash, "captions": self.text_embeddings.manifest["captions"]}
        return about

    @staticmethod
    @abstractmethod
    def encode(tokenizer: ModelMixin, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """The columns' values for images (B, C, H, W) in [-1, 1], and what must be finite for them to mean anything."""

    @classmethod
    @abstractmethod
    def summarize(cls, tokenizer: ModelMixin, files: Sequence[Path]) -> dict:
        """What the manifest says about the latents in these shards; each of them holds at least one image."""

    @classmethod
    def column_shapes(cls, latent_shape: Sequence[int]) -> list[tuple[int, ...]]:
        """The shape of each column for one view of one image."""
        return [tuple(latent_shape)] * len(cls.columns)

    @staticmethod
    def latent_shape_of(first_column: Sequence[int]) -> list[int]:
        """The shape of an image's latents, from that of the first column."""
        return list(first_column)

    @classmethod
    def count(cls, shard: safe_open, path: Path) -> int:
        if not shard.keys():  # all of its images were unreadable
            return 0
        latents = dict.fromkeys(cls.columns, cls.dtypes)
        shapes = tensor_shapes(shard, path, {"labels": ["I64"], "indices": ["I64"], **latents})
        count = (*shapes["labels"], 0)[0]
        if shapes["labels"] != shapes["indices"] or any(shapes[name][:2] != [count, 2] for name in cls.columns):
            raise CacheError(f"{path} has tensors of different lengths; delete it and {FILL_THE_GAP}")
        return count

    def load(self, shard: safe_open, path: Path) -> dict[str, Tensor]:
        """The columns with views and images in one dimension: row 2k + v is view v of image k.

        Raises:
            CacheError: if there are latents of another shape, or labels without a class.
        """
        latents = {name: shard.get_tensor(name).flatten(0, 1) for name in self.columns}
        labels, indices = shard.get_tensor("labels"), shard.get_tensor("indices")
        if [values.shape[1:] for values in latents.values()] != self.column_shapes(self.latent_shape):
            raise CacheError(f"{path} has latents of another shape; delete it and {FILL_THE_GAP}")
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise CacheError(f"{path} has labels without a class; delete it and {FILL_THE_GAP}")
        return {**latents, "labels": labels, "indices": indices}

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """What `read` takes, for all images in random order.

        Returns:
            Indices, views (1 for mirror images) and, with text embeddings, random numbers that choose captions. These
            are drawn last, so that the order is the same with and without text.
        """
        views = (rng.random(len(self)) < 0.5).astype(np.int64) if self.flip else np.zeros(len(self), np.int64)
        order = rng.permutation(len(self))
        if self.text_embeddings is None:
            return order, views
        return order, views, rng.integers(1 << 31, size=len(self))

    def read(self, indices: np.ndarray, views: np.ndarray, choices: np.ndarray | None = None) -> dict[str, Tensor]:
        """Reads a batch.

        Args:
            indices: (B,), of images.
            views: (B,), 0 for the image and 1 for its mirror image.
            choices: (B,), numbers that choose a caption of each image; None takes the first.
        Returns:
            The columns, as subclasses say; label (B,) int64; with text embeddings also text_embeddings (B, L, D)
            float32 and text_mask (B, L) bool, as `TextEmbeddings.read` gives them. On the CPU.
        Raises:
            IndexError: if there is no image with such an index.
            CacheError: if latents are not finite.
        """
        places = self.locate(indices)
        rows = [(shard, 2 * row + view) for (shard, row), view in zip(places, np.asarray(views).tolist())]
        batch = {name: torch.stack([shard[name][row] for shard, row in rows]) for name in self.columns}
        for values in batch.values():
            self.check_finite(values, indices)
        batch["label"] = torch.stack([shard["labels"][row] for shard, row in places])
        if self.text_embeddings is not None:
            choices = np.zeros(len(places), np.int64) if choices is None else choices
            batch["text_embeddings"], batch["text_mask"] = self.text_embeddings.read(indices, choices)
        return batch

    def training_batch(self, entries: Sequence[np.ndarray], seeds: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        return self.read(*entries)  # all that is random is in the entries

    def image_indices(self, indices: np.ndarray) -> list[int]:
        """The indices that images of the cache have in the data set it was made of."""
        return [int(shard["indices"][row]) for shard, row in self.locate(indices)]
