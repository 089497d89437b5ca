#!/usr/bin/env python
"""The Fréchet distance at Inception's 2,048 dimensions: ours against torch-fidelity's, and the memory of 50,000 images.

    python benchmarks/frechet.py         (three minutes on 2 cores)

Both get the same statistics of correlated random features, in turn, in every round; the ratio is the median over
rounds. Memory is the peak of a process in which the evaluator goes through 50,000 images, with as many features, logits
and spatial features as Inception has, and takes all its measures.
Writes docs/results/frechet.json.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torch_fidelity.metric_fid import fid_statistics_to_metric

from favae.eval.extraction import image_statistics
from favae.eval.features import INCEPTION
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.generation import measure_samples

ROOT = Path(__file__).resolve().parent.parent


def features(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Correlated, with a spectrum that falls as pooled features' does; float32."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimensions, dimensions)).astype(np.float32) / dimensions**0.5
    scales = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    return (rng.standard_normal((count, dimensions), dtype=np.float32) * scales) @ mixing + 0.01 * seed


def compare(dimensions: int, count: int, rounds: int) -> dict:
    real, fake = (feature_statistics(features(count, dimensions, seed)) for seed in (0, 1))
    theirs_in = [dict(zip(("mu", "sigma"), side)) for side in (real, fake)]
    seconds, values = {"ours": [], "torch_fidelity": []}, {}
    for _ in range(rounds):
        started = time.perf_counter()
        values["ours"] = frechet_distance(*real, *fake)
        seconds["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        theirs = fid_statistics_to_metric(*theirs_in, verbose=False)
        seconds["torch_fidelity"].append(time.perf_counter() - started)
        values["torch_fidelity"] = theirs["frechet_inception_distance"]
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values())]
    return {
        "dimensions": dimensions,
        "count": count,
        "value": values,
        "relative_difference": abs(values["ours"] / values["torch_fidelity"] - 1),
        "seconds": {name: statistics.median(found) for name, found in seconds.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
    }


class Images(Dataset):
    """Tiny images, that the pass over them costs nothing."""

    size = (8, 8)

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"image": torch.full((3, 8, 8), index % 256, dtype=torch.uint8), "index": index}


class Extractor:
    """As much as Inception gives, without Inception."""

    name, hash = INCEPTION, ""
    shapes = {"features": 2048, "logits": 1008, "spatial": 2023}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.randn(len(images), size) for name, size in self.shapes.items()}


def measure_memory(count: int) -> None:
    """In a process of its own: the evaluator's pass and all measures; prints its peak in GB."""
    torch.manual_seed(0)
    references = image_statistics(Images(10_000), [Extractor()], keep=10_000, batch_size=256)
    measure_samples(Images(count), references, [Extractor()], batch_size=256)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak * (1 if sys.platform == "darwin" else 1024) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--count", type=int, default=10_000, help="images behind the compared statistics")
    parser.add_argument("--images", type=int, default=50_000, help="for the memory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/frechet.json")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return measure_memory(arguments.images)
    started = time.perf_counter()
    again = [sys.executable, *sys.argv, "--memory"]
    memory = float(subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout)
    seconds = time.perf_counter() - started
    result = {
        "command": " ".join(["python", "benchmarks/frechet.py", *sys.argv[1:]]),
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("numpy", "torch", "torch-fidelity")},
        "distance": compare(arguments.dimensions, arguments.count, arguments.rounds),
        "memory": {
            "images": arguments.images,
            "dimensions": arguments.dimensions,
            "peak_gb": memory,
            "seconds": seconds,
        },
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    distance = result["distance"]
    print(f"{distance['speedup']:.1f} times torch-fidelity's speed ({distance['seconds']}), values {distance['value']}")
    print(f"{arguments.images:,} images: peak {memory:.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
