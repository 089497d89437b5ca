#!/usr/bin/env python
"""Which latents can a generator learn? Tokenizers and generators of equal length, on glyphs and photographs.

    python scripts/glyphs.py --output glyphs
    python scripts/photographs.py --output photographs
    FAVAE_GLYPHS=glyphs FAVAE_PHOTOGRAPHS=photographs python -m experiments.latents --models stock ours --seeds 0

A row is a tokenizer, trained at a constant learning rate, and a small LightningDiT trained on its latents, both for as
long as all others; "plateau" says whether the error fell by less than 1 % over the last quarter. All tokenizers have
12 times fewer floats than images have color values, and those of one compression ratio about the same FLOPs, unless a
note says otherwise. Features, classes and accuracies of glyphs are those of experiments/glyphs.py; photographs have no
classes, and EfficientNet-Lite0's features. Latents of glyphs are aligned to that network, those of photographs to
another one, EfficientNet-Lite2 (the extra [experiments]). Settings were chosen on validation.parquet; what is reported
is measured on heldout.parquet, and the Fréchet distance of samples to the training set. Writes
docs/results/latents.json, .md and pictures.
"""

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image

from benchmarks.timing import device, environment
from experiments.controls import ControlAutoencoder
from experiments.image_sets import InMemoryImages, read_images, seams_of
from experiments.latents_report import GLOBAL, figures, tables
from experiments.precision import fastest_precision
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.tokenizers import load_trained, mean_errors, reconstruct_all
from experiments.training_sets import GLYPHS, PHOTOGRAPHS, PHOTOGRAPHS_128, TrainingSet, load_images
from favae.autoencoders import encode, measure_budget, spatial_compression_ratio
from favae.data.images import to_uint8
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import load_tokenizer, open_latents
from favae.eval.latent_evaluation import latent_metrics
from favae.files import read_json_lines, write_text
from favae.training.checkpoints import find_checkpoints
from favae.training.generator_config import GeneratorConfig
from favae.training.models import find_model_class
from favae.training.tokenizer_config import TokenizerConfig
from train_generator import build_pipeline, open_cache
from train_generator import train as train_generator
from train_tokenizer import train as train_tokenizer

STEPS = 6_000
POINTS = (0.25, 0.5, 0.75, 1.0)  # of both trainings, at which they are measured
UNGUIDED, GUIDED = {"unguided": 1.0}, {"guided": 2.0}  # guidance scales; with the second only at the end
NUM_INFERENCE_STEPS = 25
PLATEAU = 0.01  # of the error, over the last quarter
PICTURED = 6  # rows of samples in a picture
TOKENIZER = {
    "optimizer": "muon",
    "learning_rate": 3.0e-3,  # of 1e-3, 3e-3 and 8e-3 the best for `stock` on validation pictures
    "betas": [0.9, 0.99],
    "lr_warmup_steps": 100,
    "ema_decay": 0.999,
    "channels_last": True,
    "compile": True,
}
GENERATOR = {
    "optimizer": "muon",
    "learning_rate": 3.0e-3,  # of 1e-3, 3e-3 and 8e-3 the best after 600 steps, by its loss
    "lr_warmup_steps": 100,
    "ema_decay": 0.999,
    "compile": True,
}
BOTH = {
    "max_grad_norm": 1.0,
    "num_workers": 2 if torch.cuda.is_available() else 0,  # where reading pictures takes as long as a step
    "sample_every": 0,
    "checkpoints_total_limit": None,
    "tracker": None,
}
TRANSFORMER = {
    "name": "LightningDiTTransformer2DModel",
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
}


@dataclass(frozen=True)
class Variant:
    """A tokenizer, and what differs in the training of its generator.

    Attributes:
        note: what it is, a phrase for the list below the table.
        model: the `model:` section of the tokenizer's recipe. loss: what differs from the others.
        faded_share: of the tokenizer's steps in which its shortcut vanishes.
        smooth_share: of the generator's steps that learn latents of smooth images first.
        normalization: of the latents that the generator learns.
        images: what it is trained on.
        length: its number of steps, in multiples of the others'.
    """

    note: str
    model: dict
    loss: dict = field(default_factory=dict)
    faded_share: float = 0.0
    smooth_share: float = 0.0
    normalization: str = "per_channel"
    images: TrainingSet = GLYPHS
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
        **settings,
    }


def control(widths: list[int], channels: int, **settings) -> dict:
    name = f"{ControlAutoencoder.__module__}.{ControlAutoencoder.__name__}"
    return {"name": name, "block_out_channels": widths, "latent_channels": channels, **settings}


