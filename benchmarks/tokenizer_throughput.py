#!/usr/bin/env python
"""How fast the f16d32 tokenizers encode and decode, relative to VA-VAE's.

    python -m benchmarks.tokenizer_throughput           (256 px, batch 4; minutes on a CPU)
    python -m benchmarks.tokenizer_throughput --dtype bfloat16 --batch-size 64      (on a GPU)

Every model handles the same batch in turn in every round; the reference is `vavae_f16d32`. With one thread on a CPU
(OMP_NUM_THREADS=1), CPU time is compared, which other programs on the machine change less than time on the clock.
Weights are random, since speed does not depend on them. Writes docs/results/tokenizer_throughput.json.
"""

import statistics
from pathlib import Path

import torch

from benchmarks.timing import (
    ROOT,
    device,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae.autoencoders import measure_budget, reconstruct
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig

RECIPES = ("vavae_f16d32", "favae_f16d32", "favae_f16d32_fast")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipes", nargs="*", type=Path, default=[Path(name) for name in RECIPES])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parse_arguments(parser, "tokenizer_throughput.json", argv, rounds=7)

    torch.manual_seed(0)
    size, dtype = arguments.resolution, getattr(torch, arguments.dtype)
    images = (torch.rand(arguments.batch_size, 3, size, size) * 2 - 1).to(device(), dtype)
    models = {}
    for recipe in arguments.recipes:
        file = recipe if recipe.suffix else ROOT / f"configs/tokenizer/{recipe}.yaml"
        config = load_config(TokenizerConfig, file)
        models[recipe.stem] = build_model(config.model).to(device()).eval()
    if dtype != torch.float32:
        models = {name: vae.to(dtype) for name, vae in models.items()}
    calls = {name: lambda vae=vae: reconstruct(vae, images) for name, vae in models.items()}
    timings = time_paired(calls, rounds=arguments.rounds)

    one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    seconds = {name: timing.cpu_seconds if one_thread else timing.seconds for name, timing in timings.items()}
    reference = next(iter(seconds.values()))
    results = {}
    for name, vae in models.items():
        budget = measure_budget(vae, size)
        results[name] = {
            "images_per_second": arguments.batch_size / statistics.median(seconds[name]),
            **speedup(seconds[name], reference),
            "gflop": budget.flops / 1e9,
            "params": budget.params,
            "floats_per_image": budget.floats_per_image,
        }
        print(f"{name:22}{results[name]['images_per_second']:8.2f} images/s, {with_range(results[name])}")
    settings = {key: getattr(arguments, key) for key in ("rounds", "batch_size", "resolution", "dtype")}
    write_result(arguments.output, environment() | settings | {"results": results})


if __name__ == "__main__":
    main()
