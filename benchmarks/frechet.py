#!/usr/bin/env python
"""The Fréchet distance at Inception's 2,048 dimensions, ours against torch-fidelity's; the memory of 50,000 images.

    python -m benchmarks.frechet         (three minutes on 2 cores)

Both get the same statistics of correlated random features, in turn in every round. Memory is the peak of a process in
which the evaluator goes through 50,000 images, with as many features, logits and spatial features as Inception has, and
computes all metrics. Writes docs/results/frechet.json.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric

from benchmarks.timing import (
    ROOT,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae.eval.extraction import image_statistics
from favae.eval.features import INCEPTION
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.generation import measure_samples
from favae.eval.image_sets import IMAGES_KEY, NpzImages


def random_features(count: int, dimensions: int, seed: int) -> np.ndarray:
    """Correlated features with a spectrum that falls as that of pooled features does; float32."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(dimensions, dimensions)).astype(np.float32) / dimensions**0.5
    scales = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    return (rng.standard_normal((count, dimensions), dtype=np.float32) * scales) @ mixing + 0.01 * seed


def compare(dimensions: int, count: int, rounds: int) -> dict:
    """Values and speed of both implementations on the same statistics."""
    real, fake = (feature_statistics(random_features(count, dimensions, seed)) for seed in (0, 1))
    theirs_in = [dict(zip(("mu", "sigma"), side)) for side in (real, fake)]

    def theirs() -> float:
        return fid_statistics_to_metric(*theirs_in, verbose=False)["frechet_inception_distance"]

    calls = {"ours": lambda: frechet_distance(*real, *fake), "torch_fidelity": theirs}
    timings = time_paired(calls, rounds=rounds)
    values = {name: timing.result for name, timing in timings.items()}
    return {
        "dimensions": dimensions,
        "count": count,
        "value": values,
        "relative_difference": abs(values["ours"] / values["torch_fidelity"] - 1),
        "seconds": {name: timing.median for name, timing in timings.items()},
        **speedup(timings["ours"].seconds, timings["torch_fidelity"].seconds),
    }


class RandomExtractor:
    """Random numbers, as many as Inception gives for an image."""

    name, hash = INCEPTION, ""
    shapes = {"features": 2048, "logits": 1008, "spatial": 2023}

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: torch.randn(len(images), size) for name, size in self.shapes.items()}


def measure_memory(count: int) -> None:
    """Computes all metrics of so many images of 8 px, and prints this process's peak memory in GB."""
    torch.manual_seed(0)
    values = np.arange(count, dtype=np.uint8)[:, None, None, None]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "images.npz"
        np.savez(file, **{IMAGES_KEY: np.broadcast_to(values, (count, 8, 8, 3))})
        images, extractors = NpzImages(file), [RandomExtractor()]
        references = image_statistics(images, extractors, keep=10_000, batch_size=256)
        measure_samples(images, references, extractors, batch_size=256)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak * (1 if sys.platform == "darwin" else 1024) / 1e9)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--count", type=int, default=10_000, help="images behind the compared statistics")
    parser.add_argument("--images", type=int, default=50_000, help="for the memory")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parse_arguments(parser, "frechet.json", argv, rounds=9)
    if arguments.memory:
        return measure_memory(arguments.images)

    started = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.frechet", "--memory", "--images", str(arguments.images)]
    memory = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    seconds = time.perf_counter() - started
    distance = compare(arguments.dimensions, arguments.count, arguments.rounds)
    result = environment() | {
        "distance": distance,
        "memory": {
            "images": arguments.images,
            "dimensions": arguments.dimensions,
            "peak_gb": float(memory),
            "seconds": seconds,
        },
    }
    write_result(arguments.output, result)
    print(f"{with_range(distance, 1)} torch-fidelity, {distance['seconds']}, values {distance['value']}")
    print(f"{arguments.images:,} images: peak {float(memory):.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
