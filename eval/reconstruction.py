"""How well autoencoders reconstruct images, for `favae evaluate reconstruction`.

Recon, Low and High are mean squared errors in [-1, 1], unclamped, of the image, its Haar LL band, and the mean of LH,
HL and HH; the transform is orthonormal, so Recon = (Low + 3 High) / 4. PSNR, SSIM and MS-SSIM are means over images,
on 8 bits. Seams are those of `favae.eval.seams`, at the borders of what one latent stands for, relative to the images'.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from tqdm import tqdm

from favae.autoencoders import (
    Budget,
    decode,
    encode,
    image_channels,
    load_autoencoder,
    measure_budget,
    spatial_compression_ratio,
)
from favae.data.images import ImageDataset, skip_missing, to_uint8
from favae.distributed import process_state
from favae.errors import DataError, ModelError
from favae.eval.extraction import ImageStatistics, image_statistics, sum_over_processes
from favae.eval.features import FeatureExtractor, everyone, gather_rows, image_generator, metric_name, own_indices
from favae.eval.figures import radial_spectrum, save_comparison, save_latents, save_spectra
from favae.eval.frechet import RunningStatistics, frechet_distance
from favae.eval.image_sets import CroppedImages
from favae.eval.references import Reference
from favae.eval.results import UINT8, number_duplicates, shown_metrics, write_results
from favae.eval.seams import neighbor_differences, relative_seams
from favae.hashing import hash_model
from favae.losses.perceptual import LPIPS
from favae.wavelets import WaveletTransform2D

logger = logging.getLogger(__name__)

PER_IMAGE = ("Recon", "Low", "High", "PSNR", "SSIM", "MS-SSIM", "LPIPS")
MS_SSIM_SIZE = 176  # the smallest at which its window of 11 fits into five scales
BANDS = ("LH", "HL", "HH")


def image_errors(images: Tensor, reconstructions: Tensor, lpips: LPIPS | None = None) -> Tensor:
    """The columns of `PER_IMAGE`, one row per image: (B, 7) float32, on the CPU; NaN for what cannot be measured.

    Args:
        images, reconstructions: (B, C, H, W), H and W even, images in [-1, 1]. LPIPS sees them `in_color`.
    """
    images, reconstructions = images.float(), reconstructions.float()
    low, high = WaveletTransform2D("haar").to(images.device)(reconstructions - images)
    recon = (reconstructions - images).square().mean((1, 2, 3))
    first, second = to_uint8(images).float() / 255, to_uint8(reconstructions).float() / 255
    psnr = peak_signal_to_noise_ratio(images, reconstructions)
    options = {"data_range": 1.0, "reduction": "none"}
    ssim = structural_similarity_index_measure(second, first, **options).reshape(-1)
    ms_ssim = distance = torch.full_like(recon, torch.nan)
    if min(images.shape[-2:]) >= MS_SSIM_SIZE:
        ms_ssim = multiscale_structural_similarity_index_measure(second, first, **options).reshape(-1)
    if lpips is not None:
        distance = lpips(reconstructions.clamp(-1, 1), images)
    columns = [recon, low.square().mean((1, 2, 3)), high.square().mean((1, 2, 3, 4)), psnr, ssim, ms_ssim, distance]
    return torch.stack(columns, dim=1).cpu()


def peak_signal_to_noise_ratio(images: Tensor, reconstructions: Tensor) -> Tensor:
    """PSNR of each image in dB, on 8 bits, at most 100: (B, C, H, W) twice, in [-1, 1] -> (B,), float32."""
    first, second = to_uint8(images).float() / 255, to_uint8(reconstructions).float() / 255
    return -10 * (first - second).square().mean((1, 2, 3)).clamp_min(1e-10).log10()


def band_names(levels: int) -> list[str]:
    """LH1, HL1, HH1, LH2, ... and the LL that is left, as `band_errors` orders them."""
    return [f"{band}{level}" for level in range(1, levels + 1) for band in BANDS] + [f"LL{levels}"]


def band_errors(difference: Tensor, levels: int) -> Tensor:
    """Mean squared Haar coefficients of an error in each band: (B, C, H, W) -> (B, 3 levels + 1), on the CPU.

    Level 1 is the finest. Bands weighted by their size add up to Recon.
    """
    transform, columns = WaveletTransform2D("haar").to(difference.device), []
    for _ in range(levels):
        difference, high = transform(difference)
        columns.append(high.square().mean((1, 3, 4)))
    return torch.cat([*columns, difference.square().mean((1, 2, 3))[:, None]], dim=1).cpu()


@dataclass
class Reconstruction:
    """The result of `evaluate_reconstruction`.

    Attributes:
        metrics: means over images and Fréchet distances, by name; None for what could not be computed.
        bands: mean squared error of each wavelet band.
        errors: (N, 7), the columns of `PER_IMAGE`. indices: (N,), the images' places in the data.
        images_per_second: encoding and decoding, of one process.
        spectra: of "original", "reconstruction", "error" and "latent": see `radial_spectrum`.
            latent_mean, latent_std: (C,), over images and positions.
        latents: (N, C, h, w), if they were to be kept.
    """

    metrics: dict[str, float | None]
    bands: dict[str, float]
    errors: Tensor
    indices: Tensor
    images_per_second: float | None
    spectra: dict[str, Tensor]
    latent_mean: Tensor
    latent_std: Tensor
    latents: Tensor | None = None


Encode = Callable[[ModelMixin, Tensor, Tensor], Tensor]  # model, images (B, C, H, W) and their indices -> latents


def mode(vae: ModelMixin, images: Tensor, indices: Tensor) -> Tensor:
    """The most probable latents."""
    return encode(vae, images)


def sample(vae: ModelMixin, images: Tensor, indices: Tensor) -> Tensor:
    """Samples of the posteriors, seeded by the images' indices."""
    return encode(vae, images, "sample", [image_generator(0, int(i)) for i in indices])


