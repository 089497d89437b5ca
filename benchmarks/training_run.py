#!/usr/bin/env python
"""Seconds per step and peak memory of a training, as its own script runs it.

    python -m benchmarks.training_run tokenizer configs/tokenizer/photos_favae.yaml train.channels_last=true
    torchrun --nproc_per_node 8 -m benchmarks.training_run generator RECIPE.yaml data.latents=LATENTS train.shard=true

A few steps are trained into a folder that is removed afterwards. The first steps, which compile and choose algorithms,
do not count. Writes docs/results/training_run.json, or the file that --output names.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

import train_generator
import train_tokenizer
from benchmarks.timing import environment, make_parser, parse_arguments, write_result
from favae.distributed import process_state
from favae.files import read_json_lines
from favae.training.config import load_config
from favae.training.generator_config import GeneratorConfig
from favae.training.tokenizer_config import TokenizerConfig

TRAININGS = {
    "tokenizer": (TokenizerConfig, train_tokenizer.train),
    "generator": (GeneratorConfig, train_generator.train),
}


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Trains, and reads the times from the log of the run."""
    counted, ignored = arguments.steps, arguments.warmup_steps
    schema, train = TRAININGS[arguments.training]
    settings = {
        "output": folder,
        "train.steps": ignored + counted,
        "train.log_every": ignored,
        "train.sample_every": 0,
        "train.checkpoint_every": ignored + counted,
        "train.tracker": "null",
    }
    overrides = [*arguments.settings, *(f"{key}={value}" for key, value in settings.items())]
    config = load_config(schema, arguments.recipe, overrides)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    train(config)
    seconds = {record["step"]: record["seconds"] for record in read_json_lines(folder / "metrics.jsonl")}
    return {
        "seconds_per_step": (seconds[ignored + counted] - seconds[ignored]) / counted,
        "images_per_step": config.train.batch_size
        * config.train.gradient_accumulation_steps
        * process_state().num_processes,
        "processes": process_state().num_processes,
        # Of the first process; with sharding all are alike.
        "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
    }


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("training", choices=list(TRAININGS))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=40, help="that count")
    parser.add_argument("--warmup-steps", type=int, default=20, help="that come before")
    arguments = parse_arguments(parser, "training_run.json", argv)

    # All processes of one training must name the same folder.
    with tempfile.TemporaryDirectory() as folder:
        (folder,) = broadcast_object_list([folder])
        result = measure(arguments, Path(folder) / "run")
        if process_state().is_main_process:
            recipe, settings = arguments.recipe.stem, arguments.settings
            write_result(arguments.output, environment() | {"recipe": recipe, "settings": settings} | result)
            print(f"{recipe} {' '.join(settings)}: {result['seconds_per_step']:.3f} s per step")
        process_state().wait_for_everyone()


if __name__ == "__main__":
    main()
