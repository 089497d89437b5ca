#!/usr/bin/env python
"""Do frequency losses help a codebook? The ladder of FA-VAE (CVPR 2023) on glyphs, 4,000 steps each.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.codebooks

One VQGAN of 128 bits per image, without a loss on frequencies; with the focal frequency loss of the image, with and
without complements; of all levels, unblurred; with fixed Gaussians (spectrum loss) and with learned ones (dynamic
spectrum loss); the three kinds of frequency complements; and tokens from coarse to fine. Measured on families of fonts
that are in no training. Writes docs/results/codebooks.json and .md.
"""

import shutil
from dataclasses import dataclass, field

from benchmarks.timing import environment
from experiments.image_sets import InMemoryImages
from experiments.latents import BOTH, TOKENIZER, error_curve, on_plateau, steps_of
from experiments.precision import fastest_precision
from experiments.report import format_table, means, rows_by_model
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.tokenizers import load_trained, reconstruct_all
from experiments.training_sets import GLYPHS, load_images
from favae.autoencoders import measure_budget
from favae.data.images import to_uint8
from favae.files import read_json_lines
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import train

STEPS = 4_000
MODEL = {
    "name": "VQModelFA",
    "block_out_channels": [16, 32, 48, 96],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "codebook_size": 256,
    "dead_code_threshold": 0.1,
    "sample_size": GLYPHS.size,
}
TRAIN = {
    **TOKENIZER,  # also here Muon at 3e-3 is the best of three rates for `none` on validation pictures, after 600 steps
    "batch_size": 32,
    "resolution": GLYPHS.size,
}


@dataclass(frozen=True)
class Variant:
    """A row: the kind of frequency complements, the losses that differ from the L1 distance, and the quantizer."""

    note: str
    complement: str | None = "conv"
    loss: dict = field(default_factory=dict)
    quantizer: dict = field(default_factory=dict)
    length: float = 1.0


FOCAL = {"focal_frequency": {"weight": 1.0}}


def spectrum(kind: str) -> dict:
    return {"spectrum": {"weight": 0.01, "type": kind}}


VARIANTS = {
    "none": Variant("no loss on frequencies, no complements", None),
    "complements": Variant("complements, without a loss on them"),
    "ffl_alone": Variant("the focal frequency loss of the image, without complements", None, FOCAL),
    "ffl": Variant("+ focal frequency loss of the image", loss=FOCAL),
    "ffl_levels": Variant("+ the same of the features at all levels, unblurred", loss=FOCAL | spectrum("none")),
    "sl": Variant("+ spectrum loss: Gaussians of a fixed sigma", loss=FOCAL | spectrum("fixed")),
    "dsl": Variant("+ dynamic spectrum loss: learned sigmas", loss=FOCAL | spectrum("dynamic")),
    "dsl_res": Variant("`dsl` with complements of the kind res", "res", FOCAL | spectrum("dynamic")),
    "dsl_attn": Variant("`dsl` with complements of the kind attn", "attn", FOCAL | spectrum("dynamic")),
    "next_scale": Variant(
        "`dsl` with residual tokens of 1, 2 and 4 cells along each side, of 64 entries: 126 bits",
        loss=FOCAL | spectrum("dynamic"),
        quantizer={"quantizer": "next_scale", "scales": [1, 2, 4], "codebook_size": 64},
    ),
    "next_band": Variant(
        "`dsl` with tokens of Haar bands of the latents",
        loss=FOCAL | spectrum("dynamic"),
        quantizer={"quantizer": "next_band", "scales": [1, 2, 4]},
    ),
}


def make_row(task: Task) -> dict:
    """Trains one model with one seed, and measures it along the way."""
    train(recipe(task))
    images, labels = load_images(GLYPHS, "heldout")
    images = images.float() / 127.5 - 1
    curve = error_curve(task, images)
    vae = load_trained(task.run / "final")
    budget = measure_budget(vae, GLYPHS.size)
    reconstructions = to_uint8(reconstruct_all(vae, images))
    log = read_json_lines(task.run / "metrics.jsonl")[-1]
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": "glyphs", "curve": curve}
    row |= {"mixed_precision": fastest_precision()}
    row |= {"gflop": budget.flops / 1e9, "params": budget.params, "bits_per_image": budget.bits_per_image}
    row |= {key: value for key, value in curve[-1].items() if key != "steps"}
    row |= {"plateau": on_plateau([point["recon"] for point in curve])}
    row |= {key: log[key] for key in ("codebook_usage", "codebook_perplexity")}
    row |= GLYPHS.metrics(InMemoryImages(reconstructions), labels)
    shutil.rmtree(task.run / "checkpoints")
    return row | environment()


def recipe(task: Task) -> TokenizerConfig:
    sections = {
        "model": MODEL | {"frequency_complement": task.variant.complement} | task.variant.quantizer,
        "data": {"path": str(GLYPHS.file("train")), "flip": False},
        "loss": task.variant.loss,
        "train": {**TRAIN, **BOTH, **steps_of(task), "mixed_precision": fastest_precision()},
    }
    return load_recipe(TokenizerConfig, task, sections)


def tables(report: dict) -> str:
    lines = []
    digits = {"recon": 5, "low": 4, "high": 5, "psnr": 2, "ssim": 3, "fd": 1, "accuracy": 3, "codebook_perplexity": 0}
    for name, own in rows_by_model(report).items():
        plateaus = sum(row["plateau"] for row in own)
        lines.append([f"`{name}`", len(own), f"{own[0]['gflop']:.2f}", *means(own, digits), plateaus])
    columns = ["row", "seeds", "GFLOP", "Recon", "Low", "High", "PSNR", "SSIM", "FD", "accuracy", "codes", "plateaus"]
    return format_table(columns, lines)


COMPARISON = Comparison(
    name="codebooks",
    variants=VARIANTS,
    prepare=lambda tasks: GLYPHS.file("train"),
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    resolution=GLYPHS.size,
    batch_size=32,
    pictures=False,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
