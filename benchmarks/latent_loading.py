#!/usr/bin/env python
"""Latents per second: our cache, read in batches, against opening the shard for every item, as published.

    python -m benchmarks.latent_loading             (a minute on a CPU, 300 MB of temporary files)

Both are read in shuffled order by a DataLoader without workers, in turn in every round. The published way stores one
sample and its mirror image in float32; ours stores mean and log-variance of both in bfloat16, and samples on the GPU
(which is not timed: there it costs nothing). f16d32 latents, files in memory. Writes docs/results/latent_loading.json.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import environment, make_parser, parse_arguments, speedup, time_paired, with_range, write_result
from favae.data.cached_dataset import CONTENTS
from favae.data.latents import open_latents
from favae.data.sharded_cache import CacheWriter, shard_file
from favae.data.stream import TrainingStream

LATENT_SHAPE = (32, 16, 16)
NUM_CLASSES = 1000


def write_caches(folder: Path, images: int, shard_size: int) -> None:
    """The same number of random latents in the published format and, in a folder of its own, "cache", in ours."""
    counts = [min(shard_size, images - first) for first in range(0, images, shard_size)]
    labels = [torch.randint(NUM_CLASSES, (count,)) for count in counts]
    for number, count in enumerate(counts):
        published = {name: torch.randn(count, *LATENT_SHAPE) for name in ("latents", "latents_flip")}
        save_file(published | {"labels": labels[number]}, folder / f"latents_rank00_shard{number:03}.safetensors")

    def write_shard(number: int, path: Path) -> None:
        count = counts[number]
        ours = {name: torch.randn(count, 2, *LATENT_SHAPE).bfloat16() for name in ("mean", "logvar")}
        save_file(ours | {"labels": labels[number], "indices": torch.arange(count)}, path)

    summary = {
        "stores": "moments",
        "counts": counts,
        "latent_shape": LATENT_SHAPE,
        "classes": [str(i) for i in range(NUM_CLASSES)],
        "latents_mean": [0.0] * LATENT_SHAPE[0],
        "latents_std": [1.0] * LATENT_SHAPE[0],
    }
    writer = CacheWriter(folder / "cache", {"tokenizer": ""}, CONTENTS)
    writer.write_missing([shard_file(writer.folder, i) for i in range(len(counts))], write_shard, "latents")
    writer.finish(lambda: summary)


class OpenedForEveryItem(Dataset):
    """LightningDiT's data set: every item opens its shard."""

    def __init__(self, folder: Path):
        self.items = []
        for file in sorted(folder.glob("latents_*.safetensors")):
            with safe_open(file, "pt") as shard:
                self.items += [(file, row) for row in range(shard.get_slice("labels").get_shape()[0])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file, row = self.items[index]
        with safe_open(file, framework="pt", device="cpu") as shard:
            name = "latents" if np.random.uniform() > 0.5 else "latents_flip"
            return shard.get_slice(name)[row : row + 1].squeeze(0), shard.get_slice("labels")[row : row + 1]


def read_batches(loader, num_batches: int) -> None:
    for _, _ in zip(range(num_batches), loader):
        pass


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parse_arguments(parser, "latent_loading.json", argv, rounds=9)

    torch.set_num_threads(1)
    num_batches = arguments.images // arguments.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write_caches(Path(folder), arguments.images, arguments.shard_size)
        stream = TrainingStream(open_latents(Path(folder) / "cache"), seed=0)
        published = DataLoader(OpenedForEveryItem(Path(folder)), arguments.batch_size, shuffle=True)
        calls = {
            "ours": lambda: read_batches(stream.batches(arguments.batch_size, 0), num_batches),
            "published": lambda: read_batches(published, num_batches),
        }
        timings = time_paired(calls, rounds=arguments.rounds)
    images = num_batches * arguments.batch_size
    result = environment() | {
        "images_per_second": {name: images / timing.median for name, timing in timings.items()},
        **speedup(timings["ours"].seconds, timings["published"].seconds),
    }
    write_result(arguments.output, result)
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in result["images_per_second"].items())
    print(f"images per second: {speeds}; {with_range(result, 1)}")


if __name__ == "__main__":
    main()
