#!/usr/bin/env python
"""Encode + decode throughput of the f16d32 tokenizers, paired: in each round every model handles the same batch.

    python benchmarks/tokenizer_throughput.py                            (256 px, batch 4, this machine's CPU or GPU)

Prints images per second and the ratio to vavae_f16d32 (median over rounds, with the lowest and highest), and writes
docs/results/tokenizer_throughput.json. Random weights: speed does not depend on them.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from favae.autoencoders import measure_budget
from favae.training.config import TokenizerConfig, load_config
from favae.training.models import build_model

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("vavae_f16d32", "favae_f16d32", "favae_f16d32_fast")


@torch.no_grad()
def seconds_per_batch(vae, images: torch.Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    vae.decode(vae.encode(images).latent_dist.mode())
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/tokenizer_throughput.json")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    shape = (arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    images = (torch.rand(shape) * 2 - 1).to(arguments.device, dtype)
    models = {}
    for name in RECIPES:
        config = load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{name}.yaml")
        models[name] = build_model(config.model).to(arguments.device).eval()
        if dtype != torch.float32:
            models[name].to(dtype)
        seconds_per_batch(models[name], images)  # warm-up
    rounds = [{name: seconds_per_batch(vae, images) for name, vae in models.items()} for _ in range(arguments.rounds)]

    results = {}
    for name, vae in models.items():
        ratios = [r[RECIPES[0]] / r[name] for r in rounds]
        budget = measure_budget(vae, arguments.resolution)
        results[name] = {
            "images_per_second": arguments.batch_size / statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "gflop": budget.flops / 1e9,
            "params": budget.params,
            "floats_per_image": budget.floats_per_image,
        }
    settings = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "batch_size": arguments.batch_size,
        "resolution": arguments.resolution,
        "dtype": arguments.dtype,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")

    print(f"encode + decode, batch {arguments.batch_size} at {arguments.resolution} px, {settings['device']}")
    print(f"{'model':22}{'images/s':>10}{'ratio':>8}{'range':>16}{'GFLOP':>8}{'params':>10}")
    for name, r in results.items():
        spread = f"{r['ratio_range'][0]:.2f}-{r['ratio_range'][1]:.2f}"
        size = f"{r['params'] / 1e6:.1f}M"
        print(f"{name:22}{r['images_per_second']:10.2f}{r['ratio']:8.2f}{spread:>16}{r['gflop']:8.1f}{size:>10}")


if __name__ == "__main__":
    main()
