#!/usr/bin/env python
"""Which latents can a generator learn? Tokenizers and generators that converge, on glyphs.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.latents --models stock ours --seeds 0

A row is a tokenizer, trained at a constant learning rate, and a small LightningDiT trained on its latents, both for as
long as all others; "plateau" says whether the error fell by less than 1 % over the last quarter. All tokenizers of one
compression ratio have 256 floats per image, 12 times fewer than pixels, and about the same FLOPs, unless a note says
otherwise. Features, classes and accuracies are those of experiments/glyphs.py. Settings were chosen on
validation.parquet; what is reported is measured on heldout.parquet, and the Fréchet distance of samples to the training
set. Writes docs/results/latents.json, .md and pictures.
"""

import json
import shutil
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import yaml
from scipy.stats import spearmanr
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

from benchmarks.timing import environment
from experiments.glyphs import CHARACTERS, GlyphExtractor, accuracies, glyphs_folder, load_glyphs, trained_classifier
from experiments.image_sets import InMemoryImages, read_images, seams_of
from experiments.precision import fastest_precision
from experiments.report import format_table, rows_by_model, with_std
from experiments.rows import Comparison, Task, main
from experiments.tokenizers import mean_errors
from favae.autoencoders import encode, load_autoencoder, measure_budget, reconstruct
from favae.data.images import ImageDataset, to_uint8
from favae.data.latents import load_tokenizer, open_latents, write_latent_cache
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import SampleFolder
from favae.eval.latent_evaluation import latent_metrics
from favae.eval.sampling import sample_to_folder
from favae.files import write_text
from favae.training.checkpoints import find_checkpoints
from favae.training.config import GeneratorConfig, TokenizerConfig, load_config
from favae.training.models import find_model_class
from train_generator import build_pipeline
from train_generator import train as train_generator
from train_tokenizer import train as train_tokenizer

STEPS = 8_000
SIZE = 32
POINTS = (0.25, 0.5, 0.75, 1.0)  # of both trainings, at which they are measured
GUIDANCE_SCALES = {"unguided": 1.0, "guided": 2.0}
SAMPLES_PER_CLASS = 40
NUM_INFERENCE_STEPS = 25
PLATEAU = 0.01  # of the error, over the last quarter
PICTURED = 12  # samples of a class in a picture
TOKENIZER = {
    "batch_size": 32,
    "resolution": SIZE,
    "optimizer": "muon",
    "learning_rate": 1.0e-3,
    "betas": [0.9, 0.99],
    "lr_warmup_steps": 100,
    "ema_decay": 0.999,
    "channels_last": True,
}
GENERATOR = {
    "batch_size": 64,
    "optimizer": "muon",
    "learning_rate": 1.0e-3,
    "lr_warmup_steps": 100,
    "ema_decay": 0.999,
}
BOTH = {"max_grad_norm": 1.0, "num_workers": 0, "sample_every": 0, "checkpoints_total_limit": None, "tracker": None}
TRANSFORMER = {
    "name": "LightningDiTTransformer2DModel",
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_classes": len(CHARACTERS),
}


@dataclass(frozen=True)
class Variant:
    """A tokenizer, and what differs in the training of its generator.

    Attributes:
        note: what it is, a phrase for the list below the table.
        model: the `model:` section of the tokenizer's recipe. loss, train: what differs from the others.
        smooth_share: of the generator's steps that learn latents of smooth images first.
        length: its number of steps, in multiples of the others'.
    """

    note: str
    model: dict
    loss: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    smooth_share: float = 0.0
    length: float = 1.0


def stock(widths: list[int], channels: int) -> dict:
    return {
        "name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * (len(widths) - 1) + ["AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * (len(widths) - 1),
        "block_out_channels": widths,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": channels,
        "sample_size": SIZE,
    }


def split(widths: list[int], high: list[int], channels: int, high_channels: int, **settings) -> dict:
    return {
        "name": "AutoencoderKLFA",
        "block_out_channels": widths,
        "high_block_out_channels": high,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": channels,
        "high_latent_channels": high_channels,
        "shortcut": None,
        "sample_size": SIZE,
        **settings,
    }


