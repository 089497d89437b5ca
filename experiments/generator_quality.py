#!/usr/bin/env python
"""What does a generator make of each tokenizer's latents? One LightningDiT, equal floats, equal steps.

    python -m experiments.generator_quality     (4 tokenizers, 1,000 steps of the generator, 3 seeds: hours on a CPU)
    python -m experiments.generator_quality --models stock quality --seeds 0 --steps 400 --output quick.json

Each tokenizer is trained as in experiments/equal_budget.py (or taken from the runs, where its run is complete), its
latents of the training crops are cached, and a small LightningDiT is trained on them at a constant learning rate.
Along the way the EMA weights generate images without and with guidance, which are compared with the training crops.
The controls are each tokenizer's own reconstructions, the best that a generator of its latents can hope for, and other
crops of the same photographs. Writes docs/results/generator_quality.json, .md and figures; the rows were trained by
this command with `--models stock overlapping`, and by earlier ones with the names of the other rows.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import ModelMixin
from torch.utils.data import Dataset, Subset
from torchvision.utils import save_image

from benchmarks.timing import ROOT, environment
from experiments import equal_budget
from experiments.image_sets import InMemoryImages, read_images, seams_of
from experiments.report import format_table, means, rows_by_model
from experiments.rows import Comparison, Task, main
from favae.autoencoders import reconstruct
from favae.data.images import ImageDataset, to_uint8
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import open_latents
from favae.data.photos import PhotoSource
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import CroppedImages, SampleFolder
from favae.eval.sampling import sample_to_folder
from favae.files import read_json_lines
from favae.training.checkpoints import find_checkpoints
from favae.training.config import load_config
from favae.training.generator_config import GeneratorConfig
from favae.training.models import find_model_class
from train_generator import build_pipeline
from train_generator import train as train_generator

RECIPE = ROOT / "configs/generator/photos_lightningdit.yaml"
FEATURES = "efficientnet-lite0"
TOKENIZER_STEPS = 2_000
NUM_IMAGES = 144  # 16 of each class
NUM_INFERENCE_STEPS = 20
POINTS = (0.25, 0.5, 1.0)  # of the training, at which images are generated
GUIDANCE_SCALES = {"unguided": 1.0, "guided": 1.5}
PATCH_SIZE = 8
PICTURED_SEED = 2

VARIANTS = {name: equal_budget.VARIANTS[name] for name in ("stock", "split", "quality", "overlapping")}


def make_row(task: Task) -> dict:
    """Trains one tokenizer, and the generator on its latents, with one seed; measures the generator along the way."""
    tokenizer, path = train_tokenizer(task)
    latents = task.runs / f"latents-{task.name}-{task.seed}"
    write_latent_cache(tokenizer, training_crops(task), latents, data_name="photos")
    config = generator_config(task, latents, path)
    train_generator(config)

    # Images of the EMA weights at some checkpoints, without and with guidance.
    extractor = FeatureExtractor(FEATURES)
    (reference,) = image_statistics(CroppedImages(training_crops(task)), [extractor])
    log = read_json_lines(task.run / "metrics.jsonl")
    losses = {record["step"]: record["velocity"] for record in log}
    checkpoints = dict(find_checkpoints(task.run / "checkpoints"))
    curve = []
    for step in (round(task.steps * share) for share in POINTS):
        transformer = find_model_class(config.model["name"]).from_pretrained(checkpoints[step] / "ema").eval()
        pipeline = build_pipeline(config, transformer, tokenizer, open_latents(latents))
        point = {"steps": step, "velocity": losses[step]}
        for name, scale in GUIDANCE_SCALES.items():
            folder = task.run / f"samples-{step}-{name}"
            options = {"guidance_scale": scale, "num_inference_steps": NUM_INFERENCE_STEPS}
            sample_to_folder(pipeline, folder, NUM_IMAGES, seed=task.seed, **options)
            point[name] = image_metrics(SampleFolder(folder), extractor, reference)
        curve.append(point)
    if task.pictures is not None and task.seed == PICTURED_SEED:
        save_pictures(task)

    controls = {"reconstructions": reconstructions(task, tokenizer), "other_crops": other_crops(task)}
    row = {
        "model": task.name,
        "seed": task.seed,
        "steps": task.steps,
        **{key: value for key, value in curve[-1].items() if key != "steps"},
        **{name: image_metrics(images, extractor, reference) for name, images in controls.items()},
        "features": extractor.name,
        "curve": curve,
        **environment(),
    }
    shutil.rmtree(task.run / "checkpoints")
    return row


def train_tokenizer(task: Task) -> tuple[ModelMixin, Path]:
    """The tokenizer of a row's seed and its folder; it is trained first if it is not there."""
    output = task.runs / f"tokenizer-{task.name}-{task.seed}"
    if not (output / "final").exists():
        recipe = output.with_suffix(".json")  # JSON is YAML too
        recipe.write_text(json.dumps(task.variant.recipe(TOKENIZER_STEPS, task.resolution, task.batch_size)))
        # In a process of its own, since one process has one mixed precision.
        command = [sys.executable, "train_tokenizer.py", recipe, f"output={output}", f"seed={task.seed}"]
        subprocess.run(command, check=True, cwd=ROOT)
    return find_model_class(task.variant.model["name"]).from_pretrained(output / "final").eval(), output / "final"


