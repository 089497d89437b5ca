"""`favae evaluate compression`: bits and errors of models that write files, beside JPEG, WebP and AVIF."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image, features
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from favae import bitstream
from favae.autoencoders import decode, encode, image_channels, load_autoencoder, measure_budget
from favae.data.image_record import ImageRecord
from favae.data.images import ImageDataset, read_in_order, skip_missing, to_tensor, to_uint8
from favae.distributed import process_state
from favae.errors import ConfigError, DataError, ModelError
from favae.eval.autoencoder_evaluation import check_same_channels
from favae.eval.extraction import PairedDistances
from favae.eval.features import FeatureExtractor
from favae.eval.figures import save_rate_distortion
from favae.eval.reconstruction import PER_IMAGE, band_errors, band_names, check_levels, image_errors
from favae.eval.results import UINT8, number_duplicates, write_results
from favae.eval.spectra import radial_spectrum
from favae.hashing import hash_model
from favae.losses.perceptual import LPIPS
from favae.models import HyperpriorModelFA, VQModelFA
from favae.models.hyperprior_model_fa import LatentCoder

FORMATS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF"}  # Pillow's names
SAVING: dict[str, dict[str, Any]] = {"jpeg": {"optimize": True}, "webp": {"method": 6}, "avif": {}}  # bytes
PILLOW_FEATURES = ("webp", "avif")
QUALITIES = (5, 10, 20, 35, 50, 70, 85, 95)  # of the curves
HIGHEST_QUALITY = 100
SEARCHED_PIXELS = 2**22  # of the images that a quality is sought on, or 24 images
LEVELS = 2  # of the bands
MARGIN = 1.5  # how much further latents may be from their mean than those that frequencies are counted on
COUNTED = 10_000  # training images that frequencies are counted on, at most
CURVED = ("PSNR", "MS-SSIM", "SSIM", "LPIPS")  # metrics that BD-rates are computed of, where there are enough rates
SMALLEST_CURVE = 4  # rates

Codec = Callable[[Tensor], tuple[Tensor, list[int]]]  # (B, C, H, W) in [-1, 1] -> what is decoded, and bytes of each


@dataclass(frozen=True)
class PillowCodec:
    """A format of Pillow's at one quality, 0 to 100, JPEG with optimized tables and WebP with its slowest method."""

    format: Literal["jpeg", "webp", "avif"]
    quality: int

    def __call__(self, images: Tensor) -> tuple[Tensor, list[int]]:
        decoded, sizes = [], []
        for image in to_uint8(images):
            picture, stream = to_pil_image(image), io.BytesIO()
            picture.save(stream, FORMATS[self.format], quality=self.quality, **SAVING[self.format])
            sizes.append(stream.tell())
            with Image.open(stream) as opened:
                decoded.append(to_tensor(opened.convert(picture.mode)))
        return torch.stack(decoded).to(images.device), sizes


def model_codec(model: HyperpriorModelFA) -> Codec:
    """Writes and reads a file for each image: what is counted and measured is what a user has."""

    coder = LatentCoder(model)

    def run(images: Tensor) -> tuple[Tensor, list[int]]:
        files = coder.compress(images)
        return torch.stack(coder.decompress(files)).to(images.device), [len(data) for data in files]

    return run


