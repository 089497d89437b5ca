"""How well autoencoders reconstruct images, for `favae evaluate reconstruction`.

Recon, Low and High are mean squared errors in [-1, 1], unclamped, of the image, its Haar LL band, and the mean of LH,
HL and HH; the transform is orthonormal, so Recon = (Low + 3 High) / 4. PSNR, SSIM and MS-SSIM are means over images,
on 8 bits. Seams are those of `favae.eval.seams`, at the borders of what one latent stands for, relative to the images'.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import Subset
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from favae.autoencoders import decode, encode
from favae.data.images import ImageDataset, read_in_order, to_uint8
from favae.distributed import gather_rows, image_generator, own_indices, process_state
from favae.errors import DataError, ModelError
from favae.eval.extraction import ImageStatistics, sum_over_processes
from favae.eval.features import FeatureExtractor, metric_name
from favae.eval.frechet import RunningStatistics, frechet_distance
from favae.eval.seams import neighbor_differences, patch_size_of, relative_seams
from favae.eval.spectra import radial_spectrum
from favae.losses.perceptual import LPIPS, SMALLEST_PERCEPTUAL
from favae.losses.stft import SMALLEST_SSIM
from favae.wavelets import WaveletTransform2D

PER_IMAGE = ("Recon", "Low", "High", "PSNR", "SSIM", "MS-SSIM", "LPIPS")
MS_SSIM_SIZE = 176  # the smallest at which its window of 11 fits into five scales
BANDS = ("LH", "HL", "HH")


def image_errors(images: Tensor, reconstructions: Tensor, lpips: LPIPS | None = None) -> Tensor:
    """The columns of `PER_IMAGE`, one row per image: (B, 7) float32, on the CPU; NaN for what cannot be measured.

    Args:
        images, reconstructions: (B, C, H, W), H and W even, images in [-1, 1]. LPIPS sees them `in_color`.
    """
    images, reconstructions = images.float(), reconstructions.float()
    recon = (reconstructions - images).square().mean((1, 2, 3))
    first, second = to_uint8(images).float() / 255, to_uint8(reconstructions).float() / 255
    psnr = peak_signal_to_noise_ratio(images, reconstructions)
    options = {"data_range": 1.0, "reduction": "none"}
    smallest = min(images.shape[-2:])
    ssim = ms_ssim = distance = torch.full_like(recon, torch.nan)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        low, high = WaveletTransform2D("haar").to(images.device)(reconstructions - images)
        if smallest >= SMALLEST_SSIM:
            ssim = structural_similarity_index_measure(second, first, **options).reshape(-1)
        if smallest >= MS_SSIM_SIZE:
            ms_ssim = multiscale_structural_similarity_index_measure(second, first, **options).reshape(-1)
        if lpips is not None and smallest >= SMALLEST_PERCEPTUAL:
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


def check_levels(levels: int, resolution: int) -> None:
    """Raises DataError if images of this size cannot be halved so often."""
    if resolution % 2**levels:
        raise DataError(f"{levels} wavelet levels need a resolution that is a multiple of {2**levels}")


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
    own = Subset(images, own_indices(len(images)))
    for batch in read_in_order(own, batch_size, num_workers, description="reconstruction"):
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
    metrics["seams"] = relative_seams(reconstructions, originals, size, patch_size_of(vae))
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
