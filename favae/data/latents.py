"""The latent cache: what a tokenizer makes of a set of images, written once, read memory-mapped.

    python -m favae.data.latents --tokenizer runs/favae_f16d32/final --data IMAGES --resolution 256 --output latents/
    torchrun --nproc_per_node 8 -m favae.data.latents ...      (any number of processes writes the same files)

A folder of `shard-NNNNN.safetensors` with, for image n and v = 0 (the image) or 1 (its mirror image),
    mean, logvar (n, v, C, h, w)    moments of the posterior, not a sample: normalisation and noise stay open
    tokens (n, v, h, w[, Q])        in their place, for a tokenizer with a codebook: int32, Q codebooks in a row
    labels (n,), indices (n,)       class, and the image's place in its source
`captions-NNNNN.json` beside each, a list of strings for each image, if the images have captions, and a `manifest.json`,
written last: counts, classes, the tokenizer's hash, and the mean and standard deviation of each latent channel over all
latents, or the size of the codebook. A killed command goes on with the files that are missing when it is run again;
so captions that came later are added, and `captions-*.json` that were deleted are written anew, without encoding.
"""

import argparse
import hashlib
import json
import logging
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from favae.autoencoders import load_autoencoder, measure_budget
from favae.data.images import ImageDataset, skip_missing
from favae.data.shards import (
    MANIFEST,
    captions_file,
    check_plan,
    locate,
    open_shard,
    read_captions,
    read_manifest,
    shard_file,
)
from favae.data.sources import add_data_arguments, data_name, open_data_arguments
from favae.data.text import CaptionStates
from favae.distributed import process_state
from favae.errors import CacheError, FavaeError
from favae.files import atomic_path, write_text
from favae.hashing import hash_model
from favae.models import VQModelFA

logger = logging.getLogger(__name__)

MOMENTS, TOKENS = "moments", "tokens"
COLUMNS = {MOMENTS: ("mean", "logvar"), TOKENS: ("tokens",)}  # what a shard holds of each image and its mirror image
STATISTICS_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


def load_tokenizer(path: str) -> ModelMixin:
    """Opens an autoencoder that can be cached: `load_autoencoder`, and a posterior (`latent_dist`) or our codebook.

    Raises:
        ModelError: if there is none.
        CacheError: if it has neither.
    """
    model = load_autoencoder(path)
    if not isinstance(model, (diffusers.AutoencoderKL, VQModelFA)):
        raise CacheError(
            f"{path}: a {type(model).__name__} has no posterior to cache; AutoencoderKL and its subclasses have one, "
            "VQModelFA has tokens"
        )
    return model


def kind_of(tokenizer: ModelMixin) -> str:
    """What is cached of a tokenizer: "moments" of its posterior, or "tokens" of its codebook."""
    return TOKENS if isinstance(tokenizer, VQModelFA) else MOMENTS


def tokenizer_hash(tokenizer: ModelMixin) -> str:
    """SHA-256 of what determines the latents: class, configuration without its statistics, weights."""
    config = {k: v for k, v in tokenizer.config.items() if k not in STATISTICS_KEYS and not k.startswith("_")}
    return hash_model(tokenizer, [type(tokenizer).__name__, config])


# ----------------------------------------------------------------------------------------------------------------------
# Writing


