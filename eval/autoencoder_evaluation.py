"""`favae evaluate reconstruction`: several autoencoders on the same images, their results.json and pictures."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from favae.autoencoders import Budget, decode, image_channels, load_autoencoder, measure_budget
from favae.data.images import ImageDataset
from favae.distributed import everyone, process_state
from favae.errors import ModelError
from favae.eval.extraction import image_statistics
from favae.eval.features import FeatureExtractor
from favae.eval.figures import save_comparison, save_latents, save_spectra
from favae.eval.image_sets import CroppedImages
from favae.eval.reconstruction import ENCODE_BY_POSTERIOR, Reconstruction, check_levels, evaluate_reconstruction
from favae.eval.references import Reference
from favae.eval.results import UINT8, number_duplicates, shown_metrics, write_results
from favae.hashing import hash_model
from favae.losses.perceptual import LPIPS

logger = logging.getLogger(__name__)


def evaluate_autoencoders(
    models: Sequence[tuple[str, str]],
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    output: Path,
    *,
    data_name: str,
    reference: Reference | None = None,
    lpips: LPIPS | None = None,
    posterior: Literal["mode", "sample"] = "mode",
    levels: int = 3,
    num_examples: int = 8,
    batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[list[dict], list[str]]:
    """Evaluates autoencoders on the same images, by all processes together; writes results.json and pictures.

    Args:
        models: (name, path) each; a path is a folder or a hub name, and a name that occurs twice stands for two seeds.
        images: read in as many channels as the first model takes.
        output: a folder.
        data_name: what results call the images.
        reference: for rFID, opened with the same extractors; None compares with the same images.
        levels: wavelet levels for the errors per band.
        num_examples: images in comparison.png.
    Returns:
        The rows of results.json, and what went wrong with other models, one line each.
    """
    check_levels(levels, images.resolution)
    if reference is not None:
        reference.check_size((images.resolution, images.resolution))
    loading = {"batch_size": batch_size, "num_workers": num_workers}

    # The models, before hours are spent on the images.
    opened, failures = _open_models(models, images.resolution)
    if not opened:
        return [], failures
    images = images.with_channels(image_channels(opened[0][2]))

    # What reconstructions are compared with.
    originals = references = image_statistics(
        CroppedImages(images), extractors, keep=0, description="originals", **loading
    )
    if reference is not None:
        references = reference.statistics((images.resolution, images.resolution), **loading)
    protocol = {
        "num_images": originals[0].count,
        "data": {"hash": originals[0].hash},
        "data_name": data_name,
        "resolution": images.resolution,
        "crop": "center",
        "posterior": posterior,
        "uint8": UINT8,
        "features": {extractor.name: extractor.hash for extractor in extractors},
        "reference": {entry.extractor: {"hash": entry.hash, "num_images": entry.count} for entry in references},
        "reference_name": "the same images" if reference is None else reference.path,
        "lpips": None if lpips is None else {"vgg16": hash_model(lpips)},
    }

    # One model after the other. A failure of one leaves the others as they are.
    rows, finished = [], []
    for name, path, vae, budget in opened:
        try:
            result = evaluate_reconstruction(
                vae,
                images,
                extractors,
                references,
                lpips=lpips,
                encode=ENCODE_BY_POSTERIOR[posterior],
                levels=levels,
                **loading,
            )
        except ModelError as error:
            failures.append(f"{name}: {error}")
            continue
        finished.append((name, vae.cpu(), result))
        speed = {"images_per_second": result.images_per_second, "batch_size": batch_size}
        about = {"model": name, "path": path, "metrics": result.metrics, "bands": result.bands}
        rows.append({**about, **asdict(budget), **speed})
        # After each model, so that nothing is lost when a later one fails.
        if process_state().is_main_process:
            write_results(output, "reconstruction", protocol, rows)

    if process_state().is_main_process and rows:
        save_figures(output, images, finished, posterior=posterior, num_examples=num_examples)
    return rows, failures


def _open_models(
    models: Sequence[tuple[str, str]], resolution: int
) -> tuple[list[tuple[str, str, ModelMixin, Budget]], list[str]]:
    """Name, path, model and budget of the autoencoders that can be opened, and what is wrong with the others."""
    opened, failures = [], []
    for name, path in models:
        try:
            vae, budget = _open_everywhere(path, resolution)
            for first, _, other, _ in opened[:1]:
                check_same_channels("it", vae, first, other)
            opened.append((name, path, vae, budget))
        except ModelError as error:
            logger.warning("%s is left out: %s", name, error)  # at once, and at the end again
            failures.append(f"{name}: {error}")
    return opened, failures


def check_same_channels(name: str, vae: ModelMixin, first: str, other: ModelMixin) -> None:
    """Raises `ModelError` if an autoencoder takes images of other channels than the first one; both have names."""
    found, expected = image_channels(vae), image_channels(other)
    if found != expected:
        raise ModelError(f"{name} takes images of {found} channels, and {first} of {expected}; measure them apart")


def _open_everywhere(path: str, resolution: int) -> tuple[ModelMixin, Budget]:
    """Opens an autoencoder and measures its cost. Raises `ModelError` in all processes if it fails in one."""
    failure = None
    try:
        vae = load_autoencoder(path)
        budget = measure_budget(vae, resolution)
    except ModelError as error:
        failure = error
    if not everyone(failure is None):
        raise failure or ModelError("it failed in another process")
    return vae, budget


def table_row(row: dict) -> dict[str, str]:
    """The numbers of one model as they are shown, by heading."""
    tokens = row.get("tokens_per_image")
    latent = f"{tokens:,} tokens, {row['bits_per_image']:,.0f} bits" if tokens else f"{row['floats_per_image']:,}"
    return {
        "model": row["model"],
        **shown_metrics(row),
        "floats/image": latent,
        "f": str(row["spatial_compression_ratio"]),
        "parameters": f"{row['params'] / 1e6:.2f}M",
        "GFLOP": f"{row['flops'] / 1e9:.2f}",
        "images/s": f"{row['images_per_second'] or 0:.1f}",
    }


@torch.no_grad()
def save_figures(
    output: Path,
    images: ImageDataset,
    finished: Sequence[tuple[str, ModelMixin, Reconstruction]],
    *,
    posterior: str,
    num_examples: int,
) -> None:
    """Writes comparison.png, spectra.png and latents.png.

    Args:
        finished: name, autoencoder and result of each model.
    """
    names = number_duplicates([name for name, _, _ in finished])  # seeds of one model
    results = {name: result for name, (_, _, result) in zip(names, finished)}
    first = next(iter(results.values()))

    # The images with the largest error, over all models.
    error = torch.stack([result.errors[:, 0] for result in results.values()]).mean(dim=0)
    worst = error.argsort(descending=True)[:num_examples]
    indices = first.indices[worst].tolist()
    originals = torch.stack([images[i]["image"] for i in indices]).to(process_state().device)
    reconstructions = {}
    for name, (_, vae, _) in zip(names, finished):
        vae = vae.to(originals.device)
        latents = ENCODE_BY_POSTERIOR[posterior](vae, originals, torch.tensor(indices))
        reconstructions[name] = decode(vae, latents).cpu()
        vae.cpu()
    save_comparison(output / "comparison.png", originals.cpu(), reconstructions, error[worst].tolist())

    def spectra(of: str) -> dict[str, Tensor]:
        return {name: result.spectra[of] for name, result in results.items()}

    save_spectra(output / "spectra.png", first.spectra["original"], spectra("reconstruction"), spectra("error"))
    means = {name: result.latent_mean for name, result in results.items()}
    stds = {name: result.latent_std for name, result in results.items()}
    save_latents(output / "latents.png", spectra("latent"), means, stds)