class TokenizerCodec:
    """A tokenizer that was not made for files: its tokens, or its latents rounded, as often as they are in training.

    Latents are rounded to multiples of `step` times the std of their channel. The tables of how often each number, or
    each token of each codebook, occurs are known to the reader, as the tokenizer is.

    Args:
        vae: an autoencoder with continuous latents, or a `VQModelFA`.
        values: of training images, by `training_values`; their frequencies are counted.
        step: of continuous latents.
    """

    def __init__(self, vae: ModelMixin, values: Tensor, step: float = 1.0):
        self.vae, self.is_codebook = vae, isinstance(vae, VQModelFA)
        self.mean, self.step = torch.zeros(len(values), 1, 1), torch.ones(len(values), 1, 1)
        if not self.is_codebook:
            std, mean = (found.view(-1, 1, 1) for found in torch.std_mean(values, dim=1))
            self.mean, self.step = mean, step * std.masked_fill(std == 0, 1.0)  # of a channel that never changes
        distances = (values.unsqueeze(-1) - self.mean) / self.step
        self.largest = math.ceil(MARGIN * distances.abs().max())  # of the rounded numbers
        self.size = vae.num_tokens if isinstance(vae, VQModelFA) else 2 * self.largest + 1
        symbols = self._symbols(values.unsqueeze(-1)).squeeze(-1)
        self.tables = [self._table(part) for part in self._parts(symbols)]

    def _table(self, symbols: Tensor) -> np.ndarray:
        """(C, N) integers -> how often each occurs, (C, K)."""
        counts = torch.stack([torch.bincount(channel, minlength=self.size) for channel in symbols]) + 0.5
        return (counts / counts.sum(dim=1, keepdim=True)).numpy()

    def _parts(self, symbols: Tensor) -> list[Tensor]:
        """(C, N) integers of one image or of several -> those that have tables of their own, (C, n) each."""
        if not self.is_codebook or self.vae.config.quantizer != "next_band":
            return [symbols]
        counts = [stage.tokens for stage in self.vae.codebook.stages]  # with a codebook each
        return [part.flatten(1) for part in symbols.unflatten(1, (-1, sum(counts))).split(counts, dim=2)]

    def _symbols(self, values: Tensor) -> Tensor:
        """(C', h, w) -> integers from 0 on."""
        if self.is_codebook:
            return values.long()
        return ((values - self.mean) / self.step).round().clamp(-self.largest, self.largest).long() + self.largest

    def __call__(self, images: Tensor) -> tuple[Tensor, list[int]]:
        read, sizes = [], []
        for values in _values(self.vae, images):
            writer, parts = bitstream.Writer(), self._parts(self._symbols(values).flatten(1))
            for part, table in zip(parts, self.tables):
                writer.channels(part.numpy(), table)
            payload = writer.payload()
            sizes.append(bitstream.HEADER_SIZE + len(payload))
            reader = bitstream.Reader(payload)
            found = [reader.channels(part.shape[1], table) for part, table in zip(parts, self.tables)]
            read.append(torch.from_numpy(np.concatenate(found, axis=1)).view(values.shape))
        symbols = torch.stack(read)
        if self.is_codebook:
            indices = symbols.long().movedim(1, -1)
            latents = indices if self.vae.config.quantizer == "residual" else indices[..., 0]
        else:
            latents = ((symbols - self.largest) * self.step + self.mean).to(self.vae.dtype)
        return decode(self.vae, latents.to(self.vae.device)).to(images.device), sizes


@torch.no_grad()
def training_values(vae: ModelMixin, images: Dataset, *, batch_size: int = 32, num_workers: int = 0) -> Tensor:
    """The latents of images, or their tokens: (C, N), on the CPU; the autoencoder moves to the device of the process.

    Raises:
        DataError: if not one image can be read.
    """
    vae.to(process_state().device).eval()
    batches = read_in_order(images, batch_size, num_workers, description="frequencies")
    found = [_values(vae, batch["image"]) for batch in batches]
    if not found:
        raise DataError("not one of the images can be read")
    return torch.cat(found).transpose(0, 1).flatten(1)


def _values(vae: ModelMixin, images: Tensor) -> Tensor:
    """(B, C, H, W) -> latents, or indices, (B, C', h, w), or (B, 1, N) from coarse to fine, on the CPU."""
    latents = encode(vae, images.to(vae.device))
    if isinstance(vae, VQModelFA):
        indices = vae.quantize(latents).indices
        return (indices.movedim(-1, 1) if indices.ndim == 4 else indices.unsqueeze(1)).cpu()
    return latents.float().cpu()