STOCK = stock([16, 32, 48, 96], 16)
ONE_TRUNK = control([16, 40, 64, 96], 16, wavelet=True)
STOCK_SHORTCUT = control([16, 32, 48, 96], 16, shortcut=True)
STOCK_OVERLAPPING = {**STOCK_SHORTCUT, "overlapping": True}
SPLIT = split([16, 40, 56, 96], [16, 24, 40], 16, 3)
OURS = {**SPLIT, "shortcut": "overlapping"}
BANDS = {"band": {"weight": 0.5, "weights": [0, 1, 1, 1]}}
PUBLISHED = {**SPLIT, "name": "TwoBranchAutoencoderKL", "high_latent_channels": 8}
PUBLISHED |= {"block_out_channels": [16, 24, 32, 72], "high_block_out_channels": [24, 32, 72]}
del PUBLISHED["shortcut"]


def ours(note: str, model: dict | None = None, *, faded: float = 0.0, smooth: float = 0.0, **loss) -> Variant:
    return Variant(f"`ours`, {note}", OURS | (model or {}), BANDS | loss, faded, smooth)


ALIGNMENT = {"weight": 0.5, "backbone": "efficientnet-lite0"}
WEAK_ALIGNMENT = {**ALIGNMENT, "weight": 0.2}
OTHER_ALIGNMENT = {"weight": 0.5, "backbone": "efficientnet-lite2"}  # FD of photographs compares lite0's features
VARIANTS = {
    "stock": Variant("a plain `AutoencoderKL`", STOCK),
    "stock_wide": Variant("the same, wider: 1.4 times the FLOPs", stock([24, 32, 56, 112], 16)),
    "stock_shortcut": Variant("the same as `stock`, with a linear shortcut", STOCK_SHORTCUT),
    "stock_overlapping": Variant("`stock_shortcut`, whose patches overlap", STOCK_OVERLAPPING),
    "one_trunk": Variant(
        "Haar bands in one trunk, in place of the first and last octave: pixel unshuffle and shuffle in another basis",
        ONE_TRUNK,
    ),
    "published": Variant("the published two branches", PUBLISHED),
    "split": Variant("two branches, without shortcut and band loss", SPLIT),
    "ours": Variant("split, shortcut, and the loss on the high bands", OURS, BANDS),
    "no_shortcut": ours("without the shortcut", {"shortcut": None}),
    "decoder_shortcut": ours("with the shortcut in the decoder alone", {"shortcut": "decoder"}),
    "faded_shortcut": ours("with a shortcut that vanishes in the first half", faded=0.5),
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
    "stock_half_aligned": Variant(
        "`stock` + alignment of eight of the 16 channels", STOCK, {"alignment": {**ALIGNMENT, "channels": 8}}
    ),
    "stock_shortcut_aligned": Variant("`stock_shortcut` + alignment", STOCK_SHORTCUT, {"alignment": ALIGNMENT}),
    "stock_overlapping_aligned": Variant(
        "`stock_overlapping` + alignment of less than half the weight", STOCK_OVERLAPPING, {"alignment": WEAK_ALIGNMENT}
    ),
    **{
        f"{name}{GLOBAL}": Variant(
            f"`{name}`, whose latents are all divided by one number for the generator",
            model,
            loss,
            normalization="global",
        )
        for name, model, loss in (
            ("stock_shortcut", STOCK_SHORTCUT, {}),
            ("stock_overlapping", STOCK_OVERLAPPING, {}),
            ("stock_shortcut_aligned", STOCK_SHORTCUT, {"alignment": ALIGNMENT}),
            ("stock_overlapping_aligned", STOCK_OVERLAPPING, {"alignment": WEAK_ALIGNMENT}),
        )
    },
    "split_aligned": Variant("`split` + alignment of the low channels", SPLIT, {"alignment": ALIGNMENT}),
    "stock_spectrum": Variant("`stock` + spectrum matching", STOCK, {"spectrum_matching": {"weight": 0.01}, "kl": 0.0}),
    "stock_mask": Variant("`stock` + as much weight again on errors where there is detail", STOCK, {"mask": 1.0}),
    "smooth_first": ours("whose generator learns smooth images first", smooth=0.2),
    "stock_f4": Variant("`stock` at f4", stock([16, 32, 96], 4)),
    "one_trunk_f4": Variant("`one_trunk` at f4", control([16, 48, 96], 4, wavelet=True)),
    "ours_f4": Variant("`ours` at f4", split([16, 40, 96], [24, 40], 4, 1, shortcut="overlapping"), BANDS),
    **{
        f"{prefix}_{name}": Variant(
            f"{note}, on photographs of {images.size} px", model, loss, images=images, length=1.25
        )
        for prefix, images in (("photographs", PHOTOGRAPHS), ("photographs128", PHOTOGRAPHS_128))
        for name, note, model, loss in (
            ("stock", "`stock`", STOCK, {}),
            ("one_trunk", "`one_trunk`", ONE_TRUNK, {}),
            ("split", "`split`", SPLIT, {}),
            ("stock_aligned", "`stock_aligned`", STOCK, {"alignment": OTHER_ALIGNMENT}),
            ("split_aligned", "`split_aligned`", SPLIT, {"alignment": OTHER_ALIGNMENT}),
            ("stock_mask", "`stock_mask`", STOCK, {"mask": 1.0}),
            ("ours", "`ours`", OURS, BANDS),
        )
    },
}


