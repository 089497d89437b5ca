#!/usr/bin/env python
"""A classifier of glyphs: features for FD, classes for an Inception score, and whether samples are what was asked for.

    python scripts/glyphs.py --output glyphs
    FAVAE_GLYPHS=glyphs python -m experiments.glyphs

trains it on glyphs/train.parquet and writes docs/results/glyph_classifier.safetensors, and beside it in .json its
accuracies on families of fonts that are in no training. It reads all attributes that captions name.
"""

from collections.abc import Iterator
from functools import cache

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from benchmarks.timing import ROOT, environment, make_parser, write_result
from experiments.image_sets import written_folder
from favae.errors import DataError
from favae.eval.features import metric_name
from favae.hashing import hash_model

WEIGHTS = ROOT / "docs/results/glyph_classifier.safetensors"
SIZE = 32
WIDTHS = (24, 48, 96, 192)
FEATURES = 192
STEPS, BATCH_SIZE, LEARNING_RATE = 3_000, 128, 2e-3
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "gray", "black")
ATTRIBUTES: dict[str, tuple] = {
    "label": tuple(range(len(CHARACTERS))),
    "size": ("large", "small"),
    "color": COLORS,
    "ground": COLORS,
    "position": ("", "top left", "top right", "bottom left", "bottom right"),
    "bold": (False, True),
    "italic": (False, True),
}


class GlyphClassifier(nn.Module):
    """A small residual network with an output for each attribute.

    `classifier(images)` takes (B, 3, 32, 32) in [-1, 1] and returns features (B, 192) and logits by attribute.
    """

    def __init__(self):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, padding=1)]
        for before, width in zip((WIDTHS[0], *WIDTHS), WIDTHS):
            layers += [Residual(before, width, stride=2), Residual(width, width)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTHS[-1], FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.layers(images)
        return features, {name: head(features) for name, head in self.heads.items()}


class Residual(nn.Module):
    def __init__(self, before: int, width: int, stride: int = 1):
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(8, before), nn.SiLU(), nn.Conv2d(before, width, 3, stride, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip
        self.skip = nn.Identity() if stride == 1 and before == width else nn.Conv2d(before, width, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class GlyphExtractor:
    """The classifier as `FeatureExtractor`s are: uint8 images -> features, and logits of the character."""

    name = "glyphs"

    def __init__(self):
        self.model = trained_classifier()
        self.hash = hash_model(self.model)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features, logits = self.model(images.float() / 127.5 - 1)
        return {"features": features, "logits": logits["label"]}

    def metric(self, name: str) -> str:
        return metric_name(name, self.name)


@cache
def trained_classifier() -> GlyphClassifier:
    """Raises DataError if the file is missing."""
    if not WEIGHTS.exists():
        raise DataError(f"{WEIGHTS} is missing; python -m experiments.glyphs writes it")
    model = GlyphClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()


@cache
def load_glyphs(split: str) -> tuple[Tensor, dict[str, Tensor]]:
    """All pictures of a split, (N, 3, 32, 32) uint8, and their attributes as indices into `ATTRIBUTES`, (N,) each."""
    table = datasets.Dataset.from_parquet(str(written_folder("glyphs") / f"{split}.parquet"))
    pictures = np.stack([np.asarray(picture) for picture in table["image"]])
    places = {name: {value: i for i, value in enumerate(values)} for name, values in ATTRIBUTES.items()}
    attributes = {name: torch.tensor([places[name][value] for value in table[name]]) for name in ATTRIBUTES}
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), attributes


@torch.no_grad()
def accuracies(model: GlyphClassifier, images: Tensor, attributes: dict[str, Tensor]) -> dict[str, float]:
    """The share of pictures in which each attribute is seen: (N, 3, 32, 32) uint8, and indices (N,) by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in attributes}
    for batch in images.split(256):
        _, logits = model(batch.float() / 127.5 - 1)
        for name in seen:
            seen[name].append(logits[name].argmax(dim=1))
    return {name: float((torch.cat(found) == attributes[name]).float().mean()) for name, found in seen.items()}


def train(steps: int) -> GlyphClassifier:
    torch.manual_seed(0)
    model = GlyphClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    images, attributes = load_glyphs("train")
    batches = endless_batches(len(images))
    for _ in (bar := trange(steps, desc="classifier")):
        chosen = next(batches)
        shift = torch.randint(-1, 2, (2,)).tolist()
        pictures = images[chosen].roll(shift, dims=(2, 3)).float() / 127.5 - 1
        _, logits = model(pictures.contiguous(memory_format=torch.channels_last))
        losses = {
            name: F.cross_entropy(found, attributes[name][chosen], label_smoothing=0.05)
            for name, found in logits.items()
        }
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(label=f"{losses['label']:.3g}")
    return model.eval()


def endless_batches(count: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(count)[: count // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(str(__doc__))
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args(argv)
    model = train(arguments.steps)
    # The weights as they will be: rounded to float16.
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(state, WEIGHTS)
    trained_classifier.cache_clear()
    found = {split: accuracies(trained_classifier(), *load_glyphs(split)) for split in ("validation", "heldout")}
    params = sum(parameter.numel() for parameter in model.parameters())
    write_result(WEIGHTS.with_suffix(".json"), environment() | {"steps": arguments.steps, "params": params, **found})


if __name__ == "__main__":
    main()
