"""`favae evaluate latents`: the meters of `favae.eval.latent_meters`, on latent caches and on models with images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from favae.autoencoders import decode, encode, measure_budget
from favae.data.image_record import ImageRecord
from favae.data.images import ImageDataset, read_in_order
from favae.data.latents import TokenDataset, open_latents
from favae.errors import DataError, ModelError
from favae.eval.extraction import PairedDistances
from favae.eval.features import FeatureExtractor
from favae.eval.figures import save_latent_spectra
from favae.eval.latent_meters import (
    high_frequency_share,
    interpolated,
    neighbor_consistency,
    power_spectrum,
    velocity_variance,
)
from favae.eval.results import number_duplicates, write_results

logger = logging.getLogger(__name__)


@dataclass
class LatentSet:
    """Latents of images, and the class of each.

    Attributes:
        latents: (N, C, h, w), means of posteriors. labels: (N,), all equal if there are no classes.
        data: what the images are. resolution: of their center crops.
        images: the digest of their `ImageRecord`; None of a cache that has lost it.
        distances: what `interpolated_distances` has found, if there is a model.
    """

    latents: Tensor
    labels: Tensor
    data: str
    resolution: int
    images: str | None
    distances: dict[str, float] = field(default_factory=dict)


def cached_latents(folder: str, num_images: int) -> LatentSet:
    """Latents of a cache: of the images that `Selection` takes of its source, but for those that could not be read.

    Raises:
        CacheError: if there is no finished cache.
        DataError: if it holds tokens, or latents of images that were blurred.
    """
    dataset = open_latents(folder, flip=False)
    if isinstance(dataset, TokenDataset):
        raise DataError(f"{folder} holds tokens; these meters are of continuous latents")
    if dataset.manifest.get("low_pass"):
        raise DataError(f"{folder} was written with --low-pass, of blurred images")
    total = dataset.manifest["images"]
    indices = np.linspace(0, total - 1, min(num_images, total)).astype(int)
    if len(dataset) < total:
        indices = np.flatnonzero(np.isin(dataset.image_indices(np.arange(len(dataset))), indices))
    batch = dataset.read(indices, np.zeros_like(indices))
    about, record = dataset.manifest, ImageRecord.read(Path(folder))
    digest = None if record is None else record.digest()
    return LatentSet(batch["mean"].float(), batch["label"], about["data"], about["resolution"], digest)


@torch.no_grad()
def encoded_latents(
    vae: ModelMixin,
    images: ImageDataset,
    data_name: str,
    digest: str,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> LatentSet:
    """Latents that an autoencoder gives for images, of which `digest` is that of the record.

    Raises:
        DataError: if not one image can be read.
        ModelError: if the autoencoder does not take images of this size, has tokens in place of latents, or gives
            latents that are not finite.
    """
    if hasattr(vae, "quantize"):
        raise ModelError(f"{type(vae).__name__} quantizes its latents; these meters are of continuous latents")
    measure_budget(vae, images.resolution)
    latents, indices = [], []
    for batch in read_in_order(images, batch_size, num_workers, description="latents"):
        latents.append(encode(vae, batch["image"].to(vae.device)).float().cpu())
        indices += batch["index"].tolist()
    if not latents:
        raise DataError("not one of the images can be read")
    found = torch.cat(latents)
    if not found.isfinite().all():
        raise ModelError(f"{type(vae).__name__} gives latents that are not finite")
    return LatentSet(found, labels_of(images, indices), data_name, images.resolution, digest)


def labels_of(images: ImageDataset, indices: Sequence[int]) -> Tensor:
    """The class of each of some images, (N,); all 0 if there are no classes."""
    has_classes = len(images.classes) > 1
    return torch.tensor([images.label(index) if has_classes else 0 for index in indices])


@torch.no_grad()
def interpolated_distances(
    vae: ModelMixin,
    latents: Tensor,
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int,
    num_workers: int = 0,
) -> dict[str, float | None]:
    """iFID: the Fréchet distance between images and what an autoencoder makes of their latents, moved half the way to
    neighbors, by the names that `metric_name` allows.

    Args:
        latents: of these images, by `encoded_latents`.
    Raises:
        DataError: if there are too few images.
    """
    moved, done = interpolated(latents), 0
    distances = PairedDistances(extractors)
    for batch in read_in_order(images, batch_size, num_workers, description="interpolated"):
        own = moved[done : done + len(batch["image"])].to(vae.device)
        done += len(own)
        distances.update(batch["image"], decode(vae, own))
    return distances.finish("iFID")


def evaluate_latents(
    sets: list[tuple[str, LatentSet]], output: Path, features: dict[str, str] | None = None
) -> list[dict]:
    """Measures sets of latents; writes results.json and spectra.png.

    Args:
        sets: name and latents each; a name that occurs twice stands for two seeds.
        features: hashes of the extractors of `interpolated_distances`, by their names.
    Returns:
        The rows of results.json. A meter that the set does not allow is None, and a warning says why.
    Raises:
        DataError: if the sets are of other images.
    """
    first = sets[0][1]
    about = {"data_name": first.data, "resolution": first.resolution, "num_images": len(first.latents)}
    about["data"] = {"hash": first.images}
    rows, spectra = [], {}
    distances = dict.fromkeys(distance for _, found in sets for distance in found.distances)  # None for caches
    for label, (name, found) in zip(number_duplicates([name for name, _ in sets]), sets):
        if (found.resolution, len(found.latents)) != (first.resolution, len(first.latents)):
            raise DataError(
                f"{label} is of {len(found.latents)} images at {found.resolution} px, {sets[0][0]} of "
                f"{len(first.latents)} at {first.resolution} px; only latents of the same images can be compared"
            )
        if found.images != first.images and None not in (found.images, first.images):
            raise DataError(f"{label} is of other images than {sets[0][0]}; only latents of the same can be compared")
        metrics, spectra[label], missing = latent_metrics(found.latents, found.labels)
        for reason in missing:
            logger.warning("%s: %s", label, reason)
        shape = list(found.latents.shape[1:])
        if found.latents.shape[1:] != first.latents.shape[1:]:
            logger.warning("%s has latents of another size than %s: compare no meters", label, sets[0][0])
        rows.append({"model": name, "latent_shape": shape, "metrics": metrics | distances | found.distances})
    protocol = {**about, "posterior": "mode", "standardized": True, "features": features}
    write_results(output, "latents", protocol, rows)
    save_latent_spectra(output / "spectra.png", spectra)
    return rows


def latent_metrics(latents: Tensor, labels: Tensor) -> tuple[dict[str, float | None], np.ndarray, list[str]]:
    """The meters of latents (N, C, h, w) of classes (N,), their power spectrum, and why some meters are None or say
    something else."""
    metrics: dict[str, float | None] = dict.fromkeys(("VIV", "rho", "phi", "LNC"))
    missing = []
    try:
        measured = velocity_variance(latents, labels)
        metrics |= {"VIV": measured.viv, "rho": measured.rho, "phi": measured.phi}
        if len(labels.unique()) == 1:
            missing.append("VIV, rho and phi are of all images as one class: there are no others")
    except DataError as error:
        missing.append(f"no VIV: {error}")
    try:
        metrics["LNC"] = neighbor_consistency(latents, labels)
    except DataError as error:
        missing.append(f"no LNC: {error}")
    spectrum = power_spectrum(latents)
    for label, above in (("1/4", 0.25), ("1/2", 0.5)):
        metrics[f"SEC {label}"] = high_frequency_share(spectrum, above)
    return metrics, spectrum, missing
