#!/usr/bin/env python
"""Sampling from LightningDiT with guidance: ours against two evaluations per step, eager.

    python benchmarks/sampling.py --compile           (B/1, batch 2, 4 steps, two minutes on a CPU)
    python benchmarks/sampling.py --batch-size 64 --num-inference-steps 50 --dtype bfloat16 --compile      (a GPU)

Latents only, no decoding. `LightningDiTPipeline` evaluates the class and the null class in one batch, its blocks
compiled with --compile; the other is the straightforward loop over the published formula, one evaluation after the
other. The same noise, and the same latents at the end (checked). In turn in every round; the ratio is the median.
Also how many graphs were compiled, for batches with and without guidance and another number of steps.
Writes docs/results/sampling.json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from generator_step import SIZES
from tokenizer_runs import ROOT, environment
from torch import Tensor

from favae import LightningDiTPipeline, LightningDiTTransformer2DModel


def straightforward(transformer, noise: Tensor, labels: Tensor, scale: float, steps: int) -> Tensor:
    """Euler steps from t = 0 (noise) to 1, on the grid 0, 1 / steps, ..."""
    null = torch.full_like(labels, transformer.config.num_classes)
    latents = noise
    for i in range(steps):
        times = torch.full((len(noise),), i / steps, device=noise.device)
        given, without = (transformer(latents.to(transformer.dtype), times, c).sample.float() for c in (labels, null))
        latents = latents + (without + scale * (given - without)) / steps
    return latents


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="B")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-inference-steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="our blocks")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/sampling.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers, heads, head_dim = SIZES[arguments.size]
    shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}

    def build() -> LightningDiTTransformer2DModel:
        torch.manual_seed(0)
        model = LightningDiTTransformer2DModel(**shape)
        for name, parameter in model.named_parameters():  # not the identity that an untrained one is
            if "modulation" in name or "proj_out" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(device, getattr(torch, arguments.dtype)).eval()

    vae = AutoencoderKL(block_out_channels=(32,) * 5, down_block_types=("DownEncoderBlock2D",) * 5,
                        up_block_types=("UpDecoderBlock2D",) * 5, latent_channels=32)  # fmt: skip
    pipe = LightningDiTPipeline(build(), vae, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    if arguments.compile:
        torch._dynamo.reset()
        pipe.transformer.compile_repeated_blocks(dynamic=True)
    published = build()
    labels = torch.arange(arguments.batch_size, device=device)
    noise = torch.randn(arguments.batch_size, 32, 16, 16, device=device)
    steps, scale = arguments.num_inference_steps, arguments.guidance_scale

    def ours(steps: int = steps, scale: float = scale) -> Tensor:
        return pipe(labels, guidance_scale=scale, num_inference_steps=steps, latents=noise, output_type="latent").images

    ways = {"ours": ours, "straightforward": lambda: straightforward(published, noise, labels, scale, steps)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(arguments.rounds + 1):
        for name, call in ways.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            results[name] = call()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    error = (results["ours"] - results["straightforward"]).abs().max().item()
    assert error < (1e-2 if arguments.dtype == "float32" else 0.5), f"the latents differ by {error}"
    ours(steps=2)
    ours(scale=1.0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if arguments.compile else None
    ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["straightforward"])]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    result = {
        "command": " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]]),
        **environment(),
        **{key: getattr(arguments, key) for key in ("size", "batch_size", "num_inference_steps", "dtype", "compile")},
        "seconds": medians,
        "images_per_second": {name: arguments.batch_size / value for name, value in medians.items()},
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "largest_difference": error,
        "compiled_graphs": graphs,
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    print(
        f"{arguments.size}/1, batch {arguments.batch_size}, {steps} steps: "
        f"{result['images_per_second']['ours']:.2f} images/s, {result['speedup']:.2f} times ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) two evaluations per step; graphs: {graphs}"
    )


if __name__ == "__main__":
    main()
