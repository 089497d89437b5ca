#!/usr/bin/env python
"""Do frequency losses help learned compression? HiFiC and FA-HiFiC, small, at three rates, by the files they write.

    python scripts/photographs.py --output photographs
    FAVAE_PHOTOGRAPHS=photographs python -m experiments.compression --models hific_low both_low --seeds 0

All rows have the same network but for the complements, the squared error, the rate loss and, in the last third of the
steps, the discriminator; without LPIPS. "ffl" adds the focal frequency loss of the image, "dsl" complements with the
dynamic spectrum loss, "both" both, and "published" weakens the squared error 255 times, as the published training of
FA-HiFiC did by a mistake. Two tokenizers that were not made for files are in the same table: "latents", of an
AutoencoderKLFA, rounded as coarsely as the rate wants, and "codes", of a VQModelFA, each written with as many bits as
it is frequent. Crops of 128 px of photographs are learned; those of other pictures are written to files and read.
Settings were chosen on validation crops. Writes docs/results/compression.json, .md and pictures.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Subset

from benchmarks.timing import environment
from experiments import codebooks
from experiments.latents import SPLIT
from experiments.precision import fastest_precision
from experiments.report import format_table, means, rows_by_model, save_kept_power, save_strip, save_strips
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.tokenizers import load_trained
from experiments.training_sets import PHOTOGRAPHS_128, lite
from favae import HyperpriorModelFA, VQModelFA
from favae.data.images import ImageDataset
from favae.eval.compression import (
    Codec,
    PillowCodec,
    TokenizerCodec,
    available_formats,
    matching_quality,
    measure_codec,
    model_codec,
    training_values,
)
from favae.files import read_json_lines, write_text
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import train

STEPS = 12_000
FEATURES = "efficientnet-lite0"
COUNTED = 500  # training pictures that say how often a number or a token occurs
PICTURES = (0, 90, 170, 250, 330, 420)
RATES = {"low": 0.25, "med": 0.5, "high": 1.0}  # bits per pixel
RATE_WEIGHTS = {"low": 4e-2, "med": 2e-2, "high": 1e-2}
MISTAKE = 255  # the published code divides the squared error by this once more
MODEL = {
    "name": "HyperpriorModelFA",
    "block_out_channels": [16, 32, 64, 96, 128],
    "num_residual_blocks": 3,
    "latent_channels": 48,
    "hyper_channels": 48,
}
TRAIN = {
    "resolution": 128,  # of windows of 64 px, the hyperprior would learn borders alone
    "batch_size": 4,
    "optimizer": "muon",  # after 500 steps, half of the error of AdamW on validation crops
    "learning_rate": 3e-3,
    "betas": [0.9, 0.99],
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "max_grad_norm": 1.0,
    "channels_last": True,
    "num_workers": 0,
    "sample_every": 0,
    "checkpoints_total_limit": 1,
    "tracker": None,
}


@dataclass(frozen=True)
class Variant:
    """A row: its losses of frequencies, at one of `RATES`; or a tokenizer's model, which has none."""

    note: str
    rate: str
    loss: dict = field(default_factory=dict)
    factor: float = 1.0  # of everything but the squared error
    tokenizer: dict | None = None
    length: float = 1.0


FFL = {"focal_frequency": {"weight": 3.3e-3}}
DSL = {"spectrum": {"weight": 6.6e-3, "type": "dynamic"}}
LOSSES: dict[str, tuple[str, dict, float]] = {
    "hific": ("HiFiC's losses, without LPIPS", {}, 1),
    "ffl": ("+ focal frequency loss of the image", FFL, 1),
    "dsl": ("+ complements and the dynamic spectrum loss", DSL, 1),
    "both": ("+ both: FA-HiFiC", FFL | DSL, 1),
    "published": ("FA-HiFiC with a squared error 255 times as weak", FFL | DSL, MISTAKE),
}
VARIANTS = {
    f"{name}_{rate}": Variant(f"{note}, about {bpp} bits per pixel", rate, loss, factor)
    for rate, bpp in RATES.items()
    for name, (note, loss, factor) in LOSSES.items()
}


CODES = {
    **codebooks.MODEL,
    "quantizer": "residual",
    "num_quantizers": 2,
    "frequency_complement": None,
    "sample_size": PHOTOGRAPHS_128.size,
}
VARIANTS |= {
    f"latents_{rate}": Variant(f"rounded latents, about {bpp} bits per pixel", rate, tokenizer=SPLIT)
    for rate, bpp in RATES.items()
}
VARIANTS["codes_low"] = Variant("two codes of 8 bits for 8 x 8 pixels", "low", tokenizer=CODES)


