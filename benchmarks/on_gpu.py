#!/usr/bin/env python
"""Everything that is measured on a GPU, in slices that can be chosen. Without a GPU it does nothing.

    python -m benchmarks.on_gpu
    python -m benchmarks.on_gpu --only tokenizer_throughput training_memory
    FAVAE_GLYPHS=glyphs FAVAE_PHOTOGRAPHS=photographs python -m benchmarks.on_gpu --only latents --minutes 9 --jobs 8

Each slice is one of the other benchmarks with settings for a GPU, or a training with each of several settings, by its
own script; trainings are compared with the first setting. Those of `..._on_all_gpus` take all GPUs and are left out
where there is one. Slices are independent of each other: one that fails is reported, and the others run. Each writes a
JSON file into docs/results/gpu/; the last lines are the tables of trainings and experiments. All but the experiments
take about an hour together. With --minutes, a slice is ended after so long, and the same command goes on: trainings
that are compared already are not run again, and the experiments on glyphs and photographs (of 32, 64 and 128 px, with
20 times the steps) continue where they were. scripts/glyphs.py writes 27 MB of data and scripts/photographs.py 250 MB.
Their models are too small to keep a GPU busy: with --jobs it trains several rows at a time, if there are as many cores;
with NVIDIA's MPS (nvidia-cuda-mps-control -d, before) they do not take turns.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from benchmarks.timing import RESULTS, ROOT, environment, make_parser, write_result
from favae.data.images import ImageDataset
from favae.data.latent_writing import write_latent_cache
from favae.data.sources import open_source

OUTPUT = RESULTS / "gpu"
FILES = ROOT / "runs/on_gpu"
TOKENIZER, LATENTS = FILES / "tokenizer", FILES / "latents"
PEAK_TFLOPS = {"A100": 312, "H100": 989, "H200": 989, "B200": 2250}  # dense, bfloat16
PATIENCE = 60  # seconds: to write a checkpoint

# The weights of LPIPS and DINOv2 may not be at hand, so losses that need them are left out.
NO_TEACHER = "loss.alignment.weight=0"
BF16 = ["--dtype", "bfloat16"]
BENCHMARKS = {
    "checks": ["checks", NO_TEACHER],
    "tokenizer_throughput": ["tokenizer_throughput", *BF16, "--batch-size", "32", "--rounds", "20"],
    "training_memory": ["training_memory", "--batch-size", "32"],
    "generator_step_b": ["generator_step", "--size", "B", *BF16, "--batch-size", "256", "--compile", "--rounds", "20"],
    "generator_step_xl": ["generator_step", "--size", "XL", *BF16, "--batch-size", "64", "--compile", "--rounds", "20"],
    "muon_step": ["muon_step", "--rounds", "20"],
    "sampling": ["sampling", *BF16, "--batch-size", "64", "--num-inference-steps", "50", "--compile"],
    "cat_sampling": ["cat_sampling", *BF16, "--layers", "24", "--width", "1536", "--heads", "16", "--batch-size", "16"],
}

FLOAT32 = "train.mixed_precision=no"
FAVAE = ["tokenizer", "configs/tokenizer/favae_f16d32.yaml", "data.path=photos", "loss.perceptual=0",
         NO_TEACHER, "train.batch_size=16"]  # fmt: skip
GENERATOR = ["generator", "configs/generator/lightningdit_xl_f16d32.yaml", f"data.latents={LATENTS}",
             f"data.tokenizer={TOKENIZER}", "train.batch_size=64"]  # fmt: skip
TRAININGS = {
    "tokenizer_training": {
        "bf16": FAVAE,
        "float32": [*FAVAE, FLOAT32],
        "bf16_channels_last": [*FAVAE, "train.channels_last=true"],
        "bf16_compiled": [*FAVAE, "train.compile=true"],
        "bf16_gradient_checkpointing": [*FAVAE, "train.gradient_checkpointing=true"],
    },
    "generator_training": {
        "bf16": GENERATOR,
        "float32": [*GENERATOR, FLOAT32],
        "bf16_compiled": [*GENERATOR, "train.compile=true"],
    },
}
ON_ALL_GPUS = {
    "tokenizer_training_on_all_gpus": {
        "replicated": [*FAVAE, "loss.adversarial.adaptive=false"],
        "sharded": [*FAVAE, "loss.adversarial.adaptive=false", "train.shard=true"],
    },
    "generator_training_on_all_gpus": {
        "replicated": GENERATOR,
        "sharded": [*GENERATOR, "train.shard=true"],
        "sharded_compiled": [*GENERATOR, "train.shard=true", "train.compile=true"],
    },
}
EXPERIMENTS = {  # and their steps
    "latents": 120_000,
    "codebooks": 80_000,
    "generators": 120_000,
    "glyph_texts": 120_000,
    "stft": 40_000,
}
SLICES = [*BENCHMARKS, *TRAININGS, *ON_ALL_GPUS, *EXPERIMENTS]


def run(command: list[str], minutes: float | None = None) -> None:
    """Runs a command, which gets Ctrl-C after so many minutes, as do the processes that it has started.

    Those that are still there after another minute are killed.

    Raises:
        CalledProcessError: if it fails.
    """
    # A shell has its background jobs ignore Ctrl-C, and they pass that on.
    heeding = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, cwd=ROOT, **heeding)
    try:
        code = process.wait(None if minutes is None else 60 * minutes)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(reason, KeyboardInterrupt):
            raise
        print("not finished; the same command goes on", flush=True)
        return
    if code:
        raise subprocess.CalledProcessError(code, command)


def relative(file: Path) -> str:
    """As commands name it in what they write: not with the path of this machine."""
    return os.path.relpath(file, ROOT)


def run_experiment(name: str, minutes: float | None, jobs: int) -> None:
    words = ["--steps", str(EXPERIMENTS[name]), "--jobs", str(jobs), "--output", relative(OUTPUT / f"{name}.json")]
    run([sys.executable, "-m", f"experiments.{name}", *words], minutes)


def run_benchmark(name: str, minutes: float | None) -> None:
    words = [*BENCHMARKS[name], "--output", relative(OUTPUT / f"{name}.json")]
    peak = [value for gpu, value in PEAK_TFLOPS.items() if gpu in torch.cuda.get_device_name()]
    if words[0] == "generator_step" and peak:
        words += ["--peak-tflops", str(peak[0])]
    run([sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]], minutes)


def compare_trainings(name: str, variants: dict[str, list[str]], processes: int, minutes: float | None) -> None:
    """Trains with each setting, in processes of their own; speed relative to the first.

    Files of single trainings are there while the slice is not finished.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if variants[next(iter(variants))][0] == "generator":
        prepare_latents()
    result = environment()
    files = {variant: FILES / f"{name}-{variant}.json" for variant in variants}
    for variant, file in files.items():
        if not file.exists() or json.loads(file.read_text())["commit"] != result["commit"]:
            file.unlink(missing_ok=True)
            command = [*launcher, "-m", "benchmarks.training_run", *variants[variant], "--output", relative(file)]
            run(command, None if end is None else (end - time.monotonic()) / 60)
        if not file.exists():  # ended
            return
        found = json.loads(file.read_text())
        keys = ("settings", "seconds_per_step", "images_per_step", "processes", "peak_memory_gb")
        result[variant] = {key: found[key] for key in keys}
        first = result[next(iter(variants))]["seconds_per_step"]
        result[variant]["speedup"] = first / found["seconds_per_step"]
        write_result(OUTPUT / f"{name}.json", result)
    for file in files.values():
        file.unlink()


