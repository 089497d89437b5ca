"""Features of an image set: everything that metrics need, from one pass over the images."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import reduce
from torch import Tensor
from torch.utils.data import Dataset, Subset

from favae.data.images import read_in_order, to_uint8
from favae.distributed import gather_rows, own_indices, process_state
from favae.errors import DataError
from favae.eval.features import FeatureExtractor
from favae.eval.frechet import RunningStatistics, frechet_distance
from favae.eval.seams import neighbor_differences

logger = logging.getLogger(__name__)


@dataclass
class ImageStatistics:
    """What one extractor's features say about a set of images.

    Attributes:
        extractor: its name. weights: the hash of its weights; None if a file of statistics does not say.
        hash: of the images' pixels, or of the file of statistics where there are no images.
        count: images behind mean and covariance; None if a file of statistics does not say.
        mean, covariance: of the features, (D,) and (D, D); None for fewer than two images.
        spatial_mean, spatial_covariance: of Inception's spatial features, (S,) and (S, S); else None.
        features: (n, D), of some of the images or all; None if there are no images.
        logits: (n, K), of the same images; None for an extractor without classes, and in references.
        differences: mean of `neighbor_differences` over the images; None for a file of statistics that lacks them.
    """

    extractor: str
    hash: str
    count: int | None
    mean: np.ndarray | None
    covariance: np.ndarray | None
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    features: np.ndarray | None = None
    logits: np.ndarray | None = None
    differences: np.ndarray | None = None
    weights: str | None = None


def image_statistics(
    images: Dataset,
    extractors: Sequence[FeatureExtractor],
    *,
    keep: int | None = None,
    logits: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    description: str = "features",
) -> list[ImageStatistics]:
    """Reads a set of images once, by all processes together. Every process returns the same.

    Args:
        images: items {"image": uint8 (C, H, W), "index": int}, or None for one that cannot be read; with `size`.
        keep: for how many images the features themselves are returned: always the same ones, chosen at random; None
            stands for all.
        logits: whether the logits of these images are returned too.
        description: of the progress bar.
    Raises:
        DataError: if none of the images can be read.
    """
    total = len(images)

    # Which images are kept, and the place of each among them.
    chosen = np.random.default_rng(0).permutation(total)[:keep]
    is_kept = torch.zeros(total, dtype=torch.bool)
    is_kept[torch.from_numpy(chosen)] = True
    rank = is_kept.cumsum(0) - 1

    # This process's images.
    own = own_indices(total)
    num_kept = int(is_kept[own.start :: own.step].sum())
    collectors = [_Collector(extractor, images.size, num_kept, logits) for extractor in extractors]
    places, digests = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    height, width = images.size
    differences = np.zeros(width + height - 2)  # their sum over images
    for batch in read_in_order(Subset(images, own), batch_size, num_workers, description=description):
        places.append(batch["index"])
        digests.append(pixel_digests(batch["image"]))
        differences += neighbor_differences(batch["image"]).double().sum(dim=0).numpy()
        for collector in collectors:
            collector.add(batch["image"], is_kept[batch["index"]])

    # All processes' images.
    places = torch.cat(places)
    digests = gather_rows(torch.cat(digests), places, total)
    if not len(digests):
        raise DataError("none of the images can be read")
    if len(digests) < total and process_state().is_main_process:
        logger.warning("%s: %d of %d images cannot be read", description, total - len(digests), total)
    ranks, digest = rank[places[is_kept[places]]], combined_digest(digests)
    differences = _sum(differences) / len(digests)
    return [collector.finish(ranks, len(chosen), digest, differences) for collector in collectors]


class _Collector:
    """One extractor's features of the images of one process.

    Args:
        size: height and width of the images.
        num_kept: for how many images, at most, features are kept. logits: whether logits are, too.
    """

    def __init__(self, extractor: FeatureExtractor, size: tuple[int, int], num_kept: int, logits: bool):
        self.extractor = extractor
        empty = extractor(torch.zeros(1, 3, *size, dtype=torch.uint8))  # for the shapes: a process may read no image
        kept = ("features", "logits") if logits else ("features",)
        self.rows = {
            name: torch.empty(num_kept, *empty[name].shape[1:], dtype=empty[name].dtype)
            for name in kept
            if name in empty
        }
        self.num_rows = 0  # that are filled
        self.statistics = {
            name: RunningStatistics(empty[name].shape[1]) for name in ("features", "spatial") if name in empty
        }

    def add(self, images: Tensor, is_kept: Tensor) -> None:
        """Adds a batch: uint8 (B, C, H, W), and (B,) bool, whether the features of an image are kept."""
        found = {name: values.cpu() for name, values in self.extractor(images).items()}
        for name, statistics in self.statistics.items():
            statistics.update(found[name].numpy())
        filled = self.num_rows + int(is_kept.sum())
        for name, rows in self.rows.items():
            rows[self.num_rows : filled] = found[name][is_kept]
        self.num_rows = filled

    def finish(self, ranks: Tensor, kept: int, digest: str, differences: np.ndarray) -> ImageStatistics:
        """The statistics of all processes' images.

        Args:
            ranks: the places of this process's kept images among the `kept` of all processes.
            digest: of the images' pixels. differences: of their neighboring pixels.
        """
        rows = {name: gather_rows(own[: self.num_rows], ranks, kept).numpy() for name, own in self.rows.items()}
        statistics = {name: sum_over_processes(entry) for name, entry in self.statistics.items()}
        count = statistics["features"].count
        moments = {name: entry.finish() for name, entry in statistics.items() if count > 1}
        mean, covariance = moments.get("features", (None, None))
        spatial_mean, spatial_covariance = moments.get("spatial", (None, None))
        return ImageStatistics(
            extractor=self.extractor.name,
            hash=digest,
            count=count,
            mean=mean,
            covariance=covariance,
            spatial_mean=spatial_mean,
            spatial_covariance=spatial_covariance,
            features=rows["features"],
            logits=rows.get("logits"),
            differences=differences,
            weights=self.extractor.hash,
        )


def sum_over_processes(statistics: RunningStatistics) -> RunningStatistics:
    """The statistics of all processes' rows together, on every process."""
    statistics.flush()
    statistics.count = int(_sum(np.array(statistics.count)))
    statistics.total, statistics.scatter = _sum(statistics.total), _sum(statistics.scatter)
    return statistics