def available_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow can write."""
    return [name for name in FORMATS if name not in PILLOW_FEATURES or features.check(name)]


@torch.no_grad()
def measure_codec(
    codec: Codec,
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    *,
    lpips: LPIPS | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
    description: str = "compression",
) -> tuple[int, dict[str, float | None], list[float]]:
    """How many images could be read, and means over these: bits per pixel of whole files, the errors of `PER_IMAGE`,
    squared errors of bands, FD to the originals, and the share of `high_power` that is left, on clamped images. Then
    the same share at each entry of `radial_spectrum`.

    Raises:
        DataError: if not one image can be read.
    """
    device = process_state().device
    rows, bands, sizes, powers = [], [], [], []
    distances = PairedDistances(extractors)
    for batch in read_in_order(images, batch_size, num_workers, description=description):
        originals = batch["image"].to(device)
        decoded, counts = codec(originals)
        if not decoded.isfinite().all():
            raise ModelError(f"the images of {description} are not finite")
        decoded = decoded.clamp(-1, 1)
        sizes += counts
        rows.append(image_errors(originals, decoded, lpips))
        bands.append(band_errors(decoded - originals, LEVELS))
        powers.append(torch.stack([radial_spectrum(x) for x in (originals, decoded)]).cpu())
        distances.update(originals, decoded)
    if not sizes:
        raise DataError("not one of the images can be read")
    means = torch.cat(rows).double().mean(dim=0).tolist()
    metrics: dict[str, float | None] = {"bpp": 8 * float(np.mean(sizes)) / images.resolution**2}
    metrics |= {name: None if math.isnan(value) else value for name, value in zip(PER_IMAGE, means)}
    metrics |= dict(zip(band_names(LEVELS), torch.cat(bands).double().mean(dim=0).tolist()))
    spectra = torch.cat(powers, dim=1).double().mean(dim=1)
    original, left = high_power(spectra).tolist()
    metrics["power kept"] = left / original if original else None
    metrics |= distances.finish("rFID")
    return len(sizes), metrics, (spectra[1] / spectra[0].clamp(min=1e-12)).tolist()


def high_power(spectra: Tensor) -> Tensor:
    """Of `radial_spectrum`, (B, R) -> (B,): the sum from half of the Nyquist frequency up to it."""
    return spectra[:, spectra.shape[1] // 2 :].sum(dim=1)


def bits_per_pixel(model: HyperpriorModelFA, images: ImageDataset) -> float | None:
    """Of the files of at most 64 images, at even distances; None if not one can be read.

    Raises:
        ModelError: if constriction is not installed.
    """
    batch = skip_missing([images[i] for i in np.linspace(0, len(images) - 1, min(64, len(images))).astype(int)])
    if batch is None:
        return None
    model.update_table()
    return 8 * float(np.mean([len(data) for data in model.compress(batch["image"])])) / images.resolution**2


def matching_quality(format: Literal["jpeg", "webp", "avif"], images: ImageDataset, bpp: float) -> int:
    """The quality at which a format's files of a few of the images are nearest to so many bits per pixel."""
    count = min(len(images), max(24, SEARCHED_PIXELS // images.resolution**2))
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, count).astype(int)]
    batch = skip_missing(chosen)
    if batch is None:
        raise DataError("not one of the images can be read")

    def rate(quality: int) -> float:
        return 8 * float(np.mean(PillowCodec(format, quality)(batch["image"])[1])) / images.resolution**2

    low, high = 0, HIGHEST_QUALITY
    while high - low > 1:  # rates rise with the quality
        middle = (low + high) // 2
        low, high = (middle, high) if rate(middle) < bpp else (low, middle)
    return min((low, high), key=lambda quality: abs(rate(quality) - bpp))


def evaluate_compression(
    models: Sequence[tuple[str, str]],
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    output: Path,
    *,
    data_name: str,
    formats: Sequence[Literal["jpeg", "webp", "avif"]],
    training_images: ImageDataset | None = None,
    steps: Sequence[float] = (0.25, 0.5, 1.0, 2.0),
    lpips: LPIPS | None = None,
    batch_size: int = 8,
    num_workers: int = 0,
) -> list[dict]:
    """Measures models at their rates, and formats of Pillow's at these rates and at others; writes results.json and
    rate_distortion.png.

    Args:
        models: (name, path) each; a name that occurs several times is one curve of as many rates.
        formats: what they are compared with; "jpeg" is left out for RGBA.
        training_images: for tokenizers that were not made for files; see `TokenizerCodec`; all are kept in memory.
            steps: of these, one row each.
    Returns:
        The rows of results.json.
    Raises:
        ModelError: if a model cannot be opened, does not take images of this size, or writes no files and there are no
            training images; or if a package is missing.
        DataError: if the resolution has not that many octaves.
    """
    if clashes := {name for name, _ in models} & FORMATS.keys():
        raise ConfigError(f"a model cannot be called {min(clashes)}, as a format is; name it otherwise")
    if formats:
        bitstream.import_extra("bjontegaard")  # which would be missed at the end
    opened = [(name, path, load_autoencoder(path)) for name, path in models]
    for _, path, model in opened:
        if training_images is None:
            check_writes_files(path, model)
        elif hasattr(model, "quantize") and not isinstance(model, HyperpriorModelFA | VQModelFA):
            raise ModelError(f"{path}: tokens of a {type(model).__name__} cannot be coded, only those of a VQModelFA")
    for name, _, model in opened[1:]:
        check_same_channels(name, model, opened[0][0], opened[0][2])
    check_levels(LEVELS, images.resolution)
    for _, _, model in opened:
        if not isinstance(model, HyperpriorModelFA):  # which pads images
            measure_budget(model, images.resolution)
    images = images.with_channels(image_channels(opened[0][2]))
    if images.channels == len("RGBA"):
        formats = [format for format in formats if format != "jpeg"]  # it has no transparency
    loading = {"lpips": lpips, "batch_size": batch_size, "num_workers": num_workers}
    protocol: dict[str, Any] = {
        "data_name": data_name,
        "data": {"hash": ImageRecord.of(images.source).digest()},
        "training_data": training_images and {"hash": ImageRecord.of(training_images.source).digest()},
        "resolution": images.resolution,
        "crop": "center",
        "uint8": UINT8,
        "features": {extractor.name: extractor.hash for extractor in extractors},
        "lpips": None if lpips is None else {"vgg16": hash_model(lpips)},
    }
    rows: list[dict] = []

    def measure(name: str, codec: Codec, **about) -> float:
        protocol["num_images"], metrics, _ = measure_codec(codec, images, extractors, description=name, **loading)
        rows.append({"model": name, **about, "metrics": metrics})
        write_results(output, "compression", protocol, rows)
        return cast(float, metrics["bpp"])

    qualities = {format: set(QUALITIES) for format in formats}
    for label, (name, path, model) in zip(number_duplicates([name for name, _ in models]), opened):
        about = {"path": path, "params": model.num_parameters()}
        for codec_label, codec in _codecs(
            model, label, training_images, steps, batch_size=batch_size, num_workers=num_workers
        ):
            bpp = measure(name, codec, label=codec_label, **about)
            for format in formats:
                qualities[format].add(matching_quality(format, images, bpp))
    for format, values in qualities.items():
        for quality in sorted(values):
            measure(format, PillowCodec(format, quality), label=f"{format} {quality}", quality=quality)
    if formats:
        protocol |= {"bd_anchor": formats[0], "bd_rates": bd_rates(rows, formats[0])}
    write_results(output, "compression", protocol, rows)
    save_rate_distortion(output / "rate_distortion.png", rows)
    return rows


