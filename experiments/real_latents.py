"""Decoders for a real latent space, FLUX.2's: TAEF2's own, fine-tuned, and smaller ones that end in a wavelet.

    python scripts/photographs.py --output photographs
    FAVAE_TAEF2=FOLDER FAVAE_PHOTOGRAPHS=photographs python -m experiments.real_latents

FOLDER has TAEF2's `encoder.safetensors` and `decoder.safetensors` (madebyollin/taesd, MIT). Its encoder gives the
latents, and stays as it is. Every decoder is trained by train_tokenizer.py with the same loss and number of steps, but
for rows that say so, at a rate that was chosen for its kind on the validation crops in short trials; crops of pictures
that are in no training set are decoded and compared. Rows say how many crops there were to learn from, since
scripts/photographs.py got more after the first ones. The controls: the same network with a pixel shuffle in place of
the inverse wavelet transform, and TAEF2's architecture, narrower, at the same FLOPs.
"""

import json
import os
import statistics
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from filelock import FileLock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import environment, speedup, time_paired
from experiments.image_sets import InMemoryImages, seams_of
from experiments.precision import fastest_precision
from experiments.report import format_table, means, rows_by_model, save_strip, save_strips
from experiments.rows import Comparison, Task, load_recipe, main
from experiments.tokenizers import named_means
from experiments.training_sets import PHOTOGRAPHS, PHOTOGRAPHS_128, lite
from favae import AutoencoderTinyFA
from favae.adapters.convert import convert_to_folder
from favae.autoencoders import decode, encode, load_autoencoder
from favae.data.images import skip_missing, to_uint8
from favae.data.sources import open_source
from favae.eval.extraction import image_statistics
from favae.eval.frechet import frechet_distance
from favae.eval.reconstruction import image_errors
from favae.files import read_json_lines, write_text
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig
from train_tokenizer import train

STEPS = 6_000
VALIDATION_CROPS = 96
PATCH_SIZE = 8  # pixels per latent
PICTURES = (0, 90, 170, 250, 330, 420)  # held-out crops that are shown
TRAIN = {
    "parts": "decoder",
    "resolution": 64,
    "batch_size": 8,
    "optimizer": "muon",
    "betas": [0.9, 0.99],
    "channels_last": True,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 100,
    "max_grad_norm": 1.0,
    "num_workers": 0,
    "log_every": 100,
    "sample_every": 0,
    "checkpoint_every": 500,
    "checkpoints_total_limit": 1,
    "tracker": None,
}


class ShuffleAutoencoderTiny(AutoencoderTinyFA):
    """The control: the channels of the bands are the pixels of a patch, without a transform between them."""

    @wraps(AutoencoderTinyFA.__init__)
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.decoder.bands = PixelShuffle(2**self.config.wavelet_levels)