# ----------------------------------------------------------------------------------------------------------------------
# One row


def make_row(task: Task) -> dict:
    """Trains a tokenizer and the generator of its latents with one seed, and measures both along the way."""
    tokenizer = tokenizer_task(task)
    file = tokenizer.beside("-tokenizer.json")  # a row that was interrupted goes on after it
    with FileLock(tokenizer.beside("-tokenizer.lock")):
        if not file.exists():
            write_text(file, json.dumps(tokenizer_metrics(tokenizer)))
    AcceleratorState._reset_state()  # the generator may train in another precision
    row = json.loads(file.read_text()) | {"model": task.name}
    return row | {"generator": generator_metrics(task)} | environment()


def tokenizer_task(task: Task) -> Task:
    """The row whose tokenizer it is: the own, but for those of `GLOBAL`, which differ in their generators alone."""
    name = task.name.removesuffix(GLOBAL)
    return replace(task, name=name, variant=VARIANTS[name])


def tokenizer_metrics(task: Task) -> dict:
    train_tokenizer(tokenizer_config(task))
    own = task.variant.images
    images, labels = load_images(own, "heldout")
    images = images.float() / 127.5 - 1
    curve = error_curve(task, images)
    vae = load_trained(task.run / "final")
    budget = measure_budget(vae, own.size)
    reconstructions = to_uint8(reconstruct_all(vae, images))
    factor = spatial_compression_ratio(vae)
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, "data": str(own), "f": factor}
    row |= {
        "mixed_precision": fastest_precision(),
        "gflop": budget.flops / 1e9,
        "params": budget.params,
        "floats_per_image": budget.floats_per_image,
    }
    row |= {key: value for key, value in curve[-1].items() if key != "steps"}
    row |= {"plateau": on_plateau([point["recon"] for point in curve]), "curve": curve}
    row["latents"] = measure_latents(vae, images, labels)
    row["seams"] = seams_of(reconstructions, factor) / seams_of(to_uint8(images), factor)
    row["reconstructions"] = own.metrics(InMemoryImages(reconstructions), labels)
    shutil.rmtree(task.run / "checkpoints")
    return row


def error_curve(task: Task, images: Tensor) -> list[dict]:
    """Errors of the EMA weights of a tokenizer at each point of its training."""
    return [
        {"steps": step, **mean_errors(load_trained(path / "ema"), images)}
        for step, path in points(task.run, task.steps)
    ]


def points(run: Path, steps: int) -> list[tuple[int, Path]]:
    """The checkpoints at which a training is measured; one that was interrupted has left others as well."""
    wanted = {round(steps * share) for share in POINTS}
    return [(step, path) for step, path in find_checkpoints(run / "checkpoints") if step in wanted]


def tokenizer_config(task: Task) -> TokenizerConfig:
    images = task.variant.images
    own = {"resolution": images.size, "batch_size": images.batch_sizes[0], "mixed_precision": fastest_precision()}
    train = {**TOKENIZER, **BOTH, **own, **steps_of(task)}
    if task.variant.faded_share:
        train["fade_shortcut_steps"] = round(task.variant.faded_share * task.steps)
    data = {"path": str(images.file("train")), "label_column": images.label_column, "flip": False}
    sections = {
        "model": task.variant.model,
        "data": data,
        "loss": {"reconstruction": "l2", "kl": 1e-6, **task.variant.loss},
        "train": train,
    }
    return load_recipe(TokenizerConfig, task, sections)


