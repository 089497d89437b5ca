"""The latent cache: a tokenizer's encodings of a set of images, computed once, read memory-mapped.

A sharded cache (`favae.data.sharded_cache`). A shard holds, for n images in two views, the image and its mirror image,

    mean, logvar (n, 2, C, h, w)    moments of the posterior, not a sample of it: normalization and noise stay open
    labels (n,), indices (n,)       class of each image, and its index in the data set
    checksums (n,)                  CRC-32 of the bytes that the image was stored in

or, in 6 bits, in place of the mean and the log-variance

    codes (n, 2, C, h, 3 w / 4)         uint8, four latents in three bytes; see `favae.data.packing`
    offset, step (n, 2, C, 1, 1)        float16
    logvar (n, 2, C, 1, 1)              float16, of the mean variance of the channel

or, if the tokenizer has a codebook, in place of the moments

    tokens (n, 2, h, w[, Q])        int32, for Q codebooks in a row, or (n, 2, N) from coarse to fine

The manifest holds counts, classes, the tokenizer's hash, and mean and standard deviation of each latent channel over
all latents, or the size of the codebook. `images.json.gz` is the record of the images (`favae.data.image_record`).
If the images have captions, `captions-NNNNN.json` is beside each shard. Captions that come later are added, and deleted
files of captions are written anew, without encoding an image again.
"""

import logging
import math
from collections.abc import Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from diffusers import ModelMixin
from pydantic import Field, FiniteFloat, PositiveInt, model_validator
from safetensors import safe_open
from torch import Tensor

from favae.autoencoders import encode_moments, load_autoencoder, takes_frames
from favae.data.cached_dataset import CONTENTS, CachedDataset, LatentManifest
from favae.data.packing import pack, unpack
from favae.data.sharded_cache import FILL_THE_GAP, FLOATS, all_finite, check_manifest, open_shard, read_manifest
from favae.data.text_embeddings import TextEmbeddings
from favae.errors import CacheError
from favae.hashing import hash_model
from favae.models import HyperpriorModelFA
from favae.models.hub import LATENT_RGB_KEYS
from favae.normalization import AUTOENCODER_RAE, MIN_LOGVAR, NO_LATENT_STATISTICS, has_batch_norm

logger = logging.getLogger(__name__)

FLOAT32 = torch.finfo(torch.float32)
STATISTICS_KEYS = (*NO_LATENT_STATISTICS, "force_upcast")


def load_tokenizer(path: str) -> ModelMixin:
    """Opens an autoencoder whose latents generators learn: a `VQModelFA`, or one of single images whose channels are
    normalized one by one.

    Raises:
        ModelError: if there is no autoencoder at `path`.
        CacheError: if it is of another kind.
    """
    model = load_autoencoder(path)
    name, other_kinds = type(model).__name__, (HyperpriorModelFA, AUTOENCODER_RAE)
    if takes_frames(model) or has_batch_norm(model) or isinstance(model, other_kinds):
        raise CacheError(f"{path}: no generator here is trained on latents of a {name}; they can be teacher.latents")
    return model


def tokenizer_hash(tokenizer: ModelMixin) -> str:
    """SHA-256 of all that determines the latents: class, weights, and configuration without what is said of latents.

    Settings that have their defaults are left out: a new version of the class may have more of them.
    """
    said = {*STATISTICS_KEYS, *LATENT_RGB_KEYS}
    defaults = {name: argument.default for name, argument in signature(type(tokenizer).__init__).parameters.items()}

    def is_default(name: str, value: object) -> bool:
        return (tuple(value) if isinstance(value, list) else value) == defaults.get(name, Parameter.empty)

    config = {
        name: value
        for name, value in tokenizer.config.items()
        if name not in said and not name.startswith("_") and not is_default(name, value)
    }
    return hash_model(tokenizer, [type(tokenizer).__name__, config])


class MomentsManifest(LatentManifest):
    """Mean and standard deviation of each channel, in what float32 can hold: a generator divides by the latter."""

    latents_mean: list[Annotated[FiniteFloat, Field(ge=-FLOAT32.max, le=FLOAT32.max)]]
    latents_std: list[Annotated[FiniteFloat, Field(ge=FLOAT32.tiny, le=FLOAT32.max)]]

    @model_validator(mode="after")
    def one_for_each_channel(self) -> "MomentsManifest":
        for statistics in (self.latents_mean, self.latents_std):
            if len(statistics) != self.latent_shape[0]:
                raise ValueError(f"latents have {self.latent_shape[0]} channels, statistics {len(statistics)}")
        return self


