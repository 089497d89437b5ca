"""Text embeddings of the captions of a latent cache: computed once by a text encoder, read memory-mapped.

The folder, by default `text_embeddings` in that of the cache, has one `shard-NNNNN.safetensors` for each shard of the
cache. For the n images of the shard, which have m captions together, it holds

    embeddings (m, L, D)    one embedding for each token, padded with zeros to the longest caption of the shard
    lengths (m,)            tokens of each caption
    offsets (n + 1,)        the captions of image k are the rows offsets[k] to offsets[k + 1] - 1, perhaps none

and the manifest names the encoder, the hash of its weights, the maximal length, the dtype and the counts.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from favae.data.captions import CaptionedManifest, read_captions
from favae.data.sharded_cache import (
    FILL_THE_GAP,
    FLOATS,
    CacheWriter,
    Manifest,
    ShardedCache,
    all_finite,
    check_manifest,
    open_shard,
    read_manifest,
    shard_file,
    tensor_shapes,
)
from favae.errors import CacheError

if TYPE_CHECKING:
    from favae.text_encoder import TextEncoder

FOLDER = "text_embeddings"
CONTENTS = "folder of text embeddings"
LENGTH_STEP = 16  # of batches: lengths are multiples of it
DTYPES = {"embeddings": FLOATS, "lengths": ["I64"], "offsets": ["I64"]}


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_text_embeddings(
    encoder: "TextEncoder",
    latents: str | Path,
    output: str | Path | None = None,
    *,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float16,
) -> dict:
    """Encodes every caption of a latent cache. All processes call this together.

    Args:
        encoder: the text encoder.
        latents: a finished latent cache with captions.
        output: a new folder, or one that the same call began; None stands for `text_embeddings` in `latents`.
        batch_size: captions that are encoded at a time.
        dtype: of the stored embeddings.
    Returns:
        The manifest.
    Raises:
        CacheError: if the cache has no captions, if the folder holds embeddings by another encoder or of other
            captions, or if embeddings overflow in `dtype`.
    """
    latents = Path(latents)
    output = latents / FOLDER if output is None else Path(output)
    cache = read_manifest(latents, "latent cache")
    captions = check_manifest(latents, cache, CaptionedManifest).captions
    if captions is None:
        raise CacheError(f"{latents} has no captions; captions that come later are added by writing the cache again")
    plan = {
        "encoder": encoder.name,
        "hash": encoder.hash,
        "dim": encoder.dim,
        "max_length": encoder.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "captions": captions.hash,
    }
    writer = CacheWriter(output, plan, CONTENTS, names=["encoder"])
    encoder = encoder.to(writer.state.device)
    files = [shard_file(output, number) for number in range(len(cache["counts"]))]

    def write_shard(number: int, path: Path) -> None:
        captions = read_captions(latents, number, cache["counts"][number], cache["checksums"])
        save_file(_encode(encoder, captions, batch_size, dtype), path)

    writer.write_missing(files, write_shard, "text embeddings")
    return writer.finish(lambda: _summarize(files))


def _encode(
    encoder: "TextEncoder", captions: list[list[str]], batch_size: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a shard, for the captions of each of its images."""
    texts = [text for captions_of_image in captions for text in captions_of_image]

    # Each text is encoded once, in batches of about the same length.
    different = sorted(set(texts), key=lambda text: (len(text), text))
    encoded: dict[str, Tensor] = {}
    for first in range(0, len(different), batch_size):
        batch = different[first : first + batch_size]
        embeddings, mask = encoder.encode(batch)
        stored = embeddings.to("cpu", dtype)
        for text, exact, row, length in zip(batch, embeddings, stored, mask.sum(1).tolist()):
            if not all_finite(exact):
                raise CacheError(f"'{encoder.name}' gives embeddings of {text!r} that are not finite")
            if not all_finite(row):
                raise CacheError(f"embeddings of {text!r} by '{encoder.name}' overflow in {dtype}; float32 holds them")
            encoded[text] = row[:length].clone()  # a view would keep the padding in memory

    # All captions are padded to the longest of the shard.
    lengths = [len(encoded[text]) for text in texts]
    padded = torch.zeros(len(texts), max(lengths, default=1), encoder.dim, dtype=dtype)
    for row, text, length in zip(padded, texts, lengths):
        row[:length] = encoded[text]
    offsets = np.cumsum([0, *map(len, captions)])
    return {
        "embeddings": padded,
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "offsets": torch.from_numpy(offsets),
    }