class PixelShuffle(nn.Module):
    """Takes the place of `WaveletBands` in a decoder: color channels first, then the rest, become patches."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.num_high_bands = size, size**2 - 1

    def inverse(self, low: Tensor, high: Tensor) -> Tensor:
        return F.pixel_shuffle(torch.cat([low, high], dim=1), self.size)


@dataclass(frozen=True)
class Variant:
    """A decoder.

    Attributes:
        note: what it is, a phrase for the list below the table.
        model: the `model:` section of the recipe, without what all have in common.
        warm: whether it begins with TAEF2's weights as far as they fit.
        after: the variant whose weights it goes on from, in place of TAEF2's.
        loss: what differs from the mean squared error. train: what differs from `TRAIN`.
        length: its number of steps, in multiples of the others'.
        rate: its learning rate.
    """

    note: str
    model: dict = field(default_factory=dict)
    warm: bool = True
    after: str | None = None
    loss: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    length: float = 1.0
    rate: float = 5e-4

    def recipe(self, task: Task) -> dict:
        """What train_tokenizer.py is given."""
        model = {"name": "AutoencoderTinyFA", "latent_channels": 32, "latent_pooling": True, **self.model}
        if self.after is not None:
            model["from_pretrained"] = str(predecessor(task, self.after).run / "final")
        elif self.warm:
            model["from_pretrained"] = str(teacher_folder())
        own = {"resolution": task.resolution, "batch_size": task.batch_size, "steps": task.steps or 1, **self.train}
        return {
            "model": model,
            "teacher": {"autoencoder": str(teacher_folder())},
            # A few hundred pictures have few colors.
            "data": {
                "path": str(PHOTOGRAPHS.file("train")),
                "crop": "window",
                "color_jitter": 0.4,
            },
            "loss": {"reconstruction": "l2", "latents": 0.0, **self.loss},
            "train": {**TRAIN, **own, "learning_rate": self.rate, "mixed_precision": fastest_precision()},
        }


OWN = {"wavelet_levels": 0, "decoder_block_out_channels": [64] * 4, "num_decoder_blocks": [3, 3, 3, 1]}
ONE = {"wavelet_levels": 1, "decoder_block_out_channels": [64] * 3, "num_decoder_blocks": [3, 3, 3]}
TWO = {"wavelet_levels": 2, "decoder_block_out_channels": [64] * 2, "num_decoder_blocks": [3, 6]}
PLAIN_ONE = {**OWN, "decoder_block_out_channels": [64, 60, 48, 32]}
PLAIN_TWO = {**OWN, "decoder_block_out_channels": [64, 48, 26, 20]}
SHUFFLE = {"name": "experiments.real_latents.ShuffleAutoencoderTiny"}
BRANCHES = {**TWO, "decoder_block_out_channels": [48, 48], "high_block_out_channels": [40, 40]}
# What people see: textures, which the mean over all that is possible has not. The amplitudes of short spectra, without
# their phases, are right where there is a texture, wherever its lines are; and what looks like the original has its
# latents.
AMPLITUDES = {"weight": 100.0, "window": 8, "stride": 4, "phase_weight": 0.0}
EYE = {"reconstruction": "l1", "stft": AMPLITUDES, "reencoding": 2.0}
HIGH_BANDS = {"band": {"weight": 1.0, "weights": [0.0, 1.0, 1.0, 1.0], "levels": 2}}

VARIANTS = {
    "teacher": Variant("TAEF2's decoder as it is", OWN, length=0),
    "teacher_tuned": Variant("TAEF2's decoder, fine-tuned", OWN, rate=1e-4),
    "wavelet_1": Variant("ends one octave before the image", ONE, rate=2e-4),
    "wavelet_2": Variant("ends two octaves before", TWO),
    "wavelet_1_long": Variant("`wavelet_1`, trained for longer", ONE, length=4, rate=1e-4),
    "wavelet_2_long": Variant("`wavelet_2`, trained for longer", TWO, length=5, rate=3e-4),
    "wavelet_2_longer": Variant(
        "`wavelet_2_long`, trained for longer still", TWO, after="wavelet_2_long", length=2, rate=2e-4
    ),
    "shuffle_1": Variant("`wavelet_1` with a pixel shuffle", ONE | SHUFFLE, rate=2e-4),
    "shuffle_2": Variant("`wavelet_2` with a pixel shuffle", TWO | SHUFFLE),
    "plain_1": Variant(
        "TAEF2's architecture at the FLOPs of `wavelet_1`, narrower where images are large", PLAIN_ONE, rate=1e-3
    ),
    "plain_2": Variant("the same at the FLOPs of `wavelet_2`", PLAIN_TWO, rate=1e-3),
    "plain_1_new": Variant("`plain_1` from scratch", PLAIN_ONE, warm=False, rate=1e-3),
    "plain_2_new": Variant("`plain_2` from scratch", PLAIN_TWO, warm=False, rate=1e-3),
    "wavelet_1_new": Variant("`wavelet_1` from scratch", ONE, warm=False, rate=1e-3),
    "wavelet_2_new": Variant("`wavelet_2` from scratch", TWO, warm=False, rate=1e-3),
    "wavelet_2_bior": Variant("`wavelet_2` with the filters of bior4.4", {**TWO, "wavelet": "bior4.4"}),
    "wavelet_2_bands": Variant("`wavelet_2`, with a loss on the high bands", TWO, loss=HIGH_BANDS),
    "wavelet_1_amplitudes": Variant(
        "`wavelet_1_long`, trained on by amplitudes of short spectra",
        ONE,
        after="wavelet_1_long",
        loss={"reconstruction": "l1", "stft": AMPLITUDES},
        rate=2e-4,
    ),
    "wavelet_1_eye": Variant(
        "`wavelet_1_long`, fine-tuned with perceptual losses",
        ONE,
        after="wavelet_1_long",
        loss=EYE,
        rate=2e-4,
        length=0.5,
    ),
    "wavelet_2_eye": Variant(
        "`wavelet_2`, fine-tuned with perceptual losses", TWO, after="wavelet_2", loss=EYE, rate=3e-4, length=0.5
    ),
    "wavelet_2_branches": Variant(
        "low and high bands from networks of their own, from scratch", BRANCHES, warm=False, rate=1e-3
    ),
}


@cache
def teacher_folder() -> Path:
    """TAEF2 as a folder for `from_pretrained`, written once. Raises SystemExit if its files are not there."""
    source = os.environ.get("FAVAE_TAEF2")
    if source is None:
        raise SystemExit(
            "error: FAVAE_TAEF2 must be the folder with encoder.safetensors and decoder.safetensors of TAEF2"
        )
    folder = Path("runs/real_latents/taef2").resolve()
    if not (folder / "config.json").exists():
        convert_to_folder(source, folder, format="taesd")
    return folder


def make_row(task: Task) -> dict:
    """Trains one decoder with one seed, and measures it on pictures that were in no training."""
    teacher = AutoencoderTinyFA.from_pretrained(teacher_folder()).eval()
    model, training = teacher, {"training_crops": 0}
    if task.steps:
        training = train_once(task)
        log = read_json_lines(task.run / "metrics.jsonl")
        training |= {"seconds": log[-1]["seconds"], "curve": [[r["step"], r.get("reconstruction")] for r in log]}
        model = load_autoencoder(str(task.run / "final")).eval()
    row = {"model": task.name, "seed": task.seed, "steps": task.steps, **cost(model)}
    validation = crops("validation", VALIDATION_CROPS)
    row["validation_psnr"] = errors(validation, decoded(model, teacher, validation))["psnr"]
    images = crops("heldout")
    reconstructions = decoded(model, teacher, images)
    row |= errors(images, reconstructions) | perception(images, reconstructions)
    if task.pictures is not None and task.seed == 0:
        save_pictures(images, reconstructions, task.pictures, task.name)
    return row | training | environment()


def train_once(task: Task) -> dict:
    """Trains a row, and before it the one that it goes on from, unless that was done before; gives how it was done."""
    if task.variant.after is not None:
        train_once(predecessor(task, task.variant.after))
    training = task.beside("-training.json")
    with FileLock(task.beside(".lock")):
        if not (task.run / "final").exists():
            config = load_recipe(TokenizerConfig, task, task.variant.recipe(task))
            train(config)
            crops = len(open_source(str(PHOTOGRAPHS.file("train"))))
            how = {"mixed_precision": config.train.mixed_precision, "training_crops": crops}
            write_text(training, json.dumps(how))
    return json.loads(training.read_text())


def predecessor(task: Task, name: str) -> Task:
    """The row of this name and a row's seed that it goes on from."""
    steps = COMPARISON.steps_of(name, round(task.steps / task.variant.length))
    return replace(task, name=name, variant=VARIANTS[name], steps=steps)