@torch.no_grad()
def write_cache(
    tokenizer: ModelMixin,
    images: ImageDataset,
    output: str | Path,
    *,
    data_name: str = "",
    batch_size: int = 32,
    shard_size: int = 4096,
    dtype: torch.dtype = torch.float32,
    num_workers: int = 0,
) -> dict:
    """Encodes every image and its mirror image; called by every process there is.

    Args:
        tokenizer: gives `encode(x).latent_dist`, or is a `VQModelFA`.
        images: read through the centre crop; unreadable ones are left out.
        output: a new folder, or one that the same call was writing.
        dtype: of the stored moments; tokens are int32.
    Returns:
        The manifest.
    Raises:
        ModelError: for a size that does not fit.
        CacheError: if the folder holds a cache of another tokenizer, data set, size or dtype, or if the tokenizer
            cannot encode images of this size.
    """
    state = process_state()
    output = Path(output)
    measure_budget(tokenizer, images.resolution)  # refuses a size that does not fit
    plan = {
        "tokenizer": tokenizer_hash(tokenizer),
        "data": data_name,
        "images": len(images),
        "resolution": images.resolution,
        "shard_size": shard_size,
        "dtype": str(dtype if kind_of(tokenizer) == MOMENTS else torch.int32).removeprefix("torch."),
    }
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        check_plan(output, plan, "latent cache")
    state.wait_for_everyone()
    check_plan(output, plan, "latent cache")

    tokenizer = tokenizer.to(state.device).eval()
    captioned = images.source.has_captions
    files = (shard_file, captions_file) if captioned else (shard_file,)
    shards = range(math.ceil(len(images) / shard_size))
    missing = [k for k in shards if not all(file(output, k).exists() for file in files)]
    mine = [k for k in missing if k % state.num_processes == state.process_index]
    for k in tqdm(mine, desc="latents", unit="shard", disable=not state.is_main_process):
        if shard_file(output, k).exists():  # without its captions
            _write_captions(images, _indices(output, k), captions_file(output, k))
            continue
        part = Subset(images, range(k * shard_size, min((k + 1) * shard_size, len(images))))
        loader = DataLoader(part, batch_size, num_workers=num_workers, collate_fn=skip_missing)
        tensors = _encode(tokenizer, (batch for batch in loader if batch is not None), state.device, dtype)
        if captioned:  # first, so that a shard that exists has them
            _write_captions(images, tensors.get("indices", torch.empty(0)), captions_file(output, k))
        with atomic_path(shard_file(output, k)) as temporary:
            save_file(tensors, temporary)
    state.wait_for_everyone()

    if state.is_main_process:
        kind = kind_of(tokenizer)
        manifest = {**plan, "classes": images.classes, "kind": kind, **_summary(output, len(shards), kind)}
        if kind == TOKENS:
            manifest["codebook_size"] = tokenizer.num_tokens
        captions = _summary_of_captions(output, manifest["counts"]) if captioned else {"count": 0}
        manifest["captions"] = captions if captions["count"] else None
        write_text(output / MANIFEST, json.dumps(manifest, indent=1))
    state.wait_for_everyone()
    return json.loads((output / MANIFEST).read_text())


def _encode(tokenizer: ModelMixin, batches, device, dtype: torch.dtype) -> dict[str, Tensor]:
    kind = kind_of(tokenizer)
    columns = {name: [] for name in (*COLUMNS[kind], "labels", "indices")}
    for batch in batches:
        x = batch["image"].to(device, tokenizer.dtype)
        views = [tokenizer.encode(view) for view in (x, x.flip(-1))]
        if kind == TOKENS:
            tokens = [tokenizer.quantize(view.latents).indices for view in views]
            columns["tokens"].append(torch.stack(tokens, dim=1).to("cpu", torch.int32))
        else:
            for name in ("mean", "logvar"):
                moments = torch.stack([getattr(view.latent_dist, name) for view in views], dim=1)
                columns[name].append(moments.to("cpu", dtype))
        columns["labels"].append(batch["label"])
        columns["indices"].append(batch["index"])
    return {name: torch.cat(values).contiguous() for name, values in columns.items() if values}


def _write_captions(images: ImageDataset, indices: Tensor, file: Path) -> None:
    write_text(file, json.dumps([images.captions(int(i)) for i in indices]))


def _indices(output: Path, number: int) -> Tensor:
    with open_shard(shard_file(output, number)) as shard:
        return shard.get_tensor("indices") if _count(shard) else torch.empty(0)


def _count(shard: safe_open) -> int:
    """Images in an open shard; a shard of unreadable images is empty."""
    names = list(shard.keys())
    return shard.get_slice("labels").get_shape()[0] if names else 0


def _summary(output: Path, num_shards: int, kind: str) -> dict:
    """Counts per shard, and of moments each channel's mean and deviation over all latents, in float64.

    The deviation is that of the samples a generator sees: Var z = Var mean + E exp(logvar).
    """
    counts, first, second, variance, total = [], 0, 0, 0, 0
    for k in range(num_shards):
        with open_shard(shard_file(output, k)) as shard:
            counts.append(_count(shard))
            if not counts[-1]:
                continue
            shape = shard.get_slice(COLUMNS[kind][0]).get_shape()[2:]
            if kind == TOKENS:
                continue
            mean, logvar = shard.get_tensor("mean").double(), shard.get_tensor("logvar").double()
        first = first + mean.sum((0, 1, 3, 4))
        second = second + mean.square().sum((0, 1, 3, 4))
        variance = variance + logvar.exp().sum((0, 1, 3, 4))
        total += mean.numel() // mean.shape[2]
    if not sum(counts):
        raise CacheError(f"{output}: not one image could be read")
    summary = {"counts": counts, "latent_shape": shape}
    if kind == TOKENS:
        return summary
    average = first / total
    deviation = (second / total - average.square() + variance / total).sqrt()
    return {**summary, "latents_mean": average.tolist(), "latents_std": deviation.tolist()}


