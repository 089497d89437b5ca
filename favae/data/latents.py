"""The latent cache: what a tokenizer makes of a set of images, written once, read memory-mapped.

    python -m favae.data.latents --tokenizer runs/favae_f16d32/final --data IMAGES --resolution 256 --output latents/
    torchrun --nproc_per_node 8 -m favae.data.latents ...      (any number of processes writes the same files)

A folder of `shard-NNNNN.safetensors` with, for image n and v = 0 (the image) or 1 (its mirror image),
    mean, logvar (n, v, C, h, w)    moments of the posterior, not a sample: normalisation and noise stay open
    labels (n,), indices (n,)       class, and the image's place in its source
and a `manifest.json`, written last: counts, classes, the tokenizer's hash, and the mean and standard deviation of each
latent channel over all latents. A killed command goes on with the shards that are missing when it is run again.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from favae.autoencoders import load_autoencoder, measure_budget
from favae.data.images import (
    ImageDataset,
    add_data_arguments,
    data_name,
    open_data_arguments,
    skip_missing,
)
from favae.distributed import process_state
from favae.errors import FavaeError
from favae.files import write_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATISTICS_KEYS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


class CacheError(FavaeError):
    """A cache that cannot be used or continued; the message says what to do."""


def load_tokenizer(path: str) -> ModelMixin:
    """Opens an autoencoder whose latents can be cached: `load_autoencoder`, and a posterior (`latent_dist`).

    Raises:
        AutoencoderError: if there is none.
        CacheError: if it has no posterior.
    """
    model = load_autoencoder(path)
    if not isinstance(model, diffusers.AutoencoderKL):
        raise CacheError(
            f"{path}: a {type(model).__name__} has no posterior to cache; AutoencoderKL and its subclasses have"
        )
    return model


def tokenizer_hash(tokenizer: ModelMixin) -> str:
    """SHA-256 of what determines the latents: class, configuration without its statistics, weights."""
    config = {k: v for k, v in tokenizer.config.items() if k not in STATISTICS_KEYS and not k.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(tokenizer).__name__, config], sort_keys=True, default=list).encode())
    add_weights(digest, tokenizer)
    return digest.hexdigest()


def add_weights(digest, model: torch.nn.Module) -> None:
    """Feeds names and values of all parameters and buffers to a hash."""
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


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
        tokenizer: gives `encode(x).latent_dist`.
        images: read through the centre crop; unreadable ones are left out.
        output: a new folder, or one that the same call was writing.
        dtype: of the stored moments.
    Returns:
        The manifest.
    Raises:
        AutoencoderError: for a size that does not fit.
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
        "dtype": str(dtype).removeprefix("torch."),
    }
    if state.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        _check_plan(output, plan)
    state.wait_for_everyone()
    _check_plan(output, plan)

    tokenizer = tokenizer.to(state.device).eval()
    shards = range(math.ceil(len(images) / shard_size))
    mine = [k for k in shards if k % state.num_processes == state.process_index and not _shard(output, k).exists()]
    for k in tqdm(mine, desc="latents", unit="shard", disable=not state.is_main_process):
        part = Subset(images, range(k * shard_size, min((k + 1) * shard_size, len(images))))
        loader = DataLoader(part, batch_size, num_workers=num_workers, collate_fn=skip_missing)
        tensors = _encode(tokenizer, (batch for batch in loader if batch is not None), state.device, dtype)
        temporary = output / f".writing-{k:05}"
        save_file(tensors, temporary)
        temporary.rename(_shard(output, k))
    state.wait_for_everyone()

    if state.is_main_process:
        manifest = {**plan, "classes": images.classes, **_summary(output, len(shards))}
        write_file(output / MANIFEST, json.dumps(manifest, indent=1))
    state.wait_for_everyone()
    return json.loads((output / MANIFEST).read_text())


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05}.safetensors"


def _check_plan(output: Path, plan: dict) -> None:
    """A folder is written for one plan: the first process leaves it there, every later one must agree with it."""
    file = output / "plan.json"
    if not file.exists():
        if any(path.name != ".writing-plan.json" for path in output.iterdir()):
            raise CacheError(f"{output} is not empty and not a latent cache; choose another --output")
        write_file(file, json.dumps(plan, indent=1))
    written = json.loads(file.read_text())
    changed = [key for key, value in plan.items() if written.get(key) != value]
    if changed:
        raise CacheError(
            f"{output} holds a cache made with another {', '.join(changed)}; delete it or choose another --output"
        )


def _encode(tokenizer: ModelMixin, batches, device, dtype: torch.dtype) -> dict[str, Tensor]:
    columns = {"mean": [], "logvar": [], "labels": [], "indices": []}
    for batch in batches:
        x = batch["image"].to(device, tokenizer.dtype)
        views = [tokenizer.encode(view).latent_dist for view in (x, x.flip(-1))]
        for name in ("mean", "logvar"):
            columns[name].append(torch.stack([getattr(view, name) for view in views], dim=1).to("cpu", dtype))
        columns["labels"].append(batch["label"])
        columns["indices"].append(batch["index"])
    return {name: torch.cat(values).contiguous() for name, values in columns.items() if values}


def _open_shard(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and run the same command again") from error


def _count(shard: safe_open) -> int:
    """Images in an open shard; a shard of unreadable images is empty."""
    names = list(shard.keys())
    return shard.get_slice("labels").get_shape()[0] if names else 0


def _summary(output: Path, num_shards: int) -> dict:
    """Counts per shard, and each channel's mean and deviation over all latents, in float64.

    The deviation is that of the samples a generator sees: Var z = Var mean + E exp(logvar).
    """
    counts, first, second, variance, total = [], 0, 0, 0, 0
    for k in range(num_shards):
        with _open_shard(_shard(output, k)) as shard:
            if not _count(shard):
                counts.append(0)
                continue
            mean, logvar = shard.get_tensor("mean").double(), shard.get_tensor("logvar").double()
        counts.append(len(mean))
        first = first + mean.sum((0, 1, 3, 4))
        second = second + mean.square().sum((0, 1, 3, 4))
        variance = variance + logvar.exp().sum((0, 1, 3, 4))
        total += mean.numel() // mean.shape[2]
        shape = list(mean.shape[2:])
    if not total:
        raise CacheError(f"{output}: not one image could be read")
    average = first / total
    deviation = (second / total - average.square() + variance / total).sqrt()
    return {
        "counts": counts,
        "latent_shape": shape,
        "latents_mean": average.tolist(),
        "latents_std": deviation.tolist(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Reading


class LatentDataset:
    """A latent cache, read in batches; normalised to zero mean and unit deviation per channel where it is drawn from.

    Args:
        folder: of the cache.
        tokenizer: if given, the cache must come from it.
        flip: whether an epoch takes half of the images as their mirror images.
        shuffle_shards: how many shards are mixed at a time; None mixes all. With fewer, what is read at a time is small
            enough to stay in memory, or to be read in one go from a slow disk.
        images: the images that the cache was made of, if batches shall have them too.

    `read(indices, views)` gives moments as stored, `draw(batch)` latents from their posteriors; `epoch(rng)` an order.

    Raises:
        CacheError: for a folder without manifest, another tokenizer's cache, a missing or a truncated shard.
    """

    def __init__(
        self,
        folder: str | Path,
        tokenizer: ModelMixin | None = None,
        flip: bool = True,
        shuffle_shards: int | None = None,
        images: ImageDataset | None = None,
    ):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise CacheError(f"{folder}: no finished latent cache; write it with python -m favae.data.latents")
        self.manifest = json.loads((self.folder / MANIFEST).read_text())
        if tokenizer is not None and tokenizer_hash(tokenizer) != self.manifest["tokenizer"]:
            raise CacheError(
                f"{folder} was made by another tokenizer than data.tokenizer; give the one that wrote it, or write the "
                "cache again into another folder"
            )
        self.flip, self.shuffle_shards, self.images = flip, shuffle_shards, images
        if images is not None and len(images) != self.manifest["images"]:
            raise CacheError(f"{folder} was made of {self.manifest['images']} images, data.images has {len(images)}")
        self.classes = self.manifest["classes"]
        self.latent_shape = tuple(self.manifest["latent_shape"])
        self.mean = torch.tensor(self.manifest["latents_mean"]).view(-1, 1, 1)
        self.std = torch.tensor(self.manifest["latents_std"]).view(-1, 1, 1)
        self._ends = np.cumsum(self.manifest["counts"])
        self._open: dict[int, dict[str, Tensor | list[int]]] = {}
        self._check_shards()

    def _check_shards(self) -> None:
        for number, count in enumerate(self.manifest["counts"]):
            path = _shard(self.folder, number)
            if not path.is_file():
                raise CacheError(f"{path} is missing; write the cache again with the same command, it fills the gap")
            with _open_shard(path) as shard:
                found = _count(shard)
            if found != count:
                raise CacheError(f"{path} holds {found} images where the manifest says {count}; delete the cache")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def epoch(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Indices of all images in a random order, and the view of each (1: mirrored)."""
        views = (rng.random(len(self)) < 0.5).astype(np.int64) if self.flip else np.zeros(len(self), np.int64)
        if self.shuffle_shards is None:
            return rng.permutation(len(self)), views
        counts = np.asarray(self.manifest["counts"])
        shards = rng.permutation(len(counts))
        windows = [shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)]
        parts = [np.concatenate([np.arange(self._ends[k] - counts[k], self._ends[k]) for k in ks]) for ks in windows]
        return np.concatenate([rng.permutation(part) for part in parts]), views

    def read(self, indices: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """
        Args:
            indices, views: (B,), of images and of their views.
        Returns:
            mean, logvar (B, C, h, w) of the stored dtype, label (B,) int64; with images, image (B, 3, H, W) in
            [-1, 1], the same view; on the CPU.
        Raises:
            IndexError: for an index that is not there.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices must be in 0 ... {len(self) - 1}")
        numbers = np.searchsorted(self._ends, indices, side="right")
        rows = indices - self._ends[numbers] + np.asarray(self.manifest["counts"])[numbers]
        shards = [self._shard(number) for number in numbers.tolist()]
        like = shards[0]["mean"]
        batch = {name: torch.empty(len(indices), *self.latent_shape, dtype=like.dtype) for name in ("mean", "logvar")}
        means, logvars = batch["mean"].unbind(), batch["logvar"].unbind()
        for mean, logvar, shard, row in zip(means, logvars, shards, (2 * rows + views).tolist()):
            mean.copy_(shard["mean"][row])
            logvar.copy_(shard["logvar"][row])
        batch["label"] = torch.tensor([shard["labels"][row] for shard, row in zip(shards, rows.tolist())])
        if self.images is not None:
            found = [self._image(shard["indices"][row]) for shard, row in zip(shards, rows.tolist())]
            mirrored = torch.from_numpy(np.asarray(views, bool)).view(-1, 1, 1, 1)
            batch["image"] = torch.where(mirrored, torch.stack(found).flip(-1), torch.stack(found))
        return batch

    def _image(self, index: int) -> Tensor:
        item = self.images[index]
        if item is None:
            raise CacheError(f"image {index} of data.images cannot be read, which it could when the cache was written")
        return item["image"]

    def _shard(self, number: int) -> dict[str, Tensor | list[int]]:
        if number not in self._open:  # opened once in each worker that reads it; memory-mapped, not loaded
            with _open_shard(_shard(self.folder, number)) as shard:
                moments = {name: shard.get_tensor(name).flatten(0, 1) for name in ("mean", "logvar")}  # (2n, C, h, w)
                lists = {name: shard.get_tensor(name).tolist() for name in ("labels", "indices")}
                self._open[number] = moments | lists
        return self._open[number]

    def draw(self, batch: dict[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """Samples of the posteriors that `read` gave, normalised: (B, C, h, w) float32, on the batch's device."""
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
        print(f"{count:,} images and their mirror images in {arguments.output}, by {processes} process(es)")


if __name__ == "__main__":
    main()
