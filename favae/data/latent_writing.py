"""Writes a latent cache: all images through a tokenizer, once (`favae.data.latents` has what is in it)."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Subset

from favae.autoencoders import image_channels, measure_budget
from favae.data.cached_dataset import CONTENTS, CachedDataset
from favae.data.captions import captions_file, check_captions, summarize_captions
from favae.data.image_record import RECORD_FILE, ImageRecord, RecordedImages, check_images
from favae.data.images import MIN_SIZE, ImageDataset, read_in_order, without_high_frequencies
from favae.data.latents import MomentsDataset, PackedMomentsDataset, TokenDataset, tokenizer_hash
from favae.data.sharded_cache import CacheWriter, all_finite, open_shard, shard_file
from favae.errors import CacheError
from favae.models import VQModelFA


@torch.no_grad()
def write_latent_cache(
    tokenizer: ModelMixin,
    images: ImageDataset,
    output: str | Path,
    *,
    data_name: str = "",
    batch_size: int = 32,
    shard_size: int = 4096,
    dtype: torch.dtype = torch.float32,
    compress: bool = False,
    low_pass: float | None = None,
    num_workers: int = 0,
) -> dict:
    """Encodes every image and its mirror image. All processes call this together.

    Args:
        tokenizer: any autoencoder of images; one without a posterior gets the smallest log-variance.
        images: read through the center crop, in as many channels as the tokenizer takes; unreadable ones are left out.
        output: a new folder, or one that the same call began.
        data_name: a name of the images, for the manifest; the record of the images tells whether they are the same.
        batch_size: images that are encoded at a time.
        shard_size: images per shard.
        dtype: of the stored moments; tokens are int32.
        compress: stores the moments in 6 bits instead.
        low_pass: encodes the images `without_high_frequencies` above this radius.
        num_workers: processes that read images, for each process that encodes.
    Returns:
        The manifest.
    Raises:
        ModelError: if the tokenizer cannot take images of this resolution.
        CacheError: if the folder holds a cache of another tokenizer, resolution or dtype, or of other images or
            captions; if not one image can be read; or if latents are not finite or overflow in `dtype`.
    """
    measure_budget(tokenizer, images.resolution)  # refuses a resolution that does not fit, before anything is written
    images = images.with_channels(image_channels(tokenizer))
    classes = images.classes  # refuses labels that are no classes, likewise
    captioned = images.source.has_captions  # refuses what is no text
    if not captioned and captions_file(Path(output), 0).exists():
        raise CacheError(f"{output} has captions, and the images given have none; name their --caption-column again")
    min_size = getattr(images.source, "min_size", MIN_SIZE)  # what tables and archives leave out when they read it
    dataset_class: type[CachedDataset] = PackedMomentsDataset if compress else MomentsDataset
    stored = None if compress else dtype
    if isinstance(tokenizer, VQModelFA):
        if compress:
            raise CacheError("tokens of a codebook are not compressed: they are integers already")
        dataset_class, stored = TokenDataset, torch.int32
    plan = {
        "tokenizer": tokenizer_hash(tokenizer),
        "data": data_name,
        "images": len(images),
        "resolution": images.resolution,
        "shard_size": shard_size,
        "dtype": "int6" if stored is None else str(stored).removeprefix("torch."),
        "low_pass": low_pass,
        "min_size": None if min_size == MIN_SIZE else min_size,
    }
    writer = CacheWriter(output, plan, CONTENTS, names=["data", "images"])
    tokenizer = tokenizer.to(writer.state.device).eval()
    ranges = [range(first, min(first + shard_size, len(images))) for first in range(0, len(images), shard_size)]
    files = [shard_file(writer.folder, number) for number in range(len(ranges))]

    # The record of the images. One that was lost is written again if all bytes of the images are the same.
    record = writer.folder / RECORD_FILE
    check_images(writer.folder, files, writer.begun.get("images"), images.source, read_all=not record.exists())
    writer.write_missing([record], lambda _, path: ImageRecord.of(images.source).write(path), "images")

    # Latents.
    def write_shard(number: int, path: Path) -> None:
        part = Subset(RecordedImages(images), ranges[number])
        batches = read_in_order(part, batch_size, num_workers)
        save_file(_encode(dataset_class, tokenizer, batches, stored, images.source.name, low_pass), path)

    writer.write_missing(files, write_shard, "latents")

    # Captions, also those of latents that an earlier call wrote.
    def captions_of(number: int) -> list[list[str]]:
        with open_shard(files[number]) as shard:
            indices = shard.get_tensor("indices").tolist() if dataset_class.count(shard, files[number]) else []
        return [images.source.captions(index) for index in indices]

    if captioned:
        paths = [captions_file(writer.folder, number) for number in range(len(files))]
        check_captions(paths, writer.own(paths), captions_of)
        writer.write_missing(
            paths, lambda number, path: path.write_text(json.dumps(captions_of(number)), encoding="utf-8"), "captions"
        )

    # The manifest.
    def summarize() -> dict:
        summary = _summarize(dataset_class, tokenizer, files)
        captions = summarize_captions(writer.folder, summary["counts"]) if captioned else None
        return {"classes": classes, "stores": dataset_class.stores, **summary, "captions": captions}

    return writer.finish(summarize)


def _encode(
    dataset_class: type[CachedDataset],
    tokenizer: ModelMixin,
    batches: Iterable[dict],
    dtype: torch.dtype | None,
    name: Callable[[int], str],
    low_pass: float | None,
) -> dict[str, Tensor]:
    """The tensors of a shard: both views of all images in the batches.

    Args:
        dtype: of the columns; None keeps what the data set makes.
        name: gives an image's, for messages.
    """
    columns: dict[str, list[Tensor]] = {key: [] for key in (*dataset_class.columns, "labels", "indices", "checksums")}
    for batch in batches:
        image = batch["image"].to(tokenizer.device, tokenizer.dtype)
        if low_pass is not None:
            image = without_high_frequencies(image, low_pass)
        views = []
        for view in (image, image.flip(-1)):
            values, exact = dataset_class.encode(tokenizer, view)
            stored = [value.to("cpu", dtype or value.dtype) for value in values]
            if not (all_finite(exact) and all(map(all_finite, stored))):
                _refuse(exact, stored, batch["index"].tolist(), name)
            views.append(stored)
        for key, *both in zip(dataset_class.columns, *views):
            columns[key].append(torch.stack(both, dim=1))
        columns["labels"].append(batch["label"])
        columns["indices"].append(batch["index"])
        columns["checksums"].append(batch["checksum"])
    return {key: torch.cat(values).contiguous() for key, values in columns.items() if values}


def _refuse(exact: Tensor, stored: Sequence[Tensor], indices: Sequence[int], name: Callable[[int], str]) -> None:
    """Raises `CacheError` for the first image of a batch whose latents are not finite, or not in the stored dtype."""
    for row, index in enumerate(indices):
        if not all_finite(exact[row]):
            help = "another autoencoder" if exact.dtype == torch.float32 else "its weights in float32"
            raise CacheError(
                f"{name(index)}: the autoencoder gives latents that are not finite in {exact.dtype}; try {help}"
            )
        if not all(all_finite(value[row]) for value in stored):
            largest = exact[row].float().abs().max()
            raise CacheError(
                f"{name(index)}: latents of up to {largest:.3g} overflow in {stored[-1].dtype}; float32 holds them"
            )


def _summarize(dataset_class: type[CachedDataset], tokenizer: ModelMixin, files: Sequence[Path]) -> dict:
    """Images in each shard, the shape of their latents, and what the data set says about them."""
    counts = []
    for file in files:
        with open_shard(file) as shard:
            counts.append(dataset_class.count(shard, file))
    filled = [file for file, count in zip(files, counts) if count]
    if not filled:
        raise CacheError(f"{files[0].parent}: not one image could be read")
    with open_shard(filled[0]) as shard:
        shape = dataset_class.latent_shape_of(shard.get_slice(dataset_class.columns[0]).get_shape()[2:])
    return {"counts": counts, "latent_shape": shape, **dataset_class.summarize(tokenizer, filled)}
