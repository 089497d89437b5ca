#!/usr/bin/env python
"""Sampling from LightningDiT with guidance: ours against two evaluations per step, eager.

    python -m benchmarks.sampling --compile           (B/1, batch 2, 4 steps, two minutes on a CPU)
    python -m benchmarks.sampling --batch-size 64 --num-inference-steps 50 --dtype bfloat16 --compile      (on a GPU)

Latents only, without decoding. `LightningDiTPipeline` evaluates the class and the null class in one batch, its blocks
compiled with --compile; the other is a loop over the published formula, one evaluation after the other. Both start from
the same noise and must reach the same latents. Both sample in turn in every round. The result has the number of graphs
that were compiled too, for batches with and without guidance and two numbers of steps.
Writes docs/results/sampling.json.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benchmarks.generator_step import SIZES
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
from favae import LightningDiTPipeline, LightningDiTTransformer2DModel

LARGEST_DIFFERENCE = {"float32": 1e-2, "bfloat16": 0.5}  # between the latents of both


def straightforward(transformer, noise: Tensor, labels: Tensor, scale: float, steps: int) -> Tensor:
    """Euler steps from t = 0 (noise) to 1, on the grid 0, 1 / steps, ..."""
    null = torch.full_like(labels, transformer.config.num_classes)
    latents = noise
    for i in range(steps):
        times = torch.full((len(noise),), i / steps, device=noise.device)
        given, without = (transformer(latents.to(transformer.dtype), times, c).sample.float() for c in (labels, null))
        latents = latents + (without + scale * (given - without)) / steps
    return latents


def build_transformer(size: str, dtype: str) -> LightningDiTTransformer2DModel:
    """Random weights; also where an untrained model has zeros, which would make it the identity."""
    torch.manual_seed(0)
    model = LightningDiTTransformer2DModel(**SIZES[size])
    for name, parameter in model.named_parameters():
        if "modulation" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(device(), getattr(torch, dtype)).eval()


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="B")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--num-inference-steps", type=int, default=4)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="our blocks")
    arguments = parse_arguments(parser, "sampling.json", argv, rounds=7)

    # A pipeline needs an autoencoder, though it decodes nothing here.
    vae = AutoencoderKL(
        block_out_channels=(32,) * 5,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        latent_channels=32,
    )
    transformer, published = (build_transformer(arguments.size, arguments.dtype) for _ in range(2))
    pipeline = LightningDiTPipeline(
        transformer, vae, FlowMatchEulerDiscreteScheduler(), text_encoder=None, tokenizer=None
    )
    pipeline.set_progress_bar_config(disable=True)
    if arguments.compile:
        torch._dynamo.reset()
        transformer.compile_repeated_blocks(dynamic=True)
    labels = torch.arange(arguments.batch_size, device=device())
    noise = torch.randn(arguments.batch_size, 32, 16, 16, device=device())
    num_steps, guidance_scale = arguments.num_inference_steps, arguments.guidance_scale

    def ours(num_inference_steps: int = num_steps, guidance_scale: float = guidance_scale) -> Tensor:
        return pipeline(
            labels,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            latents=noise,
            output_type="latent",
        ).images

    def theirs() -> Tensor:
        return straightforward(published, noise, labels, guidance_scale, num_steps)

    timings = time_paired({"ours": ours, "straightforward": theirs}, rounds=arguments.rounds)
    difference = (timings["ours"].result - timings["straightforward"].result).abs().max().item()
    assert difference < LARGEST_DIFFERENCE[arguments.dtype], f"the latents differ by {difference}"

    # Other settings that the same graphs should serve.
    ours(num_inference_steps=2)
    ours(guidance_scale=1.0)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if arguments.compile else None
    settings = ("size", "batch_size", "num_inference_steps", "dtype", "compile")
    result = environment() | {
        **{key: getattr(arguments, key) for key in settings},
        "seconds": {name: timing.median for name, timing in timings.items()},
        "images_per_second": {name: arguments.batch_size / timing.median for name, timing in timings.items()},
        **speedup(timings["ours"].seconds, timings["straightforward"].seconds),
        "largest_difference": difference,
        "compiled_graphs": graphs,
    }
    write_result(arguments.output, result)
    speed = result["images_per_second"]["ours"]
    print(f"{speed:.2f} images/s, {with_range(result)} two evaluations per step; compiled graphs: {graphs}")


if __name__ == "__main__":
    main()
