#!/usr/bin/env python
"""A training step of LightningDiT: ours against a straightforward implementation of the published block.

    python benchmarks/generator_step.py            (B/1, batch 4, two minutes on a CPU)
    python benchmarks/generator_step.py --batch-size 256 --dtype bfloat16 --compile --peak-tflops 989   (on an H200)

Forward, backward and AdamW on the same latents, in turn in every round; the ratio is the median over rounds. The
published block is written here: one layer for q, k and v, rotation by the formula, SwiGLU in two layers, eager. On a
GPU also peak memory and the share of `--peak-tflops` that the step's FLOPs make (MFU).
Writes docs/results/generator_step.json.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from favae import LightningDiTTransformer2DModel
from favae.models.lightningdit_transformer_2d import axial_rotary_embedding

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class PublishedBlock(nn.Module):
    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        cos, sin = axial_rotary_embedding(grid, grid, width // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * self.cos + turned * self.sin

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """`rotary` is left alone: this one has its own."""
        b1, s1, g1, b2, s2, g2 = self.modulation(condition).chunk(6, dim=1)
        h = self.norm1(x) * (1 + s1.unsqueeze(1)) + b1.unsqueeze(1)
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.rotate(query).to(value.dtype), self.rotate(key).to(value.dtype)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + g1.unsqueeze(1) * self.proj(attended)
        h = self.norm2(x) * (1 + s2.unsqueeze(1)) + b2.unsqueeze(1)
        gate, linear = self.w12(h).chunk(2, dim=-1)
        return x + g2.unsqueeze(1) * self.w3(F.silu(gate) * linear)


def published(model: LightningDiTTransformer2DModel) -> LightningDiTTransformer2DModel:
    """Ours with its blocks replaced by untrained published ones: what differs is the block."""
    config = model.config
    width, grid = config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size
    model.blocks = nn.ModuleList(PublishedBlock(width, config.num_attention_heads, grid) for _ in model.blocks)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="B")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="our blocks; the published ones stay eager")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peak-tflops", type=float, help="of the GPU in this dtype, for MFU; an H200 has 989 in bfloat16"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/generator_step.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, heads, head_dim = SIZES[arguments.size]
    shape = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    batch = (
        torch.randn(arguments.batch_size, 32, 16, 16, device=device),
        torch.rand(arguments.batch_size, device=device),
        torch.randint(1000, (arguments.batch_size,), device=device),
    )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = [value.to("meta") for value in batch]
        LightningDiTTransformer2DModel(**shape)(*meta).sample.sum().backward()
    flops = counter.get_total_flops()
    torch.manual_seed(0)
    models = {
        "ours": LightningDiTTransformer2DModel(**shape).to(device),
        "published": published(LightningDiTTransformer2DModel(**shape)).to(device),
    }
    if arguments.compile:
        for block in models["ours"].blocks:
            block.compile()
    optimizers = {name: torch.optim.AdamW(model.parameters(), 1e-4) for name, model in models.items()}
    seconds, memory = {name: [] for name in models}, {}
    for number in range(arguments.rounds + 2):
        for name, model in models.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            with torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                loss = (model(*batch).sample.float() - batch[0]).square().mean()
            loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
                memory[name] = torch.cuda.max_memory_allocated() / 1e9  # beside the other model's weights and moments
            if number >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - started)
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["published"])]
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    result = {
        "command": " ".join(["python", "benchmarks/generator_step.py", *sys.argv[1:]]),
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "size": arguments.size,
        "batch_size": arguments.batch_size,
        "seconds_per_step": medians,
        "speedup": statistics.median(ratios),
        "speedup_range": [min(ratios), max(ratios)],
        "tflop_per_step": flops / 1e12,
        "peak_memory_gb": memory or None,
        "mfu": flops / medians["ours"] / 1e12 / arguments.peak_tflops if arguments.peak_tflops else None,
    }
    arguments.output.write_text(json.dumps(result, indent=1))
    print(
        f"{arguments.size}/1, batch {arguments.batch_size}: ours {medians['ours']:.3f} s, published "
        f"{medians['published']:.3f} s a step; {result['speedup']:.2f} times ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
