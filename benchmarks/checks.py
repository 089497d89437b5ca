#!/usr/bin/env python
"""Does this machine compute what it should? Precisions, compilation, tiles, resuming, and one process of DDP and FSDP.

    python -m benchmarks.checks                                      (minutes; on a GPU if there is one)
    python -m benchmarks.checks --recipe RECIPE.yaml model.latent_channels=32 --steps 20

Each check gives the root mean square of a difference, relative to what is compared, and the most that it may be. The
trainings are a few steps of the recipe. Where two of the same commands differ, as on a GPU, whose sums have no fixed
order, the others may differ twice as much. Writes docs/results/checks.json, and fails if a difference is too large.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from benchmarks.timing import ROOT, device, environment, make_parser, parse_arguments, write_result
from favae.autoencoders import load_autoencoder, spatial_compression_ratio
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig

# The most that a relative difference may be.
LIMITS = {"bf16": 0.03, "compiled": 1e-3, "tiles": 0.1, "resumed": 1e-3, "ddp": 1e-3, "fsdp": 1e-3}
TRAININGS = ("resumed", "ddp", "fsdp")


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt())


def passes(vae: ModelMixin, resolution: int) -> dict[str, Callable[[], float]]:
    """The checks of one pass through an autoencoder, by name."""
    vae = vae.to(device()).eval()
    generator = torch.Generator().manual_seed(0)
    small, large = (
        (torch.rand(1, 3, side, side, generator=generator) * 2 - 1).to(device())
        for side in (resolution, 2 * resolution)
    )

    @torch.no_grad()
    def both(module: Callable[[Tensor], object], images: Tensor) -> Tensor:
        return module(images).sample

    def bf16() -> float:
        with torch.autocast(device(), torch.bfloat16):
            found = both(vae, small)
        return relative(found, both(vae, small))

    def compiled() -> float:
        return relative(both(torch.compile(vae), small), both(vae, small))

    def tiles() -> float:
        whole = both(vae, large)
        vae.enable_tiling()
        found = both(vae, large)
        vae.disable_tiling()
        return relative(found, whole)

    return {"bf16": bf16, "compiled": compiled, "tiles": tiles}


def trainings(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], float]]:
    """The checks of a training, by name: each compares its last weights with those of the plain one."""
    common = [str(arguments.recipe), *arguments.settings, "train.mixed_precision=no", "train.tracker=null"]
    common += [
        "train.sample_every=0",
        "train.lr_scheduler=constant",
        "train.lr_warmup_steps=0",
        "train.checkpoint_every=1000000",
        "train.channels_last=false",  # which FSDP needs
    ]

    def train(name: str, *settings: str, launcher: tuple[str, ...] = ()) -> Tensor:
        command = [sys.executable, *launcher, "train_tokenizer.py", *common, f"output={folder / name}", *settings]
        subprocess.run(command, cwd=ROOT, check=True)
        weights = load_autoencoder(str(folder / name / "final")).state_dict().values()
        return torch.cat([value.flatten().float() for value in weights])

    steps = f"train.steps={arguments.steps}"
    one_process = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")

    @cache
    def plain() -> Tensor:
        return train("plain", steps)

    def repeated() -> float:
        return relative(train("repeated", steps), plain())

    def resumed() -> float:
        train("resumed", f"train.steps={arguments.steps // 2}")
        return relative(train("resumed", steps), plain())

    def ddp() -> float:
        return relative(train("ddp", steps, launcher=one_process), plain())

    def fsdp() -> float:
        return relative(train("fsdp", steps, "train.shard=true", launcher=one_process), plain())

    return {"repeated": repeated, "resumed": resumed, "ddp": ddp, "fsdp": fsdp}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "configs/tokenizer/photos_favae.yaml")
    parser.add_argument("settings", nargs="*", help="key=value for the recipe")
    parser.add_argument("--steps", type=int, default=10, help="of each training (default: 10)")
    parser.add_argument("--only", nargs="*", choices=list(LIMITS), default=list(LIMITS), metavar="CHECK")
    arguments = parse_arguments(parser, "checks.json", argv)
    config = load_config(TokenizerConfig, arguments.recipe, arguments.settings)
    vae = build_model(config.model)
    resolution = max(config.train.resolution, 2 * spatial_compression_ratio(vae))
    result: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        checks = passes(vae, resolution) | trainings(arguments, Path(folder))
        noise = checks["repeated"]() if set(arguments.only) & set(TRAININGS) else 0.0
        for name in arguments.only:
            limit = max(LIMITS[name], 2 * noise) if name in TRAININGS else LIMITS[name]
            difference = checks[name]()
            result[name] = {"difference": difference, "limit": limit, "ok": difference <= limit}
            print(f"{name}: {difference:.2e}, at most {limit:g}", flush=True)
            found = environment() | {"device": device(), "repeated": noise, "checks": result}
            write_result(arguments.output, found)
    failed = [name for name, found in result.items() if not found["ok"]]
    if failed:
        sys.exit(f"error: {', '.join(failed)}: the difference is too large")


if __name__ == "__main__":
    main()
