"""How close generated images are to real ones, for `favae evaluate generation`.

FID, sFID, precision and recall (k = 3, Inception's 2,048 features) follow ADM's evaluator, IS (10 splits; at 50,000
images ADM's 5,000 each) and KID torch-fidelity. Metrics of other features have other names.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from favae.distributed import process_state
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import CLIP, FeatureExtractor, metric_name
from favae.eval.figures import save_samples
from favae.eval.frechet import frechet_distance
from favae.eval.image_sets import write_npz
from favae.eval.metrics import (
    clip_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    projected_distance,
)
from favae.eval.references import Reference
from favae.eval.results import plain_name, write_results
from favae.eval.sample_sets import SampleSets, slug
from favae.eval.seams import relative_seams

logger = logging.getLogger(__name__)

NEIGHBORS = 3  # of precision and recall
KERNEL_SUBSET_SIZE = 1000
LABELS_BY_KEY = {"guidance_scale": "guidance", "seed": "seed"}


# ----------------------------------------------------------------------------------------------------------------------
# Metrics of one set of images


def generation_metrics(
    samples: ImageStatistics, reference: ImageStatistics, validation: ImageStatistics | None = None
) -> dict[str, float | None]:
    """All metrics that one extractor's features give.

    Args:
        samples: of the generated images, with all features and, for IS, logits.
        reference: of the real images.
        validation: of other real images, as many as samples, for FDr: the distance of the samples by that of these.
    Returns:
        By the names that `metric_name` allows. None where there are too few images, or where the reference lacks what
        a metric needs, which is logged.
    """
    metrics: dict[str, float | None] = {}

    # Distances between Gaussians.
    metrics["FID"] = _frechet(reference.mean, reference.covariance, samples.mean, samples.covariance)
    if samples.spatial_mean is not None and reference.spatial_mean is not None:
        metrics["sFID"] = _frechet(
            reference.spatial_mean, reference.spatial_covariance, samples.spatial_mean, samples.spatial_covariance
        )

    # Inception score. Consecutive splits must not follow the classes.
    real, fake = reference.features, samples.features
    if samples.logits is not None:
        order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0)).numpy()
        metrics["IS"], metrics["IS_std"] = inception_score(samples.logits[order], splits=inception_splits(len(fake)))

    # How much further the samples are from the reference than as many other real images are.
    if validation is not None:
        floor = _frechet(reference.mean, reference.covariance, validation.mean, validation.covariance)
        is_apart = floor is not None and floor > 1e-6 * np.trace(reference.covariance)  # not the same images
        metrics["FDr"] = None
        if validation.count != samples.count:
            logger.warning("no FDr: there are %d samples and %d validation images", samples.count, validation.count)
        elif is_apart and metrics["FID"] is not None:
            metrics["FDr"] = metrics["FID"] / floor

    # Metrics that compare single images.
    smaller = 0 if real is None else min(len(real), len(fake))
    metrics |= dict.fromkeys(("precision", "recall", "KID", "KID_std", "MIND", "MIND_floor"))
    if smaller > NEIGHBORS:
        device = process_state().device
        metrics["precision"], metrics["recall"] = precision_recall(real, fake, neighbors=NEIGHBORS, device=device)
    if smaller >= 2:
        size = min(KERNEL_SUBSET_SIZE, smaller)
        metrics["KID"], metrics["KID_std"] = kernel_distance(real, fake, subset_size=size)
        if size == len(real) == len(fake):  # all subsets are the whole sets
            metrics["KID_std"] = None
    if smaller >= 4:
        metrics["MIND"], metrics["MIND_floor"] = _projected_distances(real, fake)

    missing = [name for name, value in metrics.items() if value is None]
    if missing:
        logger.warning(
            "no %s: there are too few images, the reference lacks them, or it is its own validation", ", ".join(missing)
        )
    named = {metric_name(name, reference.extractor): value for name, value in metrics.items()}
    return named | {"CMMD": clip_distance(real, fake)} if reference.extractor == CLIP and smaller else named


def _frechet(*moments: np.ndarray | None) -> float | None:
    return None if any(moment is None for moment in moments) else frechet_distance(*moments)


def _projected_distances(real: np.ndarray, fake: np.ndarray) -> tuple[float, float]:
    """MIND of samples against one half of the real images, and of the other half, as many images each."""
    rng = np.random.default_rng(0)
    number = min(len(real) // 2, len(fake))
    real, fake = rng.permutation(real), rng.permutation(fake)[:number]
    half, other = real[:number], real[-number:]
    return projected_distance(half, fake), projected_distance(half, other)


def inception_splits(count: int) -> int:
    """10 splits, fewer below 1,000 images."""
    return min(10, max(1, count // 100))


def measure_samples(
    samples: Dataset,
    references: Sequence[ImageStatistics],
    extractors: Sequence[FeatureExtractor],
    *,
    validation: Sequence[ImageStatistics] | None = None,
    patch_size: int | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[dict[str, float | None], int]:
    """All metrics of a set of images with all extractors, and the number of images that could be read.

    All processes take part; only the main one returns metrics.

    Args:
        validation: of other real images, one for each extractor, for FDr.
        patch_size: pixels per latent, for seams.
    """
    found = image_statistics(
        samples, extractors, logits=True, batch_size=batch_size, num_workers=num_workers, description="samples"
    )
    metrics = {}
    if process_state().is_main_process:
        for entry, reference, other in zip(found, references, validation or [None] * len(found)):
            metrics |= generation_metrics(entry, reference, other)
        ratios = [value for name, value in metrics.items() if plain_name(name) == "FDr"]
        if len(ratios) > 1 and None not in ratios:
            metrics[f"FDr^{len(ratios)}"] = float(np.mean(ratios))
        if patch_size is not None:
            first, real = found[0].differences, references[0].differences
            metrics["seams"] = relative_seams(first, real, samples.size, patch_size)
    process_state().wait_for_everyone()
    return metrics, found[0].count


def protocol_of(
    references: Sequence[ImageStatistics], extractors: Sequence[FeatureExtractor], size: tuple[int, int], count: int
) -> dict:
    """The part of a result's protocol that does not depend on how the images were sampled.

    Args:
        size: height and width of the images. count: how many images were measured.
    """
    return {
        "num_images": count,
        "resolution": list(size),
        "features": {extractor.name: extractor.hash for extractor in extractors},
        "reference": {entry.extractor: {"hash": entry.hash, "num_images": entry.count} for entry in references},
        "reference_crop": "center",
        "is_splits": inception_splits(count),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The whole evaluation


def evaluate_samples(
    samples: SampleSets,
    reference: Reference,
    extractors: Sequence[FeatureExtractor],
    output: Path,
    *,
    reference_name: str,
    validation: Reference | None = None,
    archives: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
) -> list[dict]:
    """Measures sets of images, by all processes together; writes results.json, samples.png and, if asked, .npz files.

    Args:
        reference: opened with the same extractors.
        output: a folder.
        reference_name: what results call the reference.
        validation: other real images, as many as samples, for FDr.
        archives: whether each set is written for ADM's evaluator too.
    Returns:
        The rows of results.json; on other processes than the main one without metrics.
    """
    size = samples.sets[0][1].size
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    references = reference.statistics(size, **loading)
    others = None if validation is None else validation.statistics(size, **loading)
    rows = []
    for key, images in samples.sets:
        metrics, count = measure_samples(
            images, references, extractors, validation=others, patch_size=samples.patch_size, **loading
        )
        rows.append({"model": samples.name, **key, "num_images": count, "metrics": metrics})
        # After each set, so that nothing is lost when a later one fails.
        if process_state().is_main_process:
            protocol = protocol_of(references, extractors, size, count) | samples.protocol
            protocol |= {"reference_name": reference_name, "patch_size": samples.patch_size}
            protocol["validation"] = [entry.hash for entry in others] if others else None
            write_results(output, "generation", protocol, rows)

    if process_state().is_main_process:
        for key, images in samples.sets:
            name = f"samples-{slug(key)}" if len(samples.sets) > 1 else "samples"
            save_samples(output / f"{name}.png", images, samples.class_names)
            if archives:
                write_npz(output / f"{name}.npz", images)
    return rows


def row_label(row: dict) -> str:
    """The name of a row in a table: "guidance 1.5, seed 0"."""
    return ", ".join(f"{label} {row[key]}" for key, label in LABELS_BY_KEY.items() if key in row) or "samples"