def table(name: str) -> str:
    """What a slice has found, as text; nothing of those whose benchmark prints it."""
    file = OUTPUT / f"{name}.json"
    if name in EXPERIMENTS:
        return file.with_suffix(".md").read_text() if file.with_suffix(".md").exists() else ""
    found = json.loads(file.read_text()) if name not in BENCHMARKS and file.exists() else {}
    rows = {variant: row for variant, row in found.items() if isinstance(row, dict) and "speedup" in row}
    lines = [f"{variant:30}{row['seconds_per_step']:8.3f} s{row['speedup']:7.2f} x" for variant, row in rows.items()]
    return "\n".join(lines)


def prepare_latents() -> None:
    """A cache of f16d32 latents by a small untrained tokenizer: a generator's speed does not depend on their values."""
    torch.manual_seed(0)
    tokenizer = AutoencoderKL(
        block_out_channels=(32,) * 5,
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        latent_channels=32,
        sample_size=256,
    )
    tokenizer.save_pretrained(TOKENIZER)
    images = ImageDataset(open_source("photos"), 256)
    write_latent_cache(tokenizer.to("cuda" if torch.cuda.is_available() else "cpu"), images, LATENTS)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=SLICES, default=SLICES, metavar="SLICE", help=", ".join(SLICES))
    parser.add_argument("--minutes", type=float, help="the most that a slice takes (default: as long as it needs)")
    parser.add_argument("--jobs", type=int, default=1, help="rows of an experiment at a time (default: 1)")
    arguments = parser.parse_args(argv)
    gpus = torch.cuda.device_count()
    if not gpus:
        print("There is no CUDA device here, so nothing is measured.")
        return

    failed = []
    for name in arguments.only:
        print(f"== {name}", flush=True)
        try:
            if name in BENCHMARKS:
                run_benchmark(name, arguments.minutes)
            elif name in EXPERIMENTS:
                run_experiment(name, arguments.minutes, arguments.jobs)
            elif name in TRAININGS:
                compare_trainings(name, TRAININGS[name], 1, arguments.minutes)
            elif gpus > 1:
                compare_trainings(name, ON_ALL_GPUS[name], gpus, arguments.minutes)
            else:
                print("left out: there is one GPU")
        except subprocess.CalledProcessError as error:
            print(f"failed: {error}", flush=True)
            failed.append(name)
    for name, found in ((name, table(name)) for name in arguments.only):
        if found:
            print(f"== {name}\n{found}")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; the other slices have written their files")


if __name__ == "__main__":
    main()