def _summarize(files: list[Path]) -> dict:
    """Images in each shard, captions in all, and images that have none."""
    offsets = []
    for file in files:
        with open_shard(file) as shard:
            offsets.append(_read_tensors(shard, file)["offsets"])
    return {
        "counts": [len(ends) - 1 for ends in offsets],
        "count": sum(int(ends[-1]) for ends in offsets),
        "images_without": sum(int((ends.diff() == 0).sum()) for ends in offsets),
    }


def _read_tensors(shard: safe_open, path: Path) -> dict[str, Tensor]:
    """Raises `CacheError` if it is not a shard of text embeddings, or lengths or offsets are impossible."""
    captions, length, _ = (*tensor_shapes(shard, path, DTYPES)["embeddings"], 0, 0, 0)[:3]
    tensors = {name: shard.get_tensor(name) for name in DTYPES}
    lengths, offsets = tensors["lengths"], tensors["offsets"]
    if lengths.shape == (captions,) and offsets.ndim == 1 and len(offsets) > 0:
        within = not captions or 0 <= int(lengths.min()) <= int(lengths.max()) <= length
        ends = (int(offsets[0]), int(offsets[-1])) == (0, captions)
        if within and ends and bool((offsets.diff() >= 0).all()):
            return tensors
    raise CacheError(f"{path} has lengths or offsets of other captions; delete it and {FILL_THE_GAP}")


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class TextManifest(Manifest):
    encoder: str
    hash: str
    dim: PositiveInt
    max_length: PositiveInt
    captions: str


class TextEmbeddings(ShardedCache):
    """The text embeddings that `write_text_embeddings` wrote, read in batches with one caption for each image.

    Args:
        folder: where they are.

    Attributes:
        encoder: name of the text encoder. hash: of its weights. dim: channels D. max_length: tokens to which captions
        were cut.

    Raises:
        CacheError: if the folder is not finished, or a shard is missing or damaged.
    """

    contents = CONTENTS
    schema = TextManifest

    def __init__(self, folder: str | Path):
        super().__init__(folder)
        self.encoder: str = self.manifest["encoder"]
        self.hash: str = self.manifest["hash"]
        self.dim: int = self.manifest["dim"]
        self.max_length: int = self.manifest["max_length"]

    @staticmethod
    def count(shard: safe_open, path: Path) -> int:
        return len(_read_tensors(shard, path)["offsets"]) - 1

    def load(self, shard: safe_open, path: Path) -> dict[str, Tensor]:
        return _read_tensors(shard, path)

    def check_captions(self, latents: ShardedCache) -> None:
        """Raises `CacheError` unless these are the embeddings of the captions of this latent cache."""
        captions = latents.manifest.get("captions") or {}
        if self.manifest["counts"] != latents.manifest["counts"] or self.manifest["captions"] != captions.get("hash"):
            raise CacheError(
                f"{self.folder} was made of other captions than those of {latents.folder}; delete it and write the "
                f"text embeddings again, by {self.encoder}"
            )

    def read(self, indices: np.ndarray, choices: np.ndarray) -> tuple[Tensor, Tensor]:
        """
        Args:
            indices: (B,), of images.
            choices: (B,), numbers from 0 on; a number modulo the captions of its image chooses one of them.
        Returns:
            Embeddings (B, L, D) float32 and mask (B, L) bool, with L the length of the batch's longest caption, rounded
            up so that compiled models see few lengths; on the CPU. The mask of an image without captions is False
            everywhere.
        Raises:
            IndexError: if there is no image with such an index.
            CacheError: if embeddings are not finite.
        """
        places = zip(self.locate(indices), np.asarray(choices).tolist())
        found = [self._choose(shard, row, choice) for (shard, row), choice in places]
        length = math.ceil(max([1, *map(len, found)]) / LENGTH_STEP) * LENGTH_STEP
        embeddings = torch.zeros(len(found), length, self.dim)
        mask = torch.zeros(embeddings.shape[:2], dtype=torch.bool)
        for k, caption in enumerate(found):
            embeddings[k, : len(caption)] = caption
            mask[k, : len(caption)] = True
        self.check_finite(embeddings, indices)
        return embeddings, mask

    def _choose(self, shard: dict[str, Tensor], row: int, choice: int) -> Tensor:
        """(length, D), the embeddings of one caption of an image; of length 0 if it has none."""
        first, last = shard["offsets"][row : row + 2].tolist()
        if first == last:
            return torch.zeros(0, self.dim)
        caption = first + choice % (last - first)
        return shard["embeddings"][caption, : int(shard["lengths"][caption])]
