"""Tokenizers as experiments train and measure them; on the built-in photographs, the rows of three of them.

Every row is trained by `train` of train_tokenizer.py, with an EMA of the weights and a constant learning rate, so that
each point of its curve is what a training of that many steps gives.
"""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from benchmarks.timing import device, environment, speedup, time_paired
from experiments.report import save_strip
from experiments.rows import Task, load_recipe
from favae.autoencoders import load_autoencoder, measure_budget, reconstruct
from favae.data.images import ImageDataset, skip_missing
from favae.data.sources import open_source
from favae.eval.extraction import image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.image_sets import CroppedImages
from favae.eval.reconstruction import PER_IMAGE, evaluate_reconstruction, image_errors
from favae.eval.spectra import radial_spectrum
from favae.files import read_json_lines
from favae.training.checkpoints import find_checkpoints
from favae.training.models import build_model, find_model_class
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import train

CURVE_POINTS = 4
OTHER_SPLITS = ("validation", "test")
NUM_PICTURES = 4  # held-out images in a strip
FEATURES = "efficientnet-lite0"
RECIPE = {
    "data": {"path": "photos"},
    "loss": {"reconstruction": "l2", "kl": 1e-6},
    "train": {
        "learning_rate": 2.5e-4,  # the best of 2.5e-4, 5e-4 and 1e-3 for the plain model, one seed
        "betas": [0.9, 0.99],
        "lr_warmup_steps": 100,
        "max_grad_norm": 1.0,
        "ema_decay": 0.995,
        "mixed_precision": "bf16",
        "num_workers": 0,
        "sample_every": 0,
        "checkpoints_total_limit": None,
        "tracker": None,
    },
}


@dataclass(frozen=True)
class Variant:
    """A row of a table of tokenizers.

    Attributes:
        model: the `model:` section of the recipe.
        note: what it is, a phrase for the list below the table.
        loss: what differs from `RECIPE["loss"]`.
        length: its number of steps, in multiples of the others'.
    """

    model: dict
    note: str
    loss: dict = field(default_factory=dict)
    length: float = 1.0

    def recipe(self, steps: int, resolution: int = 64, batch_size: int = 4) -> dict:
        """What train_tokenizer.py is given."""
        sizes = {"resolution": resolution, "batch_size": batch_size, "steps": steps}
        every = {"log_every": steps // CURVE_POINTS, "checkpoint_every": steps // CURVE_POINTS}
        return {
            "model": self.model,
            "data": RECIPE["data"],
            "loss": {**RECIPE["loss"], **self.loss},
            "train": {**RECIPE["train"], **sizes, **every},
        }

    def build(self) -> ModelMixin:
        return build_model(self.model)


def make_row(task: Task) -> dict:
    """Trains one tokenizer with one seed and measures it, along the way and at the end."""
    sections = task.variant.recipe(task.steps, task.resolution, task.batch_size)
    config = load_recipe(TokenizerConfig, task, sections)
    train(config)

    # Errors of the EMA weights at each checkpoint.
    images = {split: load_photos(split, task.resolution) for split in ("heldout", *OTHER_SPLITS)}
    curve = []
    for step, path in find_checkpoints(task.run / "checkpoints"):
        vae = find_model_class(config.model["name"]).from_pretrained(path / "ema").eval()
        others = {split: mean_errors(vae, images[split]) for split in OTHER_SPLITS}
        curve.append({"steps": step, **mean_errors(vae, images["heldout"]), **others})

    # What the row says of the last checkpoint: `vae` holds its weights.
    last = read_json_lines(task.run / "metrics.jsonl")[-1]
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, **curve[-1]}
    row |= {"seconds": last["seconds"], "curve": curve}
    row["training"] = {key: value for key, value in last.items() if key not in ("step", "seconds")}
    if task.pictures is not None:
        row |= frechet_distance(vae, task.resolution)
        row["error_spectrum"] = error_spectrum(vae, images["heldout"])
        if task.seed == 0:
            save_pictures(vae, images["heldout"], task.pictures, task.name)
    budget = asdict(measure_budget(vae, task.resolution))
    shutil.rmtree(task.run / "checkpoints")
    return row | {key: value for key, value in budget.items() if value is not None} | environment()


def load_photos(split: str, resolution: int) -> Tensor:
    """All crops of a split of the built-in photographs, (N, 3, H, W) in [-1, 1]."""
    dataset = ImageDataset(open_source("photos", split), resolution)
    return skip_missing([dataset[i] for i in range(len(dataset))])["image"]


@torch.no_grad()
def mean_errors(vae: ModelMixin, images: Tensor) -> dict[str, float]:
    """Means over images of what `image_errors` measures, by lower-case names."""
    batches = (batch.to(vae.device) for batch in images.split(32))
    return named_means(torch.cat([image_errors(batch, reconstruct(vae, batch)).cpu() for batch in batches]))


def load_trained(folder: Path) -> ModelMixin:
    """An autoencoder that a training has saved, on the GPU if there is one."""
    return load_autoencoder(str(folder)).to(device())


@torch.no_grad()
def reconstruct_all(vae: ModelMixin, images: Tensor) -> Tensor:
    """Reconstructions of many images, (N, C, H, W), on the CPU."""
    return torch.cat([reconstruct(vae, batch.to(vae.device)).cpu() for batch in images.split(256)])


def named_means(rows: Tensor) -> dict[str, float]:
    """Means of the rows of `image_errors`, by lower-case names, without those that are not measured."""
    means = zip(PER_IMAGE, rows.double().mean(dim=0).tolist())
    return {name.lower(): value for name, value in means if value == value}


def frechet_distance(vae: ModelMixin, resolution: int) -> dict:
    """The Fréchet distance between the held-out photographs and their reconstructions."""
    extractor = FeatureExtractor(FEATURES)
    images = ImageDataset(open_source("photos", "heldout"), resolution)
    reference = image_statistics(CroppedImages(images), [extractor])
    metrics = evaluate_reconstruction(vae, images, [extractor], reference).metrics
    return {"rfd": metrics[extractor.metric("rFID")], "rfd_features": extractor.name}


@torch.no_grad()
def error_spectrum(vae: ModelMixin, images: Tensor) -> list[float]:
    """The error's share of the images' power at 0, 1, ... H / 2 cycles per image."""
    errors = torch.cat([reconstruct(vae, batch) - batch for batch in images.split(32)])
    share = radial_spectrum(errors).mean(dim=0) / radial_spectrum(images).mean(dim=0)
    return [round(value, 5) for value in share.tolist()]


@torch.no_grad()
def save_pictures(vae: ModelMixin, images: Tensor, folder: Path, name: str) -> None:
    """Writes NAME.png and original.png: a few held-out images in a row."""
    chosen = images[[i * len(images) // NUM_PICTURES for i in range(NUM_PICTURES)]]
    save_strip(reconstruct(vae, chosen), folder / f"{name}.png")
    save_strip(chosen, folder / "original.png")


@torch.no_grad()
def compare_speed(variants: dict[str, Variant], reference: str, resolution: int) -> dict:
    """Speed of encoding and decoding 16 images with one thread, relative to one variant's."""
    torch.set_num_threads(1)
    images = torch.rand(16, 3, resolution, resolution) * 2 - 1
    models = {name: variant.build().eval() for name, variant in variants.items()}
    calls = {name: lambda vae=vae: reconstruct(vae, images) for name, vae in models.items()}
    timings = time_paired(calls, rounds=15)
    return {name: speedup(timing.seconds, timings[reference].seconds) for name, timing in timings.items()}
