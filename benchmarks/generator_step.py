#!/usr/bin/env python
"""A training step of LightningDiT: ours against a straightforward implementation of the published block.

    python -m benchmarks.generator_step            (B/1, batch 4, two minutes on a CPU)
    python -m benchmarks.generator_step --batch-size 256 --dtype bfloat16 --compile --peak-tflops 989   (on an H200)

A step is forward pass, backward pass and AdamW on the same latents; both take one in turn in every round. The published
block is written here: one layer for q, k and v, rotation by the formula, SwiGLU in two layers, eager. On a GPU the
result has peak memory and the share of `--peak-tflops` that the step's FLOPs make (MFU) too.
Writes docs/results/generator_step.json.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import (
    device,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae import LightningDiTTransformer2DModel
from favae.models.lightningdit_transformer_2d import axial_rotary_embedding

SIZES = {
    name: {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim}
    for name, (layers, heads, head_dim) in {"B": (12, 12, 64), "L": (24, 16, 64), "XL": (28, 16, 72)}.items()
}


class Norm(nn.Module):
    """RMSNorm in float32."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)).type_as(x) * self.weight


class PublishedBlock(nn.Module):
    """The block of LightningDiT as published, without any fused operation but attention."""

    def __init__(self, width: int, heads: int, grid: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        cos, sin = axial_rotary_embedding(grid, width // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def rotate(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
        return x * self.cos + turned * self.sin

    def forward(self, x: Tensor, condition: Tensor, *others) -> Tensor:
        """The rotary embedding is ignored, since this block holds its own; texts there are none."""
        b1, s1, g1, b2, s2, g2 = self.modulation(condition).chunk(6, dim=1)
        h = self.norm1(x) * (1 + s1.unsqueeze(1)) + b1.unsqueeze(1)
        query, key, value = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = self.rotate(query).to(value.dtype), self.rotate(key).to(value.dtype)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + g1.unsqueeze(1) * self.proj(attended)
        h = self.norm2(x) * (1 + s2.unsqueeze(1)) + b2.unsqueeze(1)
        gate, linear = self.w12(h).chunk(2, dim=-1)
        return x + g2.unsqueeze(1) * self.w3(F.silu(gate) * linear)


def with_published_blocks(model: LightningDiTTransformer2DModel) -> LightningDiTTransformer2DModel:
    """Our model with its blocks replaced by untrained published ones, so that only the block differs."""
    config = model.config
    width, grid = config.num_attention_heads * config.attention_head_dim, config.sample_size // config.patch_size
    model.blocks = nn.ModuleList(PublishedBlock(width, config.num_attention_heads, grid) for _ in model.blocks)
    return model


def step_flops(shape: dict, batch: tuple[Tensor, ...]) -> int:
    """FLOPs of a forward and a backward pass."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        LightningDiTTransformer2DModel(**shape)(*(value.to("meta") for value in batch)).sample.sum().backward()
    return counter.get_total_flops()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="B")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="our blocks; the published ones stay eager")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in this dtype, for MFU: H100, H200 bfloat16: 989")
    arguments = parse_arguments(parser, "generator_step.json", argv, rounds=7)

    # The same noise, times and classes for both.
    count, shape = arguments.batch_size, SIZES[arguments.size]
    latents, times = torch.randn(count, 32, 16, 16, device=device()), torch.rand(count, device=device())
    batch = (latents, times, torch.randint(1000, (count,), device=device()))
    torch.manual_seed(0)
    models = {
        "ours": LightningDiTTransformer2DModel(**shape).to(device()),
        "published": with_published_blocks(LightningDiTTransformer2DModel(**shape)).to(device()),
    }
    if arguments.compile:
        for block in models["ours"].blocks:
            block.compile()

    def make_step(model: nn.Module):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

        def step() -> None:
            with torch.autocast(device(), torch.bfloat16, enabled=arguments.dtype == "bfloat16"):
                loss = (model(*batch).sample.float() - latents).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    calls = {name: make_step(model) for name, model in models.items()}
    timings = time_paired(calls, rounds=arguments.rounds, warmup=2)
    flops, seconds = step_flops(shape, batch), timings["ours"].median
    on_gpu = device() == "cuda"
    result = environment() | {
        "size": arguments.size,
        "batch_size": count,
        "dtype": arguments.dtype,
        "compile": arguments.compile,
        "seconds_per_step": {name: timing.median for name, timing in timings.items()},
        **speedup(timings["ours"].seconds, timings["published"].seconds),
        "tflop_per_step": flops / 1e12,
        # Of each step, beside the weights and moments of the other model.
        "peak_memory_gb": {name: timing.peak_bytes / 1e9 for name, timing in timings.items()} if on_gpu else None,
        "mfu": flops / seconds / 1e12 / arguments.peak_tflops if arguments.peak_tflops else None,
    }
    write_result(arguments.output, result)
    print(
        f"{arguments.size}/1, batch {count}: {seconds:.3f} s per step, {with_range(result)} the published block's speed"
    )


if __name__ == "__main__":
    main()