def make_row(task: Task) -> dict:
    """Trains one model with one seed, and measures the files that it writes of pictures that were in no training."""
    model, run, training = trained(task)
    log = read_json_lines(run / "metrics.jsonl")
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "params": model.num_parameters()}
    row |= {"curve": [[r["step"], r["reconstruction"], r.get("bits_per_pixel")] for r in log]}
    codec = codec_of(task, model)
    for split, extractors in (("validation", []), ("heldout", [lite()])):
        _, metrics, spectrum = measure_codec(codec, PHOTOGRAPHS_128.dataset(split), extractors)
        row[split] = {name: value for name, value in metrics.items() if value is not None}
    row["spectrum"] = spectrum  # of the held-out pictures
    if task.pictures is not None and task.seed == 0:
        save_pictures(task, codec)
    return row | training


def trained(task: Task) -> tuple[ModelMixin, Path, dict]:
    """The model of a row, its run folder, and the environment in which it was trained, which need not be that in which
    it is measured; a tokenizer is trained once for all rates."""
    own = task if task.variant.tokenizer is None else replace(task, name=task.name.rpartition("_")[0])
    training = own.beside("-training.json")
    with FileLock(own.beside(".lock")):
        if not (own.run / "final").exists():
            train(recipe(own))
            write_text(training, json.dumps({"mixed_precision": fastest_precision()} | environment()))
    return load_trained(own.run / "final"), own.run, json.loads(training.read_text())