@torch.no_grad()
def cost(model: ModelMixin) -> dict:
    """Parameters of a decoder, and GFLOP to decode an image of 256 px."""
    with FlopCounterMode(display=False) as counter:
        model.decode(torch.zeros(1, 32, 32, 32))
    params = sum(parameter.numel() for parameter in model.decoder.parameters())
    return {"gflop": counter.get_total_flops() / 1e9, "params": params}


def crops(split: str, count: int | None = None) -> Tensor:
    """Crops of a split, (N, 3, 128, 128) in [-1, 1]: all, or some at even distances."""
    dataset = PHOTOGRAPHS_128.dataset(split)
    chosen = np.linspace(0, len(dataset) - 1, count or len(dataset)).astype(int)
    return skip_missing([dataset[i] for i in chosen])["image"]


@torch.no_grad()
def decoded(model: ModelMixin, teacher: ModelMixin, images: Tensor) -> Tensor:
    """Images by way of the teacher's latents and a decoder."""
    return torch.cat([decode(model, encode(teacher, batch)).clamp(-1, 1) for batch in images.split(16)])


def errors(images: Tensor, reconstructions: Tensor) -> dict[str, float]:
    """Means over images of what `image_errors` measures."""
    return named_means(image_errors(images, reconstructions))


def perception(images: Tensor, reconstructions: Tensor) -> dict[str, float]:
    """The Fréchet distance to the images, and seams at the borders of latents, relative to the images' own."""
    both = [to_uint8(images), to_uint8(reconstructions)]
    real, found = (image_statistics(InMemoryImages(each), [lite()])[0] for each in both)
    distance = frechet_distance(real.mean, real.covariance, found.mean, found.covariance)
    return {"fd": distance, "seams": seams_of(both[1], PATCH_SIZE) / seams_of(both[0], PATCH_SIZE)}


