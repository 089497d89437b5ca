#!/usr/bin/env python
"""What a generator makes of each tokenizer's latents: one LightningDiT, equal floats, equal steps.

    python benchmarks/generator_quality.py          (photographs at 64 px, 1,000 steps, 3 seeds: hours on a CPU)
    python benchmarks/generator_quality.py --models stock quality --seeds 0 --steps 400 --output quick.json

Each tokenizer is trained as in equal_budget.py (or taken from --runs, where a run of it is complete), its latents of
the training crops are cached, and a small LightningDiT is trained on them at a constant learning rate. Along the way
its averaged weights draw images without and with guidance, which are compared with the training crops. The tokenizer's
own reconstructions, and other crops of the same photographs, say what a perfect generator would get.
Writes docs/results/generator_quality.json, its figures, and the table of docs/results.md.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from equal_budget import EXPERIMENTS as ALL
from tokenizer_report import by_model, with_spread, write_section
from tokenizer_runs import BASE, ROOT, Experiment, environment, main
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.utils import save_image

from favae.autoencoders import reconstruct
from favae.data.images import ImageDataset, to_uint8
from favae.data.latents import open_latents, write_latent_cache
from favae.data.sources import PhotoSource, open_source
from favae.eval import references
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import CroppedImages, SampleFolder
from favae.eval.sampling import sample_to_folder
from favae.training.checkpoints import find_checkpoints
from favae.training.config import GeneratorConfig, load_config
from favae.training.models import find_model_class
from train_generator import build_pipeline
from train_generator import train as train_generator

OUTPUT = ROOT / "docs/results/generator_quality.json"
RECIPE = ROOT / "configs/generator/photos_lightningdit.yaml"
FEATURES = "efficientnet-lite0"
TOKENIZER_STEPS = 2_000
IMAGES = 144  # 16 of each class
INFERENCE_STEPS = 20
POINTS = (0.25, 0.5, 1.0)  # of the training at which images are drawn
GUIDANCE = {"unguided": 1.0, "guided": 1.5}
PATCH = 8  # pixels per latent
PICTURED = 2  # the seed whose samples are shown

EXPERIMENTS: dict[str, Experiment] = {name: ALL[name] for name in ("stock", "split", "quality", "overlapping")}


class Images(Dataset):
    """Images in memory, as the evaluators read them."""

    def __init__(self, images: Tensor):
        """(N, 3, H, W), uint8."""
        self.images, self.size = images, tuple(images.shape[-2:])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "index": index}


def crops(count: int | None = None) -> ImageDataset:
    """The first `count` training crops, or all that the generator sees."""
    source = open_source("photos") if count is None else PhotoSource("train", count)
    return ImageDataset(source, BASE["train"]["resolution"])


def seams(images: Tensor) -> float:
    """How much two neighbouring pixels differ across the borders of patches, in units of how much they do elsewhere.

    1 for images that know nothing of patches. (N, 3, H, W).
    """
    images = images.float()
    steps = [(images[..., 1:] - images[..., :-1]).abs().mean((0, 1, 2))]
    steps.append((images[..., 1:, :] - images[..., :-1, :]).abs().mean((0, 1, 3)))
    border = torch.arange(1, images.shape[-1]) % PATCH == 0
    return float(torch.stack([step[border].mean() / step[~border].mean() for step in steps]).mean())


def real_statistics(extractor: FeatureExtractor, folder: Path) -> ImageStatistics:
    """Of all training crops; computed once."""
    file = folder / "reference.safetensors"
    if not file.exists():
        own = folder / f"reference-{os.getpid()}.safetensors"  # another process may be at it too
        size = BASE["train"]["resolution"]
        found = references.Reference("photos", [extractor], PhotoSource).statistics((size, size))
        references.save_statistics(own, found, {"data": "photos:train", "resolution": size, "crop": "center"})
        own.rename(file)
    return references.load_statistics(str(file), [extractor])[1][0]


def measures(images: Dataset, extractor: FeatureExtractor, reference: ImageStatistics) -> dict[str, float]:
    (statistics,) = image_statistics(images, [extractor], logits=True)
    metrics = generation_metrics(statistics, reference)
    pixels = torch.stack([images[i]["image"] for i in range(len(images))])
    kept = ("FID", "IS", "precision", "recall")
    return {name.lower(): metrics[extractor.metric(name)] for name in kept} | {"seams": seams(pixels)}


def trained_tokenizer(name: str, experiment: Experiment, seed: int, folder: Path):
    """The tokenizer of a seed, trained first if it is not there."""
    output = folder / f"tokenizer-{name}-{seed}"
    if not (output / "final").exists():
        recipe = folder / f"tokenizer-{name}-{seed}.json"  # which is YAML too
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(json.dumps(experiment.recipe(TOKENIZER_STEPS)))
        # In a process of its own: one process has one mixed precision.
        command = [sys.executable, ROOT / "train_tokenizer.py", recipe, f"output={output}", f"seed={seed}"]
        subprocess.run(command, check=True)
    kind = find_model_class(experiment.model["name"])
    return kind.from_pretrained(output / "final").eval(), output / "final"


@torch.no_grad()
def run_row(name: str, experiment: Experiment, seed: int, steps: int, folder: Path, pictures: Path | None) -> dict:
    """One tokenizer, and the generator on its latents, of one seed."""
    with torch.enable_grad():
        tokenizer, path = trained_tokenizer(name, experiment, seed, folder)
    extractor = FeatureExtractor(FEATURES)
    reference = real_statistics(extractor, folder)
    some = Subset(crops(), range(IMAGES))
    originals = torch.stack([some[i]["image"] for i in range(len(some))])
    reconstructions = torch.cat([to_uint8(reconstruct(tokenizer, batch)) for batch in originals.split(32)])
    fresh = CroppedImages(crops(len(crops()) + IMAGES))
    others = torch.stack([fresh[i]["image"] for i in range(len(crops()), len(fresh))])

    latents, output = folder / f"latents-{name}-{seed}", folder / f"{name}-{seed}"
    write_latent_cache(tokenizer, crops(), latents, data_name="photos")
    changes = {
        "output": output,
        "seed": seed,
        "data.latents": latents,
        "data.tokenizer": path,
        "train.steps": steps,
        "train.lr_scheduler": "constant_with_warmup",
        "train.log_every": round(steps * POINTS[0]),
        "train.checkpoint_every": round(steps * POINTS[0]),
        "train.checkpoints_total_limit": "null",
        "train.sample_every": 0,
        "train.tracker": "null",
    }
    config = load_config(GeneratorConfig, RECIPE, [f"{key}={value}" for key, value in changes.items()])
    with torch.enable_grad():
        train_generator(config)

    curve = []
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["velocity"] for record in log}
    checkpoints = dict(find_checkpoints(output / "checkpoints"))
    for step in (round(steps * share) for share in POINTS):
        transformer = find_model_class(config.model["name"]).from_pretrained(checkpoints[step] / "ema").eval()
        pipeline = build_pipeline(config, transformer, tokenizer, open_latents(latents))
        point = {"steps": step, "velocity": losses[step]}
        for kind, scale in GUIDANCE.items():
            drawn = output / f"samples-{step}-{kind}"
            settings = {"guidance_scale": scale, "num_inference_steps": INFERENCE_STEPS}
            sample_to_folder(pipeline, drawn, IMAGES, seed=seed, **settings)
            point[kind] = measures(SampleFolder(drawn), extractor, reference)
        curve.append(point)
    if pictures is not None and seed == PICTURED:
        pictures.mkdir(parents=True, exist_ok=True)
        for kind in GUIDANCE:
            samples = SampleFolder(output / f"samples-{steps}-{kind}")
            grid = torch.stack([samples[i]["image"] for i in range(4 * len(crops().classes))])
            save_image(grid / 255, pictures / f"{name}-{kind}.png", nrow=len(crops().classes), padding=1)
    shutil.rmtree(output / "checkpoints")
    return {
        "model": name,
        "seed": seed,
        "steps": steps,
        **{key: value for key, value in curve[-1].items() if key != "steps"},
        "reconstructions": measures(Images(reconstructions), extractor, reference),
        "other_crops": measures(Images(others), extractor, reference),
        "features": extractor.name,
        "curve": curve,
        **environment(),
    }


def finish(report: dict, output: Path) -> None:
    text = table(report)
    print(text)
    save_curves(report, output.with_name(f"{output.stem}_curves.png"))
    if output == OUTPUT:
        save_grids(report, output)
        notes = "\n".join(f"- `{name}`: {experiment.note}" for name, experiment in EXPERIMENTS.items())
        write_section("generator_quality", f"{text}\n\n{notes}")


def table(report: dict) -> str:
    """Markdown; mean and standard deviation over seeds."""
    rows = by_model(report)
    columns = ["latents of", "seeds", "velocity loss", "FD, unguided", "FD, guided", "IS, guided"]
    columns += ["precision, recall, guided", "seams", "FD, reconstructions"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name in (name for name in EXPERIMENTS if name in rows):
        own = rows[name]

        def cell(kind: str, key: str, digits: int) -> str:
            return with_spread([row[kind][key] for row in own], digits)  # noqa: B023

        cells = [f"`{name}`", str(len(own)), with_spread([row["velocity"] for row in own], 3)]
        cells += [cell("unguided", "fid", 0), cell("guided", "fid", 0), cell("guided", "is", 2)]
        cells += [f"{cell('guided', 'precision', 2)}, {cell('guided', 'recall', 2)}", cell("guided", "seams", 2)]
        lines.append("| " + " | ".join([*cells, cell("reconstructions", "fid", 0)]) + " |")
    (real,) = {(round(row["other_crops"]["fid"]), round(row["other_crops"]["seams"], 2)) for row in report["rows"]}
    floor = f"Other crops of the same photographs, as many: FD {real[0]}, seams {real[1]}."
    return "\n".join([*lines, "", floor])


def save_curves(report: dict, file: Path) -> None:
    """FD over steps, without and with guidance, a line for each seed."""
    figure, axes = plt.subplots(1, len(GUIDANCE), figsize=(10, 4), sharey=True, constrained_layout=True)
    for axis, kind in zip(axes, GUIDANCE):
        for number, (name, rows) in enumerate(by_model(report).items()):
            for i, row in enumerate(rows):
                points = [(point["steps"], point[kind]["fid"]) for point in row["curve"]]
                axis.plot(*zip(*points), color=f"C{number}", marker=".", label=None if i else name, alpha=0.8)
        axis.set(title=f"{kind} (scale {GUIDANCE[kind]})", xlabel="steps")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"FD({FEATURES})")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def save_grids(report: dict, output: Path) -> None:
    """Samples of each model, one class per column."""
    folder = output.with_suffix("")
    names = [name for name in EXPERIMENTS if (folder / f"{name}-guided.png").exists()]
    size = {"figsize": (7 * len(GUIDANCE), 3.2 * len(names)), "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(len(names), len(GUIDANCE), **size)
    for row, name in zip(axes, names):
        for axis, kind in zip(row, GUIDANCE):
            axis.imshow(plt.imread(folder / f"{name}-{kind}.png"), interpolation="nearest")
            axis.set(title=f"{name}, {kind}", xticks=[], yticks=[])
    figure.savefig(output.with_name(f"{output.stem}_samples.png"), dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(__doc__, EXPERIMENTS, OUTPUT, finish, steps=1_000, seeds=3, run=run_row)