def _sum(values: np.ndarray) -> np.ndarray:
    """The sum over processes, on every process."""
    device = process_state().device
    device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    return reduce(torch.from_numpy(values).to(device), "sum").cpu().numpy()


class PairedDistances:
    """Fréchet distances between images and what is made of them, by the same networks, from batches of both."""

    def __init__(self, extractors: Sequence[FeatureExtractor]):
        self._pairs: list[tuple[FeatureExtractor, list[RunningStatistics]]] = [(each, []) for each in extractors]

    def update(self, images: Tensor, others: Tensor) -> None:
        """Two batches (B, C, H, W) in [-1, 1]."""
        for extractor, pair in self._pairs:
            found = [extractor(to_uint8(batch))["features"].cpu().numpy() for batch in (images, others)]
            if not pair:
                pair += [RunningStatistics(features.shape[1]) for features in found]
            for statistics, features in zip(pair, found):
                statistics.update(features)

    def finish(self, metric: str) -> dict[str, float | None]:
        """By the names that `metric_name` makes of this one; None where there is one image."""
        found: dict[str, float | None] = {}
        for extractor, pair in self._pairs:
            first, second = pair
            first.flush()
            distance = frechet_distance(*first.finish(), *second.finish()) if first.count > 1 else None
            found[extractor.metric(metric)] = distance
        return found


def pixel_digests(images: Tensor) -> Tensor:
    """A 64-bit hash of each image's pixels: uint8 (B, C, H, W) -> int64 (B,)."""
    digests = [hashlib.blake2b(image.contiguous().numpy().tobytes(), digest_size=8).digest() for image in images.cpu()]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.int64)


def combined_digest(digests: Tensor) -> str:
    """SHA-256 of a set of images in its order, from `pixel_digests`."""
    return hashlib.sha256(digests.cpu().numpy().astype(">i8").tobytes()).hexdigest()