def save_pictures(images: Tensor, reconstructions: Tensor, folder: Path, name: str) -> None:
    for label, pictures in ((name, reconstructions), ("original", images)):
        save_strip(pictures[list(PICTURES)], folder / f"{label}.png")


@torch.no_grad()
def finish(report: dict, stem: Path) -> None:
    """Adds images per second of decoding 256 px with one thread, all decoders in the same rounds."""
    torch.set_num_threads(1)
    latents = torch.randn(1, 32, 32, 32)
    models = {}
    for name in {row["model"] for row in report["rows"]}:
        settings = {"name": "AutoencoderTinyFA", "latent_channels": 32, "latent_pooling": True}
        models[name] = build_model(settings | VARIANTS[name].model).eval()
    timings = time_paired({name: lambda vae=vae: vae.decode(latents) for name, vae in models.items()}, rounds=10)
    for row in report["rows"]:
        seconds = timings[row["model"]].seconds
        row["images_per_second"] = 1 / statistics.median(seconds)
        row["speedup"] = speedup(seconds, timings["teacher"].seconds)["speedup"] if "teacher" in timings else None


def tables(report: dict) -> str:
    lines = []
    for name, own in rows_by_model(report).items():
        cells = [f"`{name}`", len(own), f"{own[0]['steps']:,}", f"{own[0]['training_crops']:,}"]
        cells += [f"{own[0]['params'] / 1e6:.2f} M", f"{own[0]['gflop']:.1f}"]
        cells.append(f"{own[0]['speedup']:.1f}" if own[0].get("speedup") else "")
        cells += means(own, {"psnr": 2, "recon": 5, "low": 4, "high": 5, "ssim": 4, "fd": 1, "seams": 3})
        lines.append(cells)
    columns = [
        "decoder",
        "seeds",
        "steps",
        "crops",
        "parameters",
        "GFLOP",
        "speed",
        "PSNR",
        "Recon",
        "Low",
        "High",
        "SSIM",
        "FD",
        "seams",
    ]
    return format_table(columns, lines)


def figures(report: dict, stem: Path) -> None:
    shown = ["teacher", "teacher_tuned", "wavelet_1_long", "wavelet_1_eye", "wavelet_2_longer", "plain_2"]
    save_strips(stem, shown, Path(f"{stem}_decoders.png"))


COMPARISON = Comparison(
    name="real_latents",
    variants=VARIANTS,
    prepare=lambda tasks: (teacher_folder(), PHOTOGRAPHS.file("train")),
    make_row=make_row,
    tables=tables,
    steps=STEPS,
    seeds=2,
    finish=finish,
    figures=figures,
    batch_size=8,
)

if __name__ == "__main__":
    main(COMPARISON, __doc__)