class TokenManifest(LatentManifest):
    codebook_size: PositiveInt


class MomentsDataset(CachedDataset):
    """A latent cache of posteriors: batches have mean and logvar (B, C, h, w), in the stored dtype.

    Attributes:
        latent_shape: (C, h, w). mean, std: (C, 1, 1), of the latents of both views of all images.
    """

    schema = MomentsManifest
    columns: tuple[str, ...] = ("mean", "logvar")
    dtypes: tuple[str, ...] = FLOATS
    stores = "moments"

    def __init__(self, folder: str | Path, *, flip: bool = True, text_embeddings: TextEmbeddings | None = None):
        super().__init__(folder, flip=flip, text_embeddings=text_embeddings)
        self.mean = torch.tensor(self.manifest["latents_mean"]).view(-1, 1, 1)
        self.std = torch.tensor(self.manifest["latents_std"]).view(-1, 1, 1)

    @staticmethod
    def encode(tokenizer: ModelMixin, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        moments = encode_moments(tokenizer, images)
        return moments.chunk(2, dim=1), moments

    @staticmethod
    def moments(columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of what is stored."""
        return columns["mean"], columns["logvar"]

    @classmethod
    def summarize(cls, tokenizer: ModelMixin, files: Sequence[Path]) -> dict:
        """Mean and std of each channel over samples of all posteriors: Var z = Var mean + E exp(logvar), in float64.

        Var mean is that within the shards and that between their means. A channel that is constant gets a std of 1,
        also where its posterior has the smallest log-variance.

        Raises:
            CacheError: if a shard has numbers that are not finite.
        """
        shards = []  # number of latents; mean, variance of the mean and mean of the variance of each channel
        for file in files:
            with open_shard(file) as shard:
                mean, logvar = cls.moments({name: shard.get_tensor(name) for name in cls.columns})
            if not (all_finite(mean) and all_finite(logvar)):
                raise CacheError(f"{file} has numbers that are not finite; delete it and {FILL_THE_GAP}")
            others = (0, 1, 3, 4)  # all dimensions but the channels
            within, center = torch.var_mean(mean.double(), others, correction=0)
            shards.append((mean.numel() // mean.shape[2], center, within, logvar.double().exp().mean(others)))
        weights = torch.tensor([count for count, *_ in shards], dtype=torch.float64)
        centers, within, noise = (torch.stack(values) for values in list(zip(*shards))[1:])
        weights = (weights / weights.sum()).view(-1, 1)
        mean = (weights * centers).sum(0)
        std = (weights * (within + (centers - mean).square() + noise)).sum(0).sqrt()

        constant = std <= FLOAT32.eps * mean.abs() + 2 * math.exp(MIN_LOGVAR / 2)
        if constant.any():
            channels = constant.nonzero().flatten().tolist()
            logger.warning("channels %s of the latents are constant: they are not normalized", channels)
        std = std.masked_fill(constant, 1.0)
        return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}

    def share_std(self) -> None:
        """Normalizes all channels by one number, the root mean square of their stds, as a `scaling_factor` does.

        Channels that vary less then weigh less in what a generator learns, and are drowned by less noise. The std of 1
        that constant channels have does not count.
        """
        varies = self.std != 1
        chosen = self.std[varies] if varies.any() else self.std
        self.std = chosen.square().mean().sqrt().expand_as(self.std)

    def sample(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Samples of a batch's posteriors, normalized by `mean` and `std`: (B, C, h, w) float32 on its device."""
        mean, logvar = batch["mean"].float(), batch["logvar"].float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        latents = mean + (0.5 * logvar).exp() * noise
        return (latents - self.mean.to(mean.device)) / self.std.to(mean.device)


class PackedMomentsDataset(MomentsDataset):
    """A latent cache of posteriors in 6 bits, read as those of a `MomentsDataset` are.

    Batches have mean (B, C, h, w), rounded, and logvar (B, C, 1, 1), float32.
    """

    columns = ("codes", "offset", "step", "logvar")
    dtypes = ("U8", "F16")
    stores = "packed_moments"

    @staticmethod
    def encode(tokenizer: ModelMixin, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        (mean, logvar), moments = MomentsDataset.encode(tokenizer, images)
        return (*pack(mean), logvar.float().exp().mean((2, 3), keepdim=True).log().half()), moments

    @classmethod
    def column_shapes(cls, latent_shape: Sequence[int]) -> list[tuple[int, ...]]:
        channels, height, width = latent_shape
        return [(channels, height, 3 * -(-width // 4)), *[(channels, 1, 1)] * 3]

    @staticmethod
    def latent_shape_of(first_column: Sequence[int]) -> list[int]:
        channels, size, _ = first_column
        return [channels, size, size]  # crops are square

    @staticmethod
    def moments(columns: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        codes, offset, step, logvar = (columns[name] for name in PackedMomentsDataset.columns)
        return unpack(codes, offset, step, width=codes.shape[-2]), logvar.float()

    def read(self, indices: np.ndarray, views: np.ndarray, choices: np.ndarray | None = None) -> dict[str, Tensor]:
        batch = super().read(indices, views, choices)
        mean, logvar = self.moments({name: batch.pop(name) for name in self.columns})
        return {"mean": mean, "logvar": logvar, **batch}


class TokenDataset(CachedDataset):
    """A latent cache of tokens: batches have tokens (B, h, w[, Q]) or (B, N), int64, of Q codebooks.

    Attributes:
        latent_shape: (h, w), (h, w, Q) or (N,). codebook_size: entries of each codebook.
    """

    schema = TokenManifest
    columns = ("tokens",)
    dtypes = ("I32",)
    stores = "tokens"

    def __init__(self, folder: str | Path, *, flip: bool = True, text_embeddings: TextEmbeddings | None = None):
        super().__init__(folder, flip=flip, text_embeddings=text_embeddings)
        self.codebook_size: int = self.manifest["codebook_size"]

    @staticmethod
    def encode(tokenizer: ModelMixin, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        latents = tokenizer.encode(images).latents
        return (tokenizer.quantize(latents).indices,), latents

    @classmethod
    def summarize(cls, tokenizer: ModelMixin, files: Sequence[Path]) -> dict:
        return {"codebook_size": tokenizer.num_tokens}

    def load(self, shard: safe_open, path: Path) -> dict[str, Tensor]:
        """Raises `CacheError` if there are tokens outside the codebook."""
        tensors = super().load(shard, path)
        tokens = tensors["tokens"]
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise CacheError(
                f"{path} has tokens in {tokens.min()} ... {tokens.max()}, but the codebook ends at "
                f"{self.codebook_size - 1}; delete it and {FILL_THE_GAP}"
            )
        return tensors

    def read(self, indices: np.ndarray, views: np.ndarray, choices: np.ndarray | None = None) -> dict[str, Tensor]:
        batch = super().read(indices, views, choices)
        return batch | {"tokens": batch["tokens"].long()}

    def sample(self, batch: dict[str, Tensor]) -> Tensor:
        """What a generator learns, as `MomentsDataset.sample`: the tokens, which leave nothing to sample."""
        return batch["tokens"]


def open_latents(
    folder: str | Path,
    tokenizer: ModelMixin | None = None,
    *,
    flip: bool = True,
    text_embeddings: TextEmbeddings | None = None,
) -> MomentsDataset | TokenDataset:
    """Opens a latent cache as the data set it is.

    Args:
        folder: of the cache.
        tokenizer: if given, the cache must have been made by it.
        flip, text_embeddings: see `CachedDataset`.
    Raises:
        CacheError: if the cache is of another tokenizer, or for the reasons that `CachedDataset` names.
    """
    manifest = read_manifest(folder, CONTENTS)
    check_manifest(Path(folder), manifest, LatentManifest)
    if tokenizer is not None and tokenizer_hash(tokenizer) != manifest["tokenizer"]:
        raise CacheError(
            f"{folder} was made by another tokenizer; take the one that made it, or write a cache into another folder"
        )
    kinds = (MomentsDataset, PackedMomentsDataset, TokenDataset)
    dataset = next(kind for kind in kinds if kind.stores == manifest["stores"])
    return dataset(folder, flip=flip, text_embeddings=text_embeddings)