def control(widths: list[int], channels: int, **settings) -> dict:
    name = "experiments.controls.ControlAutoencoder"
    return {"name": name, "block_out_channels": widths, "latent_channels": channels, **settings}


STOCK = stock([16, 32, 48, 96], 16)
SPLIT = split([16, 40, 56, 96], [16, 24, 40], 16, 3)
OURS = {**SPLIT, "shortcut": "overlapping"}
BANDS = {"band": {"weight": 0.5, "weights": [0, 1, 1, 1]}}
PUBLISHED = {**SPLIT, "name": "TwoBranchAutoencoderKL", "high_latent_channels": 8}
PUBLISHED |= {"block_out_channels": [16, 24, 32, 72], "high_block_out_channels": [24, 32, 72]}
del PUBLISHED["shortcut"]


def ours(note: str, model: dict | None = None, *, train: dict | None = None, smooth: float = 0.0, **loss) -> Variant:
    return Variant(f"`ours`, {note}", OURS | (model or {}), BANDS | loss, train or {}, smooth)


ALIGNMENT = {"weight": 0.5, "backbone": "efficientnet-lite0"}
VARIANTS = {
    "stock": Variant("a plain `AutoencoderKL`", STOCK),
    "stock_wide": Variant("the same, wider: 1.4 times the FLOPs", stock([24, 32, 56, 112], 16)),
    "stock_shortcut": Variant(
        "the same as `stock`, with a linear shortcut", control([16, 32, 48, 96], 16, shortcut=True)
    ),
    "one_trunk": Variant(
        "Haar bands in one trunk, in place of the first and last octave: pixel unshuffle and shuffle in another basis",
        control([16, 40, 64, 96], 16, wavelet=True),
    ),
    "published": Variant("the published two branches", PUBLISHED),
    "split": Variant("two branches, without shortcut and band loss", SPLIT),
    "ours": Variant("split, shortcut, and the loss on the high bands: the recipes' default", OURS, BANDS),
    "no_shortcut": ours("without the shortcut", {"shortcut": None}),
    "decoder_shortcut": ours("with the shortcut in the decoder alone", {"shortcut": "decoder"}),
    "faded_shortcut": ours(
        "with a shortcut that vanishes in the first half", train={"fade_shortcut_steps": STEPS // 2}
    ),
    "spectrum": ours("+ spectrum matching", spectrum_matching={"weight": 0.01}, kl=0.0),
    "masking": ours("+ frequency masking", frequency_masking={"probability": 0.75, "latent_block": 4}),
    "prefix": ours("+ prefixes of the channels", prefix={"probability": 0.5, "widths": [4, 8, 12]}),
    "sphere": ours("on a sphere, with noise", {"latent_norm": "rms"}, kl=0.0, latent_noise=0.25),
    "high_noise": ours(
        "+ noise and dropout of the high channels", high_dropout=0.4, high_dropout_target="image", high_noise=0.8
    ),
    "equivariance": ours("+ equivariance", equivariance=0.5),
    "scale_equivariance": ours("+ scale equivariance", scale_equivariance=0.25),
    "noise": ours("+ noise", latent_noise=0.25),
    "kl": ours("with a hundred times the KL weight", kl=1e-4),
    "aligned": ours("+ alignment of the low channels", alignment=ALIGNMENT),
    "aligned_all": ours("+ alignment of all channels", alignment={**ALIGNMENT, "channels": "all"}),
    "aligned_principal": ours(
        "+ all channels aligned to principal components",
        alignment={**ALIGNMENT, "channels": "all", "target": "principal"},
    ),
    "stock_aligned": Variant("`stock` + alignment", STOCK, {"alignment": ALIGNMENT}),
    "stock_spectrum": Variant("`stock` + spectrum matching", STOCK, {"spectrum_matching": {"weight": 0.01}, "kl": 0.0}),
    "smooth_first": ours("whose generator learns smooth images first", smooth=0.2),
    "stock_f4": Variant("`stock` at f4", stock([16, 32, 96], 4)),
    "one_trunk_f4": Variant("`one_trunk` at f4", control([16, 48, 96], 4, wavelet=True)),
    "ours_f4": Variant("`ours` at f4", split([16, 40, 96], [24, 40], 4, 1, shortcut="overlapping"), BANDS),
}


# ----------------------------------------------------------------------------------------------------------------------
# One row


def make_row(task: Task) -> dict:
    """Trains a tokenizer and the generator of its latents with one seed, and measures both along the way."""
    file = task.run.with_name(f"{task.run.name}-tokenizer.json")  # a row that was interrupted goes on after it
    if not file.exists():
        write_text(file, json.dumps(tokenizer_metrics(task)))
    return json.loads(file.read_text()) | {"generator": generator_metrics(task)} | environment()


def tokenizer_metrics(task: Task) -> dict:
    train_tokenizer(tokenizer_config(task))
    images, attributes = load_glyphs("heldout")
    images = images.float() / 127.5 - 1
    curve = error_curve(task, images)
    vae = load_autoencoder(str(task.run / "final"))
    budget = measure_budget(vae, SIZE)
    reconstructions = torch.cat([to_uint8(reconstruct(vae, batch)) for batch in images.split(256)])
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": "glyphs", "f": patch_size(vae)}
    row |= {"gflop": budget.flops / 1e9, "params": budget.params, "floats_per_image": budget.floats_per_image}
    row |= {key: value for key, value in curve[-1].items() if key != "steps"}
    row |= {"plateau": on_plateau([point["recon"] for point in curve]), "curve": curve}
    row["latents"] = measure_latents(vae, images, attributes["label"])
    row["seams"] = seams_of(reconstructions, patch_size(vae)) / seams_of(to_uint8(images), patch_size(vae))
    row["reconstructions"] = image_metrics(InMemoryImages(reconstructions), attributes["label"])
    shutil.rmtree(task.run / "checkpoints")
    return row


def error_curve(task: Task, images: Tensor) -> list[dict]:
    """Errors of the EMA weights of a tokenizer at each point of its training."""
    return [
        {"steps": step, **mean_errors(load_autoencoder(str(path / "ema")), images)}
        for step, path in points(task.run, task.steps)
    ]


def points(run: Path, steps: int) -> list[tuple[int, Path]]:
    """The checkpoints at which a training is measured; one that was interrupted has left others as well."""
    wanted = {round(steps * share) for share in POINTS}
    return [(step, path) for step, path in find_checkpoints(run / "checkpoints") if step in wanted]


def tokenizer_config(task: Task) -> TokenizerConfig:
    every = {"log_every": task.steps // 20, "checkpoint_every": task.steps // len(POINTS)}
    train = {**TOKENIZER, **BOTH, **every, "steps": task.steps, "mixed_precision": fastest_precision()}
    sections = {
        "model": task.variant.model,
        "data": {"path": str(glyphs_folder() / "train.parquet"), "flip": False},
        "loss": {"reconstruction": "l2", "kl": 1e-6, **task.variant.loss},
        "train": train | task.variant.train,
    }
    return load(TokenizerConfig, task, sections, task.run)


def load(schema, task: Task, sections: dict, output: Path) -> TokenizerConfig | GeneratorConfig:
    """Settings of a training with a row's seed, from the sections of a recipe that is left beside its run folder."""
    recipe = output.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(sections, sort_keys=False))
    return load_config(schema, recipe, [f"output={output}", f"seed={task.seed}"])


@torch.no_grad()
def measure_latents(vae, images: Tensor, labels: Tensor) -> dict[str, float | None]:
    return latent_metrics(torch.cat([encode(vae, batch).float() for batch in images.split(256)]), labels)[0]


def patch_size(vae) -> int:
    return SIZE // encode(vae, torch.zeros(1, 3, SIZE, SIZE)).shape[-1]


def on_plateau(errors: list[float]) -> bool:
    """Whether the last quarter of a training brought less than a hundredth."""
    return errors[-1] > (1 - PLATEAU) * errors[-2]


# ----------------------------------------------------------------------------------------------------------------------
# Its generator


def generator_metrics(task: Task) -> dict:
    run = task.run.with_name(f"{task.name}-{task.seed}-generator")
    tokenizer = load_tokenizer(str(task.run / "final"))
    dataset = ImageDataset(open_source(str(glyphs_folder() / "train.parquet")), SIZE)
    latents = write_cache(tokenizer, dataset, run.with_name(f"{run.name}-latents"))
    smooth = None
    if task.variant.smooth_share:
        smooth = write_cache(tokenizer, dataset, run.with_name(f"{run.name}-smooth"), low_pass=0.2)
    config = generator_config(task, run, latents, smooth)
    train_generator(config)

    curve = []
    for step, path in points(run, task.steps):
        transformer = find_model_class(TRANSFORMER["name"]).from_pretrained(path / "ema").eval()
        pipeline = build_pipeline(config, transformer, tokenizer, open_latents(latents))
        point = {"steps": step}
        for name, scale in GUIDANCE_SCALES.items():
            folder = run / f"samples-{step}-{name}"
            options = {"guidance_scale": scale, "num_inference_steps": NUM_INFERENCE_STEPS, "batch_size": 188}
            sample_to_folder(pipeline, folder, SAMPLES_PER_CLASS * len(CHARACTERS), seed=task.seed, **options)
            samples = SampleFolder(folder)
            labels = torch.arange(len(samples)) % len(CHARACTERS)
            point[name] = image_metrics(samples, labels)
            real = to_uint8(load_glyphs("train")[0][:5000].float() / 127.5 - 1)
            point[name]["seams"] = seams_of(read_images(samples), patch_size(tokenizer)) / seams_of(
                real, patch_size(tokenizer)
            )
            if task.pictures is not None and task.seed == 0 and step == config.train.steps:
                save_pictures(task, samples, name)
        curve.append(point)
    for leftover in (run / "checkpoints", latents, *([smooth] if smooth else [])):
        shutil.rmtree(leftover)
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for key, value in curve[-1].items() if key != "steps"}
    distances = [point["unguided"]["fd"] for point in curve]
    return {**last, "velocity": log[-1]["velocity"], "plateau": on_plateau(distances), "curve": curve}