def _codecs(
    model: ModelMixin, label: str, training_images: ImageDataset | None, steps: Sequence[float], **loading: int
) -> Iterator[tuple[str, Codec]]:
    """A model's codecs, and what their rows are called: one, but of continuous latents one for each step."""
    if isinstance(model, HyperpriorModelFA):
        yield label, model_codec(model.to(process_state().device))
    elif training_images is not None:
        values = training_values(model, training_images.with_channels(image_channels(model)), **loading)
        if isinstance(model, VQModelFA):
            yield label, TokenizerCodec(model, values)
        else:
            for step in steps:
                yield f"{label}, step {step:g}", TokenizerCodec(model, values, step)


def open_compression_model(path: str) -> HyperpriorModelFA:
    """Raises ModelError if there is no model at a path, or it writes no files."""
    model = load_autoencoder(path)
    check_writes_files(path, model)
    return model.to(process_state().device)


def check_writes_files(path: str, model: ModelMixin) -> None:
    """Raises ModelError if a model writes no files."""
    if not isinstance(model, HyperpriorModelFA):
        raise ModelError(f"{path}: a {type(model).__name__} writes no files; a HyperpriorModelFA does")


def bd_rates(rows: list[dict], anchor: str) -> dict[str, dict[str, float]]:
    """By how many percent more bits each curve costs than the anchor's at equal quality, by metric (Bjontegaard, 2001).

    MS-SSIM is taken in decibels, -10 log10(1 - MS-SSIM), as is usual.

    Metrics that are not measured are left out, and those in which a curve rises over fewer than four rates, or the two
    share less than half of the qualities of the shorter one.
    """
    bjontegaard = bitstream.import_extra("bjontegaard")
    curves: dict[str, list[dict]] = {}
    for row in rows:
        curves.setdefault(row["model"], []).append(row["metrics"])
    found: dict[str, dict[str, float]] = {}
    for name, points in curves.items():
        if name == anchor or anchor not in curves:
            continue
        for metric in CURVED:
            if all(point[metric] is not None for point in points):
                pair = [_rising(each, metric) for each in (curves[anchor], points)]
                if min(len(rates) for rates, _ in pair) < SMALLEST_CURVE or not _overlap(*(each[1] for each in pair)):
                    continue
                value = bjontegaard.bd_rate(*pair[0], *pair[1], method="pchip", require_matching_points=False)
                found.setdefault(name, {})[metric] = float(value)
    return found


def _overlap(first: list[float], second: list[float]) -> bool:
    """Whether two rising lists share half of the range of the shorter one."""
    shared = min(first[-1], second[-1]) - max(first[0], second[0])
    return shared >= 0.5 * min(first[-1] - first[0], second[-1] - second[0])


def _rising(points: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """Rates and qualities of a curve by rate, without points that are no better than those of lower rates."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: point["bpp"]):
        quality = _quality(point[metric], metric)
        if not kept or quality > kept[-1][1]:
            kept.append((point["bpp"], quality))
    return [rate for rate, _ in kept], [quality for _, quality in kept]


def _quality(value: float, metric: str) -> float:
    """A metric's value on the axis that BD-rates integrate over: the higher the better."""
    if metric == "MS-SSIM":
        return -10 * math.log10(max(1 - value, 1e-10))
    return -value if metric == "LPIPS" else value