def _summary_of_captions(output: Path, counts: list[int]) -> dict:
    """How many captions and images without any there are, and a hash that tells other captions apart."""
    digest, total, without = hashlib.sha256(), 0, 0
    for k, count in enumerate(counts):
        captions = read_captions(output, k, count)
        digest.update(json.dumps(captions).encode())
        total += sum(map(len, captions))
        without += captions.count([])
    return {"count": total, "images_without": without, "hash": digest.hexdigest()}


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class LatentDataset:
    """A latent cache, read in batches; normalised to zero mean and unit deviation per channel where it is drawn from.

    A cache of tokens has nothing to normalise or to draw: `read` gives them.

    Args:
        folder: of the cache.
        tokenizer: if given, the cache must come from it.
        flip: whether an epoch takes half of the images as their mirror images.
        shuffle_shards: how many shards are mixed at a time; None mixes all. With fewer, what is read at a time is small
            enough to stay in memory, or to be read in one go from a slow disk.
        images: the images that the cache was made of, if batches shall have them too.
        text: the states of their captions, if batches shall have one caption of each image.

    `read(indices, views)` gives moments or tokens as stored, `draw(batch)` latents from their posteriors; `epoch(rng)`
    an order: what `read` takes, for every image.

    Attributes:
        kind: "moments" or "tokens". latent_shape: (C, h, w), of tokens (h, w) or (h, w, Q). classes: their names.
        codebook_size: of tokens, otherwise None. mean, std: (C, 1, 1), of moments, otherwise None.

    Raises:
        CacheError: for a folder without manifest, another tokenizer's cache, a missing or a truncated shard, states of
            other captions.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: ModelMixin | None = None,
        flip: bool = True,
        shuffle_shards: int | None = None,
        images: ImageDataset | None = None,
        text: CaptionStates | None = None,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, "latent cache", "python -m favae.data.latents")
        if tokenizer is not None and tokenizer_hash(tokenizer) != self.manifest["tokenizer"]:
            raise CacheError(
                f"{folder} was made by another tokenizer than data.tokenizer; give the one that wrote it, or write the "
                "cache again into another folder"
            )
        self.flip, self.shuffle_shards, self.images, self.text = flip, shuffle_shards, images, text
        if images is not None and len(images) != self.manifest["images"]:
            raise CacheError(f"{folder} was made of {self.manifest['images']} images, data.images has {len(images)}")
        self.classes = self.manifest["classes"]
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.kind = self.manifest.get("kind", MOMENTS)  # which caches of the first version do not say
        self.codebook_size = self.manifest.get("codebook_size")
        self.mean = self.std = None
        if self.kind == MOMENTS:
            self.mean, self.std = (torch.tensor(self.manifest[f"latents_{s}"]).view(-1, 1, 1) for s in ("mean", "std"))
        if text is not None:
            text.check(self.manifest, self.folder)
        self._open: dict[int, dict[str, Tensor | list[int]]] = {}
        self._check_shards()

    def _check_shards(self) -> None:
        for number, count in enumerate(self.manifest["counts"]):
            path = shard_file(self.folder, number)
            if not path.is_file():
                raise CacheError(f"{path} is missing; write the cache again with the same command, it fills the gap")
            with open_shard(path) as shard:
                found = _count(shard)
            if found != count:
                raise CacheError(f"{path} holds {found} images where the manifest says {count}; delete the cache")

    def __len__(self) -> int:
        return sum(self.manifest["counts"])

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Indices of all images in a random order, the view of each (1: mirrored) and, with text, a random number each.

        That is drawn last, so that the order is the same with and without text.
        """
        views = (rng.random(len(self)) < 0.5).astype(np.int64) if self.flip else np.zeros(len(self), np.int64)
        order = self._order(rng)
        return (order, views) if self.text is None else (order, views, rng.integers(1 << 31, size=len(self)))

    def _order(self, rng: np.random.Generator) -> np.ndarray:
        if self.shuffle_shards is None:
            return rng.permutation(len(self))
        counts = np.asarray(self.manifest["counts"])
        shards = rng.permutation(len(counts))
        windows = [shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)]
        ends = np.cumsum(counts)
        parts = [np.concatenate([np.arange(ends[k] - counts[k], ends[k]) for k in ks]) for ks in windows]
        return np.concatenate([rng.permutation(part) for part in parts])

    def read(self, indices: np.ndarray, views: np.ndarray, choices: np.ndarray | None = None) -> dict[str, Tensor]:
        """
        Args:
            indices, views: (B,), of images and of their views.
            choices: (B,), random numbers that choose among the captions of each image; None takes the first.
        Returns:
            mean, logvar (B, C, h, w) of the stored dtype, or tokens (B, h, w[, Q]) int64; label (B,) int64; with
            images, image (B, 3, H, W) in [-1, 1], the same view; with text, text (B, L, D) float32 and text_mask (B, L)
            bool, as `CaptionStates.read` gives them; on the CPU.
        Raises:
            IndexError: for an index that is not there.
        """
        numbers, rows = locate(indices, self.manifest["counts"])
        shards = [self._shard(number) for number in numbers.tolist()]
        batch = {}
        both = (2 * rows + views).tolist()
        for name in COLUMNS[self.kind]:
            dtype = torch.int64 if self.kind == TOKENS else shards[0][name].dtype
            batch[name] = torch.empty(len(indices), *self.latent_shape, dtype=dtype)
            for place, shard, row in zip(batch[name].unbind(), shards, both):
                place.copy_(shard[name][row])
        batch["label"] = torch.tensor([shard["labels"][row] for shard, row in zip(shards, rows.tolist())])
        if self.images is not None:
            found = [self._image(shard["indices"][row]) for shard, row in zip(shards, rows.tolist())]
            mirrored = torch.from_numpy(np.asarray(views, bool)).view(-1, 1, 1, 1)
            batch["image"] = torch.where(mirrored, torch.stack(found).flip(-1), torch.stack(found))
        if self.text is not None:
            choices = np.zeros(len(indices), np.int64) if choices is None else choices
            batch["text"], batch["text_mask"] = self.text.read(indices, choices)
        return batch

    def _image(self, index: int) -> Tensor:
        item = self.images[index]
        if item is None:
            raise CacheError(f"image {index} of data.images cannot be read, which it could when the cache was written")
        return item["image"]

    def _shard(self, number: int) -> dict[str, Tensor | list[int]]:
        if number not in self._open:  # opened once in each worker that reads it; memory-mapped, not loaded
            with open_shard(shard_file(self.folder, number)) as shard:
                latents = {name: shard.get_tensor(name).flatten(0, 1) for name in COLUMNS[self.kind]}  # (2n, C, h, w)
                lists = {name: shard.get_tensor(name).tolist() for name in ("labels", "indices")}
                if self.kind == TOKENS:
                    self._check_tokens(number, latents["tokens"])
                self._open[number] = latents | lists
        return self._open[number]

    def _check_tokens(self, number: int, tokens: Tensor) -> None:
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise CacheError(
                f"{shard_file(self.folder, number)} has tokens in {tokens.min()} ... {tokens.max()}, the codebook ends "
                f"at {self.codebook_size - 1}; delete it and write the cache again with the same command"
            )

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Samples of the posteriors that `read` gave, normalised: (B, C, h, w) float32, on the batch's device.

        Raises:
            CacheError: for a cache of tokens.
        """
        if self.kind == TOKENS:
            raise CacheError(f"{self.folder} holds tokens of a codebook, there is no posterior to draw latents from")
        mean, logvar = batch["mean"].float(), batch["logvar"].float()
        noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        latents = mean + (0.5 * logvar).exp() * noise
        return (latents - self.mean.to(mean.device)) / self.std.to(mean.device)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}  # memory maps do not travel to workers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a saved autoencoder: folder or hub name")
    add_data_arguments(parser, "--data", split="train")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--shard-size", type=int, default=4096, help="images per shard")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--num-workers", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        images = ImageDataset(open_data_arguments(arguments), arguments.resolution)
        manifest = write_cache(
            load_tokenizer(arguments.tokenizer),
            images,
            arguments.output,
            data_name=data_name(arguments),
            batch_size=arguments.batch_size,
            shard_size=arguments.shard_size,
            dtype=getattr(torch, arguments.dtype),
            num_workers=arguments.num_workers,
        )
    except (FavaeError, ValueError) as error:
        sys.exit(f"error: {error}")
    if process_state().is_main_process:
        count, processes = sum(manifest["counts"]), process_state().num_processes
        captions = f" with {manifest['captions']['count']:,} captions" if manifest["captions"] else ""
        print(f"{count:,} images{captions} and their mirror images in {arguments.output}, by {processes} process(es)")


if __name__ == "__main__":
    main()