def write_cache(tokenizer, dataset: ImageDataset, folder, low_pass: float | None = None):
    write_latent_cache(tokenizer, dataset, folder, data_name="glyphs", low_pass=low_pass, batch_size=256)
    return folder


def generator_config(task: Task, run, latents, smooth) -> GeneratorConfig:
    shape = open_latents(latents).latent_shape
    every = {"log_every": task.steps // 20, "checkpoint_every": task.steps // len(POINTS)}
    data = {"latents": str(latents), "tokenizer": str(task.run / "final"), "flip": False}
    if smooth is not None:
        data |= {"warmup_latents": str(smooth), "warmup_steps": round(task.variant.smooth_share * task.steps)}
    sections = {
        "model": {**TRANSFORMER, "in_channels": shape[0], "sample_size": shape[1]},
        "data": data,
        "train": {**GENERATOR, **BOTH, **every, "steps": task.steps, "mixed_precision": fastest_precision()},
    }
    return load(GeneratorConfig, task, sections, run)


@cache
def reference() -> ImageStatistics:
    """Statistics of the training pictures."""
    return image_statistics(InMemoryImages(load_glyphs("train")[0]), [GlyphExtractor()], keep=10_000, batch_size=256)[0]


def image_metrics(images: Dataset, labels: Tensor) -> dict[str, float]:
    """FD to the training pictures, IS, precision and recall, and how often the character is what it should be."""
    extractor = GlyphExtractor()
    (statistics,) = image_statistics(images, [extractor], logits=True, batch_size=256)
    metrics = generation_metrics(statistics, reference())
    found = {name.lower(): metrics[extractor.metric(name)] for name in ("FID", "IS", "precision", "recall", "MIND")}
    found["fd"] = found.pop("fid")
    return found | {"accuracy": accuracies(trained_classifier(), read_images(images), {"label": labels})["label"]}


def save_pictures(task: Task, samples: Dataset, name: str) -> None:
    """NAME-unguided.png and NAME-guided.png: a dozen samples of each character, a character per column."""
    task.pictures.mkdir(parents=True, exist_ok=True)
    grid = torch.stack([samples[i]["image"] for i in range(PICTURED * len(CHARACTERS))])
    save_image(grid / 255, task.pictures / f"{task.name}-{name}.png", nrow=len(CHARACTERS), padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def finish(report: dict, stem) -> None:
    """Adds what real pictures of other families reach: no generator can be expected to be closer."""
    images, attributes = load_glyphs("heldout")
    report["real"] = image_metrics(InMemoryImages(images), attributes["label"])


def tables(report: dict) -> str:
    rows = rows_by_model(report)
    columns = ["tokenizer", "seeds", "f", "GFLOP", "Recon", "High", "PSNR", "VIV", "SEC 1/4", "LNC", "seams"]
    columns += ["FD of samples", "guided", "IS", "accuracy", "precision, recall", "seams of samples", "plateaus"]
    lines = []
    for name in (name for name in VARIANTS if name in rows):
        own = rows[name]

        def mean(*keys: str, digits: int, own: list[dict] = own) -> str:
            values = own
            for key in keys:
                values = [value[key] for value in values]
            return "" if None in values else with_std(values, digits)

        plateaus = [sum(row["plateau"] for row in own), sum(row["generator"]["plateau"] for row in own)]
        lines.append(
            [
                f"`{name}`",
                len(own),
                own[0]["f"],
                f"{own[0]['gflop']:.2f}",
                mean("recon", digits=5),
                mean("high", digits=5),
                mean("psnr", digits=2),
                mean("latents", "VIV", digits=3),
                mean("latents", "SEC 1/4", digits=3),
                mean("latents", "LNC", digits=3),
                mean("seams", digits=3),
                mean("generator", "unguided", "fd", digits=2),
                mean("generator", "guided", "fd", digits=2),
                mean("generator", "guided", "is", digits=1),
                mean("generator", "unguided", "accuracy", digits=3),
                ", ".join(mean("generator", "unguided", key, digits=2) for key in ("precision", "recall")),
                mean("generator", "unguided", "seams", digits=3),
                f"{plateaus[0]}, {plateaus[1]}",
            ]
        )
    real = report["real"]
    floor = (
        f"Real pictures of other families have FD {real['fd']:.2f}, IS {real['is']:.1f} and an accuracy of "
        f"{real['accuracy']:.3f}."
    )
    return "\n\n".join([format_table(columns, lines), floor, correlations(report)])


def correlations(report: dict) -> str:
    """Spearman's rank correlation of each meter with the FD of samples, over the rows of one compression ratio."""
    rows = [row for row in report["rows"] if row["f"] == 8]
    if len(rows) < 4:
        return ""
    distances = [row["generator"]["unguided"]["fd"] for row in rows]
    meters = {name: [row["latents"][name] for row in rows] for name in ("VIV", "rho", "phi", "SEC 1/4", "LNC")}
    meters |= {
        "Recon": [row["recon"] for row in rows],
        "FD of reconstructions": [r["reconstructions"]["fd"] for r in rows],
    }
    found = [f"{name} {spearmanr(values, distances).statistic:+.2f}" for name, values in meters.items()]
    return f"Rank correlation with the FD of samples, {len(rows)} rows at f8: {', '.join(found)}."


COMPARISON = Comparison(
    name="latents",
    variants=VARIANTS,
    prepare=trained_classifier,
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=1,
    finish=finish,
    resolution=SIZE,
    batch_size=32,
    other_sizes=False,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
