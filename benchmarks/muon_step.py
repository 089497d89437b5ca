#!/usr/bin/env python
"""Muon on processors of three generations: a step in float32, relative to one in bfloat16; and on a GPU: a step with
matrices of one shape together, relative to one with each on its own.

    python -m benchmarks.muon_step          (a minute)

The matrices are those of the small DiT of experiments/generators.py, on a GPU also those of LightningDiT-XL. Older
processors are imitated by what oneDNN and torch are told to use, each in a process of its own. Writes
docs/results/muon_step.json.
"""

import json
import os
import subprocess
import sys
from unittest.mock import patch

import torch

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
from experiments.generators import VARIANTS
from favae.training import muon
from favae.training.models import build_model
from favae.training.optimization import matrices_of

INSTRUCTIONS = {
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
}


def measure(rounds: int) -> dict:
    """How many times as fast a step in float32 is as one in bfloat16, by CPU seconds."""
    optimizer, matrices = prepared(VARIANTS["lightningdit"].model)

    def step(dtype: torch.dtype) -> None:
        with patch.object(muon, "fast_dtype", lambda device: dtype):
            optimizer.step()

    calls = {"bfloat16": lambda: step(torch.bfloat16), "float32": lambda: step(torch.float32)}
    timings = time_paired(calls, rounds=rounds)
    ratio = speedup(timings["float32"].cpu_seconds, timings["bfloat16"].cpu_seconds)
    return {"matrices": len(matrices), "float32": ratio}


def measure_together(model: dict, rounds: int) -> dict:
    """How many times as fast a step is with matrices of one shape together as with each on its own."""
    optimizer, matrices = prepared(model)

    def alone() -> None:
        with patch.object(muon, "_is_alone", lambda matrix: True):
            optimizer.step()

    timings = time_paired({"alone": alone, "together": optimizer.step}, rounds=rounds)
    result = speedup(timings["together"].seconds, timings["alone"].seconds)
    result |= {f"{name}_seconds": timing.median for name, timing in timings.items()}
    return {"matrices": len(matrices), "shapes": len({matrix.flatten(1).shape for matrix in matrices})} | result


def prepared(model: dict) -> tuple[muon.Muon, list[torch.nn.Parameter]]:
    """Muon for the matrices of a model, which have random gradients."""
    matrices = matrices_of([build_model(model).to(device())])
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return muon.Muon(matrices, 1e-3, nesterov=True), matrices


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--inside", action="store_true", help="measure in this process, and print the result alone")
    arguments = parse_arguments(parser, "muon_step.json", argv, rounds=5)
    if arguments.inside:
        print(json.dumps(measure(arguments.rounds)))
        return
    result = environment()
    if device() == "cuda":
        small = VARIANTS["lightningdit"].model
        for name, model in {"small": small, "XL": {**small, **SIZES["XL"]}}.items():
            result[name] = measure_together(model, arguments.rounds)
            print(f"{name}: together is {with_range(result[name])} as fast as each on its own")
        write_result(arguments.output, result)
        return
    for name, variables in INSTRUCTIONS.items():
        command = [sys.executable, "-m", "benchmarks.muon_step", "--inside", "--rounds", str(arguments.rounds)]
        lines = subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout
        result[name] = json.loads(lines.splitlines()[-1])
        print(f"{name}: float32 is {with_range(result[name]['float32'])} as fast as bfloat16")
    write_result(arguments.output, result)


if __name__ == "__main__":
    main()