def generator_config(task: Task, latents: Path, tokenizer: Path) -> GeneratorConfig:
    """The recipe for the photographs at a constant learning rate, with a checkpoint at each point of the curve."""
    every = round(task.steps * POINTS[0])
    changes = {
        "output": task.run,
        "seed": task.seed,
        "data.latents": latents,
        "data.tokenizer": tokenizer,
        "train.steps": task.steps,
        "train.lr_scheduler": "constant_with_warmup",
        "train.log_every": every,
        "train.checkpoint_every": every,
        "train.checkpoints_total_limit": "null",
        "train.sample_every": 0,
        "train.tracker": "null",
    }
    return load_config(GeneratorConfig, RECIPE, [f"{key}={value}" for key, value in changes.items()])


def training_crops(task: Task) -> ImageDataset:
    """All crops that the generator is trained on."""
    return ImageDataset(open_source("photos"), task.resolution)


def other_crops(task: Task) -> Dataset:
    """As many crops of the training photographs as there are generated images, none of them trained on."""
    trained = len(training_crops(task))
    crops = CroppedImages(ImageDataset(PhotoSource("train", trained + NUM_IMAGES), task.resolution))
    return InMemoryImages(torch.stack([crops[i]["image"] for i in range(trained, len(crops))]))


@torch.no_grad()
def reconstructions(task: Task, tokenizer: ModelMixin) -> Dataset:
    """The tokenizer's reconstructions of as many training crops as there are generated images."""
    crops = Subset(training_crops(task), range(NUM_IMAGES))
    batches = torch.stack([crop["image"] for crop in crops]).split(32)
    return InMemoryImages(torch.cat([to_uint8(reconstruct(tokenizer, batch)) for batch in batches]))


def image_metrics(images: Dataset, extractor: FeatureExtractor, reference: ImageStatistics) -> dict[str, float]:
    (statistics,) = image_statistics(images, [extractor], logits=True)
    metrics = generation_metrics(statistics, reference)
    found = {name.lower(): metrics[extractor.metric(name)] for name in ("FID", "IS", "precision", "recall")}
    return found | {"seams": seams_of(read_images(images), PATCH_SIZE)}


def save_pictures(task: Task) -> None:
    """NAME-unguided.png and NAME-guided.png: four samples of each class, a class per column."""
    classes = len(training_crops(task).classes)
    task.pictures.mkdir(parents=True, exist_ok=True)
    for name in GUIDANCE_SCALES:
        samples = SampleFolder(task.run / f"samples-{task.steps}-{name}")
        grid = torch.stack([samples[i]["image"] for i in range(4 * classes)])
        save_image(grid / 255, task.pictures / f"{task.name}-{name}.png", nrow=classes, padding=1)


# ----------------------------------------------------------------------------------------------------------------------
# The report


def tables(report: dict) -> str:
    lines = []
    for name, own in rows_by_model(report).items():
        cells = means(own, {"velocity": 3}) + means([row["unguided"] for row in own], {"fid": 0})
        guided = [row["guided"] for row in own]
        cells += means(guided, {"fid": 0, "is": 2})
        cells += [", ".join(means(guided, {"precision": 2, "recall": 2})), *means(guided, {"seams": 2})]
        lines.append([f"`{name}`", len(own), *cells, *means([row["reconstructions"] for row in own], {"fid": 0})])
    columns = ["latents of", "seeds", "velocity loss", "FD, unguided", "FD, guided", "IS, guided"]
    columns += ["precision, recall, guided", "seams", "FD, reconstructions"]
    (real,) = {(round(row["other_crops"]["fid"]), round(row["other_crops"]["seams"], 2)) for row in report["rows"]}
    floor = f"As many other crops of the same photographs have FD {real[0]} and seams {real[1]}."
    return "\n\n".join([format_table(columns, lines), floor])


def figures(report: dict, stem: Path) -> None:
    save_curves(report, Path(f"{stem}_curves.png"))
    save_grids(stem, Path(f"{stem}_samples.png"))


def save_curves(report: dict, file: Path) -> None:
    """FD over steps, without and with guidance, a line for each seed."""
    figure, axes = plt.subplots(1, len(GUIDANCE_SCALES), figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, (name, scale) in zip(axes, GUIDANCE_SCALES.items()):
        for number, (model, rows) in enumerate(rows_by_model(report).items()):
            for i, row in enumerate(rows):
                points = [(point["steps"], point[name]["fid"]) for point in row["curve"]]
                axis.plot(*zip(*points), color=f"C{number}", marker=".", label=None if i else model, alpha=0.8)
        axis.set(title=f"{name} (scale {scale})", xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"FD({FEATURES})")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_grids(folder: Path, file: Path) -> None:
    """Samples of each model, one class per column, from the pictures that the rows left."""
    models = [name for name in VARIANTS if (folder / f"{name}-guided.png").exists()]
    if not models:
        return
    size = {"figsize": (7 * len(GUIDANCE_SCALES), 3.2 * len(models)), "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(len(models), len(GUIDANCE_SCALES), **size)
    for row, model in zip(axes, models):
        for axis, name in zip(row, GUIDANCE_SCALES):
            axis.imshow(plt.imread(folder / f"{model}-{name}.png"), interpolation="nearest")
            axis.set(title=f"{model}, {name}", xticks=[], yticks=[])
    figure.savefig(file, dpi=110)
    plt.close(figure)


COMPARISON = Comparison(
    name="generator_quality",
    variants=VARIANTS,
    make_row=make_row,
    tables=tables,
    steps=1_000,
    seeds=3,
    figures=figures,
    other_sizes=True,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
