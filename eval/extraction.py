"""What is kept of a set of images in the eyes of an extractor: everything the measures need."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm.auto import tqdm

from favae.data.images import skip_missing
from favae.distributed import process_state
from favae.errors import DataError
from favae.eval.features import FeatureExtractor, combined_digest, gather_rows, own_indices, pixel_digests
from favae.eval.frechet import RunningStatistics


@dataclass
class ImageStatistics:
    """A set of images in the eyes of one extractor.

    Attributes:
        features: the extractor's name. weights: the hash of its weights; None if a file does not say.
        hash: of the images' pixels, or of the file of statistics where the images are not at hand.
        count: images behind mean and covariance; None if a file does not say.
        mean, covariance: (D,), (D, D); None for fewer than two images.
        spatial_mean, spatial_covariance: (S,), (S, S), of Inception; else None.
        kept: features (n, D) of some images or all; None if there are no images.
        logits: (n, K), of the same images; None for an extractor without classes, and in references.
    """

    features: str
    hash: str
    count: int | None
    mean: np.ndarray | None
    covariance: np.ndarray | None
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    kept: np.ndarray | None = None
    logits: np.ndarray | None = None
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
    """One pass over a set of images, by all processes together; the same result in each.

    Args:
        images: items {"image": uint8 (3, H, W), "index": its place}, or None for one that cannot be read; with `size`.
        keep: images whose features are kept, chosen at random and always the same; None keeps all.
        logits: whether the logits of the kept images are kept too.
    Raises:
        DataError: if not one can be read.
    """
    total = len(images)
    chosen = np.random.default_rng(0).permutation(total)[:keep]
    is_kept = torch.zeros(total, dtype=torch.bool)
    is_kept[torch.from_numpy(chosen)] = True
    rank = is_kept.cumsum(0) - 1  # of each kept image among them
    collectors = [_Collector(extractor, images.size, logits) for extractor in extractors]
    loader = DataLoader(
        Subset(images, own_indices(total)),
        batch_size,
        num_workers=num_workers,
        collate_fn=skip_missing,
        generator=torch.Generator(),  # the global one belongs to training
    )
    places, digests = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for batch in tqdm(loader, desc=description, disable=not process_state().is_main_process):
        if batch is None:
            continue
        places.append(batch["index"])
        digests.append(pixel_digests(batch["image"]))
        for collector in collectors:
            collector.add(batch["image"], is_kept[batch["index"]])
    places = torch.cat(places)
    digests = gather_rows(torch.cat(digests), places, total)
    if not len(digests):
        raise DataError("not one of the images can be read")
    ranks, digest = rank[places[is_kept[places]]], combined_digest(digests)
    return [collector.finish(ranks, len(chosen), digest) for collector in collectors]


class _Collector:
    """What one process sees through one extractor."""

    def __init__(self, extractor: FeatureExtractor, size: tuple[int, int], logits: bool):
        self.extractor = extractor
        empty = extractor(torch.zeros(1, 3, *size, dtype=torch.uint8))  # for the shapes: a process may see no image
        self.rows = {key: [empty[key][:0].cpu()] for key in ("features", "logits") if key in empty}
        if not logits:
            self.rows.pop("logits", None)
        self.statistics = {k: RunningStatistics(empty[k].shape[1]) for k in ("features", "spatial") if k in empty}

    def add(self, images: torch.Tensor, is_kept: torch.Tensor) -> None:
        found = {key: value.cpu() for key, value in self.extractor(images).items()}
        for key, statistics in self.statistics.items():
            statistics.update(found[key].numpy())
        for key, rows in self.rows.items():
            rows.append(found[key][is_kept])

    def finish(self, ranks: torch.Tensor, kept: int, digest: str) -> ImageStatistics:
        rows = {key: gather_rows(torch.cat(parts), ranks, kept).numpy() for key, parts in self.rows.items()}
        moments = {key: sum_over_processes(statistics) for key, statistics in self.statistics.items()}
        count = next(iter(moments.values())).count
        none = (None, None)
        return ImageStatistics(
            self.extractor.name,
            digest,
            count,
            *(moments["features"].finish() if count > 1 else none),
            *(moments["spatial"].finish() if count > 1 and "spatial" in moments else none),
            kept=rows["features"],
            logits=rows.get("logits"),
            weights=self.extractor.hash,
        )


def sum_over_processes(statistics: RunningStatistics) -> RunningStatistics:
    """The statistics of all processes' rows, on every process."""
    statistics.flush()
    device = process_state().device
    device = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    statistics.count = int(reduce(torch.tensor([statistics.count], device=device), "sum").item())
    for name in ("total", "scatter"):
        values = torch.from_numpy(getattr(statistics, name)).to(device)
        setattr(statistics, name, reduce(values, "sum").cpu().numpy())
    return statistics
