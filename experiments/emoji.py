"""The emoji with their names, and how images that were generated for some of the names are compared with them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchmetrics.functional.retrieval import retrieval_hit_rate

from experiments.image_sets import InMemoryImages, read_images
from favae.autoencoders import measure_budget
from favae.data.images import ImageDataset
from favae.data.sources import open_source
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.generation import generation_metrics
from favae.eval.image_sets import CroppedImages

FEATURES = "efficientnet-lite0"
NUM_IMAGES = 320  # 16 for each held-out name, and as many for names of training
TOP = (1, 5)


@dataclass
class Emoji:
    """All real emoji, those of training first.

    Attributes:
        images: (N, 3, 64, 64), uint8.
        names: all captions of each.
        categories: of each.
        num_training: how many of them are trained on; the others are held out.
    """

    images: Tensor
    names: list[list[str]]
    categories: list[str]
    num_training: int

    @property
    def heldout(self) -> list[int]:
        return list(range(self.num_training, len(self.images)))

    @property
    def prompted(self) -> dict[str, list[int]]:
        """For each set of samples, the emoji whose first names are the prompts."""
        heldout = [self.heldout[i % len(self.heldout)] for i in range(NUM_IMAGES)]
        return {"heldout": heldout, "training": [i * self.num_training // NUM_IMAGES for i in range(NUM_IMAGES)]}


def read_emoji(folder: Path) -> Emoji:
    """The files that scripts/emoji.py wrote into a folder."""
    images, names, categories, counts = [], [], [], []
    for file in ("emoji.parquet", "emoji_heldout.parquet"):
        source = open_source(str(folder / file))
        images.append(read_images(CroppedImages(ImageDataset(source, 64, crop="center", flip=False))))
        names += [source.captions(i) for i in range(len(source))]
        categories += [source.classes[source.label(i)] for i in range(len(source))]
        counts.append(len(source))
    return Emoji(torch.cat(images), names, categories, counts[0])


def retrieval_rates(features: np.ndarray, prompted: list[int], emoji: Emoji, gallery: np.ndarray) -> dict:
    """How often the real emoji nearest to a sample is the one it was prompted by, and what chance would give.

    Args:
        features: (M, D), of the samples.
        prompted: M indices of the emoji whose first names were the prompts.
        gallery: (N, D), features of all real emoji.
    Returns:
        For "name" (any emoji of this name), "category" and, if all prompts are held out, "among_heldout" (this emoji
        among those held out), the rates {"top1": ..., "top5": ...}; the same of chance under "chance".
    """
    everything = list(range(len(emoji.images)))
    galleries = {
        "name": ([[emoji.names[i][0] in emoji.names[k] for k in everything] for i in prompted], everything),
        "category": ([[emoji.categories[i] == emoji.categories[k] for k in everything] for i in prompted], everything),
    }
    if set(prompted) <= set(emoji.heldout):
        galleries["among_heldout"] = ([[i == k for k in emoji.heldout] for i in prompted], emoji.heldout)
    found = {"chance": {}}
    for name, (relevant, chosen) in galleries.items():
        rates, chance = retrieval(features, gallery[chosen], relevant, TOP)
        found[name] = {f"top{k}": value for k, value in rates.items()}
        found["chance"][name] = {f"top{k}": value for k, value in chance.items()}
    return found


def retrieval(
    samples: np.ndarray, gallery: np.ndarray, relevant: np.ndarray, top: Sequence[int] = (1, 5)
) -> tuple[dict[int, float], dict[int, float]]:
    """How often one of a sample's k nearest images, by the angle between features, is what its prompt asked for.

    Args:
        samples, gallery: features (M, D) of generated and (N, D) of real images.
        relevant: (M, N), whether an image of the gallery is what the prompt of a sample asked for.
        top: values of k, each in 1 ... N.
    Returns:
        The share of samples for each k, and what k random images would give.
    """
    relevant = np.asarray(relevant, dtype=bool)
    samples, gallery = (F.normalize(torch.as_tensor(np.asarray(x, np.float64)), dim=1) for x in (samples, gallery))
    queries = list(zip(samples @ gallery.T, torch.from_numpy(relevant), strict=True))
    rates = {k: float(np.mean([retrieval_hit_rate(*query, top_k=k) for query in queries])) for k in top}
    irrelevant = len(gallery) - relevant.sum(axis=1)
    missed = {k: [math.comb(int(n), k) / math.comb(len(gallery), k) for n in irrelevant] for k in top}
    return rates, {k: float(1 - np.mean(values)) for k, values in missed.items()}


class EmojiMetrics:
    """Metrics of sets of images against the real emoji, by one extractor."""

    def __init__(self, emoji: Emoji):
        self.emoji, self.extractor = emoji, FeatureExtractor(FEATURES)
        real = {"training": emoji.images, "heldout": emoji.images[emoji.heldout]}
        self.references = {name: self._statistics(InMemoryImages(images)) for name, images in real.items()}

    def _statistics(self, images: Dataset) -> ImageStatistics:
        (statistics,) = image_statistics(images, [self.extractor], logits=True)
        return statistics

    def __call__(self, images: Dataset, split: str) -> dict:
        """Metrics of images that were prompted by names of a split.

        Args:
            split: "heldout", to be compared with the held-out emoji, or "training", with all.
        """
        found = self._statistics(images)
        metrics = generation_metrics(found, self.references[split])
        values = {name.lower(): metrics[self.extractor.metric(name)] for name in ("FID", "IS", "precision", "recall")}
        gallery = self.references["training"].features
        return values | retrieval_rates(found.features, self.emoji.prompted[split], self.emoji, gallery)

    def both(self, images: Tensor) -> dict:
        """Metrics of all emoji, changed in some way, as if each had been generated for its name."""
        return {split: self(InMemoryImages(images[chosen]), split) for split, chosen in self.emoji.prompted.items()}


@torch.no_grad()
def token_statistics(tokenizer: ModelMixin, images: Tensor) -> dict:
    """How much a tokenizer's tokens of some images hold.

    Args:
        images: (N, 3, H, W), uint8.
    Returns:
        floats per image, bits per image and, of a codebook, the codes used and their perplexity: means over codebooks
        in a row; of all stages from coarse to fine together.
    """
    batches = (images / 127.5 - 1).split(64)
    latents = tokenizer.encode(batches[0][:1])
    if not hasattr(tokenizer, "num_tokens"):
        nats = torch.cat([tokenizer.encode(batch).latent_dist.kl() for batch in batches])
        return {"floats": latents.latent_dist.mean.numel(), "bits": float(nats.mean() / math.log(2))}
    indices = torch.cat([tokenizer.quantize(tokenizer.encode(batch).latents).indices for batch in batches])
    codebooks = indices.reshape(-1, indices.shape[3] if indices.ndim == 4 else 1).T  # (codebooks, all tokens)
    shares = torch.stack([torch.bincount(x, minlength=tokenizer.num_tokens) / x.numel() for x in codebooks])
    return {
        "floats": latents.latents.numel(),
        "bits": measure_budget(tokenizer, images.shape[-1]).bits_per_image,
        "codes_used": float((shares > 0).sum(dim=1).float().mean()),
        "perplexity": float(torch.special.entr(shares).sum(dim=1).exp().mean()),
    }