ENCODE_BY_POSTERIOR: dict[str, Encode] = {"mode": mode, "sample": sample}


class _Evaluator:
    """One autoencoder on batches of images.

    Attributes:
        seconds: per image, of encoding and decoding each batch.
    """

    def __init__(
        self, vae: ModelMixin, encode: Encode, extractors, lpips: LPIPS | None, levels: int, keep_latents: bool
    ):
        self.vae, self.encode, self.extractors, self.lpips = vae, encode, extractors, lpips
        self.levels, self.keep_latents = levels, keep_latents
        self.seconds: list[float] = []

    def __call__(self, images: Tensor, indices: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        """What is kept of a batch, one row per image, and the features of each extractor; on the CPU.

        Args:
            images: (B, C, H, W) in [-1, 1], on the model's device.
            indices: (B,), which seed the samples of the posterior.
        """
        started = _now(images.device)
        latents = self.encode(self.vae, images, indices)
        reconstructions = decode(self.vae, latents)
        self.seconds.append((_now(images.device) - started) / len(images))

        latents, difference = latents.float(), reconstructions - images
        rows = {
            "errors": image_errors(images, reconstructions, self.lpips),
            "bands": band_errors(difference, self.levels),
            "differences": torch.stack([neighbor_differences(to_uint8(x)) for x in (images, reconstructions)], dim=1),
            "latent_moments": torch.stack([latents.mean((2, 3)), latents.square().mean((2, 3))], dim=1),
            "original": radial_spectrum(images),
            "reconstruction": radial_spectrum(reconstructions),
            "error": radial_spectrum(difference),
            "latent": radial_spectrum(latents),
        }
        if self.keep_latents:
            rows["latents"] = latents
        features = [extractor(to_uint8(reconstructions))["features"].cpu() for extractor in self.extractors]
        return {name: values.cpu() for name, values in rows.items()}, features


@torch.no_grad()
def evaluate_reconstruction(
    vae: ModelMixin,
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    references: Sequence[ImageStatistics],
    *,
    lpips: LPIPS | None = None,
    encode: Encode = mode,
    levels: int = 1,
    keep_latents: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Reconstruction:
    """Evaluates one autoencoder on all images, by all processes together.

    Args:
        references: of each extractor: statistics that those of the reconstructions are compared with.
        encode: which latents are decoded.
        levels: wavelet levels for the errors per band.
        keep_latents: whether they are returned.
    Raises:
        ModelError: if a reconstruction is not finite.
        DataError: if no image can be read.
    """
    device = process_state().device
    evaluate = _Evaluator(vae.to(device).eval(), encode, extractors, lpips, levels, keep_latents)

    size = (images.resolution, images.resolution)
    # A warm-up, from which a process that reads no image at all learns the shapes.
    empty, features = evaluate(torch.zeros(1, images.channels, *size, device=device), torch.zeros(1))
    evaluate.seconds.clear()
    columns = {name: [values[:0]] for name, values in empty.items()}
    statistics = [RunningStatistics(found.shape[1]) for found in features]
    places = [torch.zeros(0, dtype=torch.int64)]

    # This process's images.
    loader = DataLoader(
        Subset(images, own_indices(len(images))),
        batch_size,
        num_workers=num_workers,
        collate_fn=skip_missing,
        generator=torch.Generator(),  # the global random numbers belong to training
    )
    for batch in tqdm(loader, desc="reconstruction", disable=not process_state().is_main_process):
        if batch is None:
            continue
        rows, features = evaluate(batch["image"].to(device), batch["index"])
        places.append(batch["index"])
        for running, found in zip(statistics, features):
            running.update(found.numpy())
        for name, values in rows.items():
            columns[name].append(values)

    # All processes' images, in the order of the data. All processes see the same rows, so that all raise together.
    places = torch.cat(places)
    rows = {name: gather_rows(torch.cat(values), places, len(images)) for name, values in columns.items()}
    indices = gather_rows(places, places, len(images))
    statistics = [sum_over_processes(running) for running in statistics]
    if not len(indices):
        raise DataError("none of the images can be read")
    broken = indices[~torch.isfinite(rows["errors"][:, 0])]
    if len(broken):
        name = images.source.name(int(broken[0]))
        raise ModelError(f"the reconstruction of {name} is not finite; try float32 weights, or another checkpoint")

    # Means over images, and distances between the sets.
    means = rows["errors"].double().mean(dim=0).tolist()
    metrics = {name: None if math.isnan(value) else value for name, value in zip(PER_IMAGE, means)}
    for running, reference in zip(statistics, references):
        enough = running.count > 1 and reference.mean is not None
        distance = frechet_distance(reference.mean, reference.covariance, *running.finish()) if enough else None
        metrics[metric_name("rFID", reference.extractor)] = distance
    originals, reconstructions = rows["differences"].double().mean(dim=0).numpy()
    metrics["seams"] = relative_seams(reconstructions, originals, size, spatial_compression_ratio(vae))
    moments = rows["latent_moments"].double().mean(dim=0)
    return Reconstruction(
        metrics=metrics,
        bands=dict(zip(band_names(levels), rows["bands"].double().mean(dim=0).tolist())),
        errors=rows["errors"],
        indices=indices,
        images_per_second=1 / min(evaluate.seconds) if evaluate.seconds else None,
        spectra={name: rows[name].mean(dim=0) for name in ("original", "reconstruction", "error", "latent")},
        latent_mean=moments[0],
        latent_std=(moments[1] - moments[0].square()).clamp_min(0).sqrt(),
        latents=rows.get("latents"),
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# The whole evaluation


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
    if images.resolution % 2**levels:
        raise DataError(f"{levels} wavelet levels need a resolution that is a multiple of {2**levels}")
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