def codec_of(task: Task, model: ModelMixin) -> Codec:
    """What writes and reads the files of a row."""
    if isinstance(model, HyperpriorModelFA):
        return model_codec(model)
    images = PHOTOGRAPHS_128.dataset("train")
    counted = Subset(images, range(0, len(images), max(1, len(images) // COUNTED)))
    values = training_values(model, counted)
    if isinstance(model, VQModelFA):
        return TokenizerCodec(model, values)
    return TokenizerCodec(model, values, matching_step(model, values, RATES[task.variant.rate]))


@torch.no_grad()
def matching_step(model: ModelMixin, values: Tensor, bpp: float) -> float:
    """How coarsely latents are rounded so that validation crops take about so many bits per pixel."""
    crops = PHOTOGRAPHS_128.dataset("validation")
    images = torch.stack([crops[i]["image"] for i in range(min(32, len(crops)))])
    low, high = 0.02, 20.0  # times the std; coarser costs less
    for _ in range(10):
        middle = (low * high) ** 0.5
        _, sizes = TokenizerCodec(model, values, middle)(images)
        low, high = (middle, high) if 8 * np.mean(sizes) / images[0, 0].numel() > bpp else (low, middle)
    return (low * high) ** 0.5


def recipe(task: Task) -> TokenizerConfig:
    variant, third = task.variant, max(1, task.steps * 2 // 3)
    every = {"steps": task.steps, "log_every": max(1, task.steps // 50), "checkpoint_every": max(1, task.steps // 10)}
    weight = RATE_WEIGHTS[variant.rate]
    loss = {"rate": {"weight": weight, "weight_below": weight / 16}, "adversarial": {"weight": 4e-3}, **variant.loss}
    scaled = {name: {**section, "weight": section["weight"] * variant.factor} for name, section in loss.items()}
    scaled["rate"] |= {"target": RATES[variant.rate], "weight_below": weight / 16 * variant.factor}
    scaled["adversarial"] |= {"start_step": third, "adaptive": False, "channels": 32, "num_layers": 2}
    model = {**MODEL, "frequency_complement": "conv" if "spectrum" in loss else None}
    if variant.tokenizer is not None:
        model, scaled = variant.tokenizer, {"kl": 1e-6}
    sections = {
        "model": model,
        "data": {"path": str(PHOTOGRAPHS_128.file("train")), "label_column": "none"},
        "loss": {"reconstruction": "l2", **scaled},
        "train": {**TRAIN, **every, "mixed_precision": fastest_precision()},
    }
    return load_recipe(TokenizerConfig, task, sections)


@torch.no_grad()
def save_pictures(task: Task, codec: Codec) -> None:
    """NAME.png and original.png: a few crops in a row."""
    dataset = PHOTOGRAPHS_128.dataset("heldout")
    images = torch.stack([dataset[i % len(dataset)]["image"] for i in PICTURES])
    assert task.pictures is not None
    for name, pictures in ((task.name, codec(images)[0]), ("original", images)):
        save_strip(pictures, task.pictures / f"{name}.png")


def finish(report: dict, stem) -> None:
    """Adds what Pillow's formats make of the held-out crops at about the rates of the first model of each rate."""
    images = PHOTOGRAPHS_128.dataset("heldout")
    report["formats"] = []
    for rate in RATES:
        rows = [row for row in report["rows"] if row["model"].endswith(f"_{rate}")]
        for format in available_formats() if rows else []:
            report["formats"].append({"rate": rate, **measure_format(format, images, rows[0]["heldout"]["bpp"])})


def measure_format(format: str, images: ImageDataset, bpp: float) -> dict:
    quality = matching_quality(format, images, bpp)
    codec = PillowCodec(format, quality)
    _, metrics, spectrum = measure_codec(codec, images, [lite()], description=f"{format} {quality}")
    return {"format": format, "quality": quality, "spectrum": spectrum, **metrics}


COLUMNS = {"bpp": 3, "PSNR": 2, "SSIM": 4, "Recon": 5, "High": 5, "power kept": 3, f"rFD({FEATURES})": 1}


def tables(report: dict) -> str:
    rows, lines = rows_by_model(report), []
    for rate in RATES:
        for name in (name for name in rows if VARIANTS[name].rate == rate):
            cells = means([row["heldout"] for row in rows[name]], COLUMNS)
            lines.append([f"`{name}`", len(rows[name]), *cells, at_equal_bits(rows, name)])
        for entry in (entry for entry in report.get("formats", []) if entry["rate"] == rate):
            cells = [f"{entry[key]:.{digits}f}" for key, digits in COLUMNS.items()]
            lines.append([f"{entry['format']}, quality {entry['quality']}", "", *cells, ""])
    return format_table(["row", "seeds", *COLUMNS, "at the bits of `hific`: PSNR, High, FD"], lines)


def at_equal_bits(rows: dict[str, list[dict]], name: str) -> str:
    """PSNR, High and FD relative to those of `hific` at its bits, from the curve of a row's losses over the three
    rates; nothing if the curve does not reach so far."""
    losses, _, rate = name.rpartition("_")
    names = [f"{losses}_{each}" for each in RATES]
    reference = rows.get(f"hific_{rate}")
    if losses not in LOSSES or losses == "hific" or reference is None or any(each not in rows for each in names):
        return ""

    def mean(own: list[dict], key: str) -> float:
        return float(np.mean([row["heldout"][key] for row in own]))

    points = sorted((np.log(mean(rows[each], "bpp")), each) for each in names)
    wanted = np.log(mean(reference, "bpp"))
    if not points[0][0] <= wanted <= points[-1][0]:
        return ""
    found = [
        np.interp(wanted, [bits for bits, _ in points], [mean(rows[each], key) for _, each in points])
        for key in ("PSNR", "High", f"rFD({FEATURES})")
    ]
    own = [mean(reference, key) for key in ("PSNR", "High", f"rFD({FEATURES})")]
    return f"{found[0] - own[0]:+.2f} dB, {found[1] / own[1]:.2f}, {found[2] / own[2]:.2f}"


def figures(report: dict, stem) -> None:
    made = {row["model"] for row in report["rows"]}
    for rate in RATES:
        names = [f"{name}_{rate}" for name in (*LOSSES, "latents", "codes") if f"{name}_{rate}" in made]
        if names:
            save_strips(stem, names, stem.with_name(f"{stem.name}_{rate}.png"))
    save_kept_power(spectra(report), stem.with_name(f"{stem.name}_spectra.png"))


def spectra(report: dict) -> dict[str, dict[str, list[float]]]:
    """How much power is left at each frequency, by rate and by name; of the first seed of a row."""
    rows, found = rows_by_model(report), {}
    for rate, bpp in RATES.items():
        own = [(name.rpartition("_")[0], rows[name][0]) for name in rows if VARIANTS[name].rate == rate]
        own += [(entry["format"], entry) for entry in report.get("formats", []) if entry["rate"] == rate]
        found[f"about {bpp} bits per pixel"] = {name: row["spectrum"] for name, row in own if "spectrum" in row}
    return found


COMPARISON = Comparison(
    name="compression",
    prepare=lambda tasks: PHOTOGRAPHS_128.file("train"),
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    finish=finish,
    figures=figures,
    resolution=PHOTOGRAPHS_128.size,
    batch_size=TRAIN["batch_size"],
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
