#!/usr/bin/env python
"""Does a loss on local spectra sharpen an autoencoder? The table of the STFT loss (arXiv 2401.03166), on gray glyphs.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.stft

The paper's digits go through two numbers; these pictures of 32 px go through 64, by a small `AutoencoderKL` without a
KL term to speak of, so that losses of different sizes leave the same latents. Rows: the squared and the absolute
error, SSIM, SSIM with the STFT in windows as large as the picture and in short ones, and the last with phases as
printed. Measured on families of fonts that are in no training. Writes docs/results/stft.json, .md and pictures.
"""

import shutil
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.timing import environment
from experiments.latents import BOTH, TOKENIZER, error_curve, on_plateau, steps_of
from experiments.precision import fastest_precision
from experiments.report import format_table, means, rows_by_model, save_strip, save_strips
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.tokenizers import load_trained, reconstruct_all
from experiments.training_sets import GLYPHS
from favae.eval.compression import high_power
from favae.eval.spectra import radial_spectrum
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import train

STEPS = 2_000
PICTURES = 12
MODEL = {
    "name": "AutoencoderKL",
    "in_channels": 1,
    "out_channels": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 1,
}


@dataclass(frozen=True)
class Variant:
    note: str
    loss: dict = field(default_factory=dict)
    length: float = 1.0


def with_ssim(note: str, **stft) -> Variant:
    loss = {"reconstruction": "none", "ssim": 1.0}
    return Variant(note, loss | ({"stft": {"weight": 1.0, "phase_weight": 9.0, **stft}} if stft else {}))


VARIANTS = {
    "l2": Variant("the squared error", {"reconstruction": "l2"}),
    "l1": Variant("the absolute error", {"reconstruction": "l1"}),
    "ssim": with_ssim("1 - SSIM"),
    "ssim_dft": with_ssim("1 - SSIM, and a spectrum of windows as large as the picture", window=32, stride=16),
    "ssim_stft": with_ssim("1 - SSIM, and the STFT of windows of 16 px, every 4 px", window=16, stride=4),
    "ssim_stft_printed": with_ssim(
        "the same with phases neither wrapped nor weighted by amplitudes", window=16, stride=4, phase="paper"
    ),
    "l1_stft": Variant(
        "the absolute error, and the STFT",
        {"reconstruction": "l1", "stft": {"weight": 1.0, "window": 16, "stride": 4, "phase_weight": 9.0}},
    ),
}


def make_row(task: Task) -> dict:
    """Trains one autoencoder with one seed, and measures it along the way."""
    train(recipe(task))
    dataset = GLYPHS.dataset("heldout").with_channels(1)
    images = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
    curve = error_curve(task, images)
    vae = load_trained(task.run / "final")
    reconstructions = reconstruct_all(vae, images)
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": "glyphs, gray", "curve": curve}
    row |= {"mixed_precision": fastest_precision()}
    row |= {key: value for key, value in curve[-1].items() if key != "steps"}
    row |= {"plateau": on_plateau([point["recon"] for point in curve])}
    powers = [high_power(radial_spectrum(pictures)).mean() for pictures in (reconstructions, images)]
    row["high_power"] = float(powers[0] / powers[1])
    if task.pictures is not None and task.seed == 0:
        save_pictures(images, reconstructions, task)
    shutil.rmtree(task.run / "checkpoints")
    return row | environment()


def recipe(task: Task) -> TokenizerConfig:
    own = {"batch_size": 32, "resolution": GLYPHS.size, "mixed_precision": fastest_precision()}
    sections = {
        "model": MODEL,
        "data": {"path": str(GLYPHS.file("train")), "flip": False},
        "loss": {"kl": 1e-6, **task.variant.loss},
        "train": {**TOKENIZER, **BOTH, **own, **steps_of(task)},
    }
    return load_recipe(TokenizerConfig, task, sections)


def save_pictures(images: Tensor, reconstructions: Tensor, task: Task) -> None:
    assert task.pictures is not None
    chosen = torch.linspace(0, len(images) - 1, PICTURES).long()
    for name, pictures in ((task.name, reconstructions), ("original", images)):
        grid = pictures[chosen].repeat_interleave(2, 2).repeat_interleave(2, 3)
        save_strip(grid, task.pictures / f"{name}.png")


def tables(report: dict) -> str:
    lines = []
    digits = {"psnr": 2, "ssim": 4, "recon": 5, "low": 5, "high": 5, "high_power": 3}
    for name, own in rows_by_model(report).items():
        lines.append([f"`{name}`", len(own), *means(own, digits), sum(row["plateau"] for row in own)])
    columns = ["loss", "seeds", "PSNR", "SSIM", "Recon", "Low", "High", "power above a half", "plateaus"]
    return format_table(columns, lines)


COMPARISON = Comparison(
    name="stft",
    prepare=lambda tasks: GLYPHS.file("train"),
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    figures=lambda report, stem: save_strips(stem, list(VARIANTS), stem.with_name(f"{stem.name}_pictures.png")),
    resolution=GLYPHS.size,
    batch_size=32,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