def steps_of(task: Task) -> dict:
    return {"steps": task.steps, "log_every": task.steps // 20, "checkpoint_every": task.steps // len(POINTS)}


@torch.no_grad()
def measure_latents(vae, images: Tensor, labels: Tensor) -> dict[str, float | None]:
    batches = images.split(256)
    return latent_metrics(torch.cat([encode(vae, batch.to(vae.device)).float().cpu() for batch in batches]), labels)[0]


def on_plateau(errors: list[float]) -> bool:
    """Whether the last quarter of a training brought less than a hundredth."""
    return errors[-1] > (1 - PLATEAU) * errors[-2]


# ----------------------------------------------------------------------------------------------------------------------
# Its generator


def generator_metrics(task: Task) -> dict:
    run = task.beside("-generator")
    tokenizer = load_tokenizer(str(tokenizer_task(task).run / "final"))
    images = task.variant.images
    latents = write_cache(tokenizer, images, run.with_name(f"{run.name}-latents"))
    smooth = None
    if task.variant.smooth_share:
        smooth = write_cache(tokenizer, images, run.with_name(f"{run.name}-smooth"), low_pass=0.2)
    config = generator_config(task, run, latents, smooth)
    train_generator(config)

    factor = spatial_compression_ratio(tokenizer)
    real = seams_of(load_images(images, "train")[0][:5000], factor)
    curve = []
    for step, path in points(run, task.steps):
        transformer = find_model_class(TRANSFORMER["name"]).from_pretrained(path / "ema").eval()
        pipeline = build_pipeline(config, transformer, tokenizer, open_cache(config)).to(device())
        point, scales = {"steps": step}, dict(UNGUIDED)
        if images.num_classes > 1 and step == task.steps:
            scales |= GUIDED
        for name, scale in scales.items():
            folder = run / f"samples-{step}-{name}"
            options = {"guidance_scale": scale, "num_inference_steps": NUM_INFERENCE_STEPS}
            samples, point[name] = images.sample(pipeline, folder, task.seed, **options)
            point[name]["seams"] = seams_of(read_images(samples), factor) / real
            if task.pictures is not None and task.seed == 0 and step == task.steps:
                save_pictures(task, samples)  # guided, if there are classes
        curve.append(point)
    for leftover in (run / "checkpoints", latents, *([smooth] if smooth else [])):
        shutil.rmtree(leftover)
    log = read_json_lines(run / "metrics.jsonl")
    last = {key: value for key, value in curve[-1].items() if key != "steps"}
    distances = [point["unguided"]["fd"] for point in curve]
    return {**last, "velocity": log[-1]["velocity"], "plateau": on_plateau(distances), "curve": curve}


def trained_generator(task: Task, name: str, seed: int) -> Path:
    """The run folder of the generator of a row of this experiment, which is made if it is not beside `task.runs`."""
    runs = task.runs.with_name(COMPARISON.name)
    runs.mkdir(parents=True, exist_ok=True)
    own = replace(task, name=name, variant=VARIANTS[name], seed=seed, runs=runs, pictures=None)
    with FileLock(own.beside(".lock")):
        if not (own.beside("-generator") / "final").exists():
            make_row(own)
    return own.beside("-generator")


def write_cache(tokenizer, images: TrainingSet, folder: Path, low_pass: float | None = None) -> Path:
    dataset = images.dataset("train")
    write_latent_cache(tokenizer, dataset, folder, data_name=images.name, low_pass=low_pass, batch_size=256)
    return folder


def generator_config(task: Task, run, latents, smooth) -> GeneratorConfig:
    shape = open_latents(latents).latent_shape
    images = task.variant.images
    data = {"latents": str(latents), "tokenizer": str(tokenizer_task(task).run / "final"), "flip": False}
    data["normalization"] = task.variant.normalization
    if smooth is not None:
        data |= {"warmup_latents": str(smooth), "warmup_steps": round(task.variant.smooth_share * task.steps)}
    own = {"num_classes": images.num_classes, "in_channels": shape[0], "sample_size": shape[1]}
    sections = {
        "model": TRANSFORMER | own,
        "data": data,
        "train": {**GENERATOR, **BOTH, "batch_size": images.batch_sizes[1], **steps_of(task)},
    }
    return load_recipe(GeneratorConfig, task, sections, run)


def save_pictures(task: Task, samples: Dataset) -> None:
    """NAME.png: a few rows of samples, each class in a column of its own."""
    task.pictures.mkdir(parents=True, exist_ok=True)
    columns = task.variant.images.num_classes if task.variant.images.num_classes > 1 else 12
    grid = torch.stack([samples[i]["image"] for i in range(min(PICTURED * columns, len(samples)))])
    save_image(grid / 255, task.pictures / f"{task.name}.png", nrow=columns, padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def finish(report: dict, stem) -> None:
    """Adds what as many glyphs as samples reach that nobody has seen: no generator can be expected to be closer.

    Of photographs, those that nobody has seen show other things, and are no such floor.
    """
    report["real"] = {}
    if any(row["data"] == str(GLYPHS) for row in report["rows"]):
        images, labels = load_images(GLYPHS, "heldout")
        chosen = torch.linspace(0, len(images) - 1, GLYPHS.samples).long()
        report["real"][str(GLYPHS)] = GLYPHS.metrics(InMemoryImages(images[chosen]), labels[chosen])


COMPARISON = Comparison(
    name="latents",
    variants=VARIANTS,
    prepare=lambda tasks: [task.variant.images.file("train") for task in tasks],
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=1,
    finish=finish,
    figures=figures,
    resolution=GLYPHS.size,
    batch_size=GLYPHS.batch_sizes[0],
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
