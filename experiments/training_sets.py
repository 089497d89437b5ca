"""The sets that tokenizers and their generators are compared on: glyphs, and photographs of two sizes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from experiments.glyphs import CHARACTERS, GlyphExtractor, accuracies, trained_classifier
from experiments.image_sets import InMemoryImages, read_images, written_folder
from favae.data.images import ImageDataset, to_uint8
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import SampleFolder
from favae.eval.references import load_statistics, save_statistics
from favae.eval.sampling import sample_to_folder


@dataclass(frozen=True)
class TrainingSet:
    """train.parquet, validation.parquet and heldout.parquet, as a script wrote them into one folder.

    Attributes:
        name: of the set; scripts/NAME.py writes it.
        size: of the images, in pixels.
        num_classes: 1 if a generator is told nothing.
        samples: number of a generator's samples that are measured.
        batch_sizes: of tokenizers and of generators.
        extractor: makes what turns images into features.
        label_column: of the files.
    """

    name: str
    size: int
    num_classes: int
    samples: int
    batch_sizes: tuple[int, int]
    extractor: Callable[[], GlyphExtractor | FeatureExtractor]
    label_column: str = "label"

    def __str__(self) -> str:
        return f"{self.name}, {self.size} px"

    def file(self, split: str) -> Path:
        """Raises SystemExit if the folder is not named, or has no such file."""
        file = written_folder(self.name) / f"{split}.parquet"
        if not file.is_file():
            raise SystemExit(f"error: {file}: no such file; scripts/{self.name}.py writes it")
        return file

    def dataset(self, split: str) -> ImageDataset:
        return ImageDataset(open_source(str(self.file(split)), label_column=self.label_column), self.size)

    def metrics(self, images: Dataset, labels: Tensor) -> dict[str, float]:
        """FD to the training pictures, IS, precision, recall and MIND, and how often a glyph's character is right."""
        extractor = self.extractor()
        (statistics,) = image_statistics(images, [extractor], logits=True, batch_size=256)
        metrics = generation_metrics(statistics, reference(self))
        found = {name.lower(): metrics[extractor.metric(name)] for name in ("FID", "IS", "precision", "recall", "MIND")}
        found["fd"] = found.pop("fid")
        if self.num_classes > 1:
            found["accuracy"] = accuracies(trained_classifier(), read_images(images), {"label": labels})["label"]
        return found

    def sample(
        self, pipeline: DiffusionPipeline, folder: Path, seed: int, **options
    ) -> tuple[SampleFolder, dict[str, float]]:
        """A generator's images of all classes in turn, in a folder, and their metrics."""
        sample_to_folder(pipeline, folder, self.samples, seed=seed, batch_size=200, **options)
        samples = SampleFolder(folder)
        return samples, self.metrics(samples, torch.arange(len(samples)) % self.num_classes)


@cache
def load_images(images: TrainingSet, split: str) -> tuple[Tensor, Tensor]:
    """All pictures of a split, (N, 3, size, size) uint8, and their classes, (N,)."""
    dataset = images.dataset(split)
    count = len(dataset)
    pictures = torch.stack([to_uint8(dataset[i]["image"]) for i in range(count)])
    return pictures, torch.tensor([dataset.label(i) for i in range(count)])


@cache
def reference(images: TrainingSet) -> ImageStatistics:
    """Statistics of the training pictures, which are kept beside them for other rows."""
    extractor, pictures = images.extractor(), images.file("train")
    file = pictures.with_name(f"train-{images.size}-{extractor.hash[:8]}.safetensors")
    with FileLock(f"{file}.lock"):
        if not file.exists() or file.stat().st_mtime < pictures.stat().st_mtime:
            dataset = InMemoryImages(load_images(images, "train")[0])
            statistics = image_statistics(dataset, [extractor], keep=10_000, batch_size=256)
            save_statistics(file, statistics, {"data": images.name, "resolution": images.size, "crop": "center"})
    return load_statistics(str(file), [extractor])[1][0]


@cache
def lite() -> FeatureExtractor:
    """EfficientNet-Lite0, which needs no network."""
    return FeatureExtractor("efficientnet-lite0")


GLYPHS = TrainingSet("glyphs", 32, len(CHARACTERS), 40 * len(CHARACTERS), (32, 64), GlyphExtractor)
PHOTOGRAPHS = TrainingSet("photographs", 64, 1, 2000, (8, 16), lite, label_column="none")
PHOTOGRAPHS_128 = replace(PHOTOGRAPHS, size=128)
