#!/usr/bin/env python
"""Latents per second: our cache, read in batches, against opening the shard for every item, as published.

    python benchmarks/latent_loading.py             (a minute on a CPU, 300 MB of temporary files)

Both are loaded in shuffled order by a DataLoader without workers, in turn in every round; the ratio is the median over
rounds. The published way stores one sample and its mirror image in float32; ours mean and log-variance of both, in
bfloat16, and draws the sample where the model is (not timed: on the GPU it is nothing). f16d32, the files in memory.
Writes docs/results/latent_loading.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from favae.data.latents import open_latents
from favae.data.stream import TrainingStream

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (32, 16, 16)


def write_both(folder: Path, images: int, shard: int) -> None:
    counts = [min(shard, images - first) for first in range(0, images, shard)]
    for number, count in enumerate(counts):
        labels = torch.randint(1000, (count,))
        moments = {name: torch.randn(count, 2, *SHAPE).bfloat16() for name in ("mean", "logvar")}
        save_file(
            {**moments, "labels": labels, "indices": torch.arange(count)}, folder / f"shard-{number:05}.safetensors"
        )
        samples = {name: torch.randn(count, *SHAPE) for name in ("latents", "latents_flip")}
        save_file({**samples, "labels": labels}, folder / f"latents_rank00_shard{number:03}.safetensors")
    statistics_ = {"latents_mean": [0.0] * SHAPE[0], "latents_std": [1.0] * SHAPE[0]}
    manifest = {"counts": counts, "latent_shape": SHAPE, "classes": [str(i) for i in range(1000)], **statistics_}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": ""}))


class OpenedForEveryItem(Dataset):
    """What LightningDiT's data set does with each index."""

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


def images_per_second(loader, images: int, batch: int) -> float:
    started, seen = time.perf_counter(), 0
    for _ in loader:
        seen += batch
        if seen + batch > images:
            break
    return seen / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--shard", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/latent_loading.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_both(Path(folder), arguments.images, arguments.shard)
        published, stream = OpenedForEveryItem(Path(folder)), TrainingStream(open_latents(folder), seed=0)
        speeds = {"ours": [], "published": []}
        for number in range(arguments.rounds + 1):
            loaders = {
                "ours": stream.batches(arguments.batch_size, number * arguments.images // arguments.batch_size),
                "published": DataLoader(published, arguments.batch_size, shuffle=True),
            }
            for name, loader in loaders.items():
                speed = images_per_second(loader, arguments.images, arguments.batch_size)
                if number:  # the first round fills the caches
                    speeds[name].append(speed)
    ratios = [ours / theirs for ours, theirs in zip(*speeds.values())]
    result = {
        "command": " ".join(["python", "benchmarks/latent_loading.py", *sys.argv[1:]]),
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "safetensors", "numpy")},
        "images_per_second": {name: statistics.median(found) for name, found in speeds.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    speeds = ", ".join(f"{name} {speed:,.0f}" for name, speed in result["images_per_second"].items())
    print(f"images per second: {speeds}; {result['speedup']:.1f} times ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
