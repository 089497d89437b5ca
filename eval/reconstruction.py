"""How well autoencoders give images back.

    python -m favae.eval.reconstruction --model ours=runs/favae/final --model theirs=stabilityai/sd-vae-ft-mse \\
        --data IMAGES --resolution 256 --output runs/reconstruction
    torchrun --nproc_per_node 8 -m favae.eval.reconstruction ...

Takes any autoencoder of diffusers and ours; a name given twice stands for two seeds of one model. Prints a table;
writes results.json, comparison.png (the worst images first), spectra.png and latents.png.

Recon, Low and High are mean squared errors in [-1, 1], unclamped, of the image, its Haar LL band and the mean of LH, HL
and HH; the transform is orthonormal, so Recon = (Low + 3 High) / 4. PSNR, SSIM and MS-SSIM are means over images, on
8 bits. rFID compares with the same images unless --reference names statistics; each image is the centre crop.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)
from tqdm.auto import tqdm

from favae.autoencoders import decode, encode, load_autoencoder, measure_budget
from favae.data.images import ImageDataset, skip_missing, to_uint8
from favae.data.sources import add_data_arguments, data_name, open_data_arguments
from favae.distributed import process_state
from favae.errors import DataError, FavaeError, ModelError, hint
from favae.eval.extraction import ImageStatistics, image_statistics, sum_over_processes
from favae.eval.features import (
    FeatureExtractor,
    add_feature_arguments,
    everyone,
    gather_rows,
    image_generator,
    metric_name,
    open_extractors,
    own_indices,
)
from favae.eval.figures import radial_spectrum, save_comparison, save_latents, save_spectra
from favae.eval.frechet import RunningStatistics, frechet_distance
from favae.eval.image_sets import CroppedImages
from favae.eval.references import Reference
from favae.eval.results import UINT8, format_table, one_line, shown_metrics, write_results
from favae.hashing import hash_model
from favae.losses.perceptual import LPIPS, cached_vgg16
from favae.wavelets import WaveletTransform2D

logger = logging.getLogger(__name__)

PER_IMAGE = ("Recon", "Low", "High", "PSNR", "SSIM", "MS-SSIM", "LPIPS")
MS_SSIM_SIZE = 176  # the smallest at which its window of 11 fits into five scales
BANDS = ("LH", "HL", "HH")


def image_errors(images: Tensor, reconstructions: Tensor, lpips: LPIPS | None = None) -> Tensor:
    """The columns of `PER_IMAGE`, one row per image: (B, 7) float32, on the CPU; NaN for what cannot be measured.

    Args:
        images, reconstructions: (B, 3, H, W), H and W even, images in [-1, 1].
    """
    images, reconstructions = images.float(), reconstructions.float()
    low, high = WaveletTransform2D("haar").to(images.device)(reconstructions - images)
    recon = (reconstructions - images).square().mean((1, 2, 3))
    first, second = to_uint8(images).float() / 255, to_uint8(reconstructions).float() / 255
    squared = (first - second).square().mean((1, 2, 3))
    psnr = -10 * squared.clamp_min(1e-10).log10()  # at most 100 dB
    options = {"data_range": 1.0, "reduction": "none"}
    ssim = structural_similarity_index_measure(second, first, **options).reshape(-1)
    ms_ssim = distance = torch.full_like(recon, torch.nan)
    if min(images.shape[-2:]) >= MS_SSIM_SIZE:
        ms_ssim = multiscale_structural_similarity_index_measure(second, first, **options).reshape(-1)
    if lpips is not None:
        distance = lpips(reconstructions.clamp(-1, 1), images)
    columns = [recon, low.square().mean((1, 2, 3)), high.square().mean((1, 2, 3, 4)), psnr, ssim, ms_ssim, distance]
    return torch.stack(columns, dim=1).cpu()


def band_names(levels: int) -> list[str]:
    """LH1, HL1, HH1, LH2, ... and the LL that is left, as `band_errors` orders them."""
    return [f"{band}{level}" for level in range(1, levels + 1) for band in BANDS] + [f"LL{levels}"]


def band_errors(difference: Tensor, levels: int) -> Tensor:
    """Mean squared Haar coefficients of an error in each band: (B, 3, H, W) -> (B, 3 levels + 1), on the CPU.

    Level 1 is the finest. Bands weighted by their size add up to Recon.
    """
    transform, columns = WaveletTransform2D("haar").to(difference.device), []
    for _ in range(levels):
        difference, high = transform(difference)
        columns.append(high.square().mean((1, 3, 4)))
    return torch.cat([*columns, difference.square().mean((1, 2, 3))[:, None]], dim=1).cpu()


@dataclass
class Reconstruction:
    """What `evaluate_reconstruction` found.

    Attributes:
        metrics: means over images and Fréchet distances, by name; None for what could not be measured.
        bands: mean squared error of each wavelet band.
        errors: (N, 7), the columns of `PER_IMAGE`. indices: (N,), the images' places in the data.
        images_per_second: encoding and decoding, of one process.
        spectra: "original", "reconstruction", "error", "latent": see `radial_spectrum`.
        latent_mean, latent_std: (C,), over images and positions.
    """

    metrics: dict[str, float | None]
    bands: dict[str, float]
    errors: Tensor
    indices: Tensor
    images_per_second: float | None
    spectra: dict[str, Tensor]
    latent_mean: Tensor
    latent_std: Tensor


@torch.no_grad()
def evaluate_reconstruction(
    vae,
    images: ImageDataset,
    extractors: Sequence[FeatureExtractor],
    references: Sequence[ImageStatistics],
    *,
    lpips: LPIPS | None = None,
    posterior: str = "mode",
    levels: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
) -> Reconstruction:
    """Measures one autoencoder on all images, in all processes together.

    Args:
        references: of each extractor, what the reconstructions' features are compared with.
        levels: of the transform, for the errors per band.
    Raises:
        ModelError: if a reconstruction is not finite.
        DataError: if no image can be read.
    """
    device = process_state().device
    vae = vae.to(device).eval()
    seconds = []

    def look(x: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """Everything that is kept of a batch, one row per image."""
        started = _now(device)
        z = encode(vae, x, posterior, [image_generator(0, int(i)) for i in indices])
        y = decode(vae, z)
        seconds.append((_now(device) - started) / len(x))
        z = z.float()
        spectra = {"original": x, "reconstruction": y, "error": y - x, "latent": z}
        found = {
            "errors": image_errors(x, y, lpips),
            "bands": band_errors(y - x, levels),
            "latent_moments": torch.stack([z.mean((2, 3)), z.square().mean((2, 3))], dim=1),
            **{name: radial_spectrum(values) for name, values in spectra.items()},
        }
        for i, extractor in enumerate(extractors):
            found[f"features{i}"] = extractor(to_uint8(y))["features"]
        return {name: values.cpu() for name, values in found.items()}

    # also a process that sees no readable image must know the shapes
    empty = look(torch.zeros(1, 3, images.resolution, images.resolution, device=device), torch.zeros(1))
    statistics = [RunningStatistics(empty.pop(f"features{i}").shape[1]) for i in range(len(extractors))]
    columns = {name: [values[:0]] for name, values in empty.items()}
    places = [torch.zeros(0, dtype=torch.int64)]
    seconds.clear()  # it was a warm-up too
    loader = DataLoader(
        Subset(images, own_indices(len(images))), batch_size, num_workers=num_workers, collate_fn=skip_missing
    )
    for batch in tqdm(loader, desc="reconstruction", disable=not process_state().is_main_process):
        if batch is None:
            continue
        found = look(batch["image"].to(device), batch["index"])
        places.append(batch["index"])
        for i, running in enumerate(statistics):
            running.update(found.pop(f"features{i}").numpy())
        for name, values in found.items():
            columns[name].append(values)
    places = torch.cat(places)
    rows = {name: gather_rows(torch.cat(values), places, len(images)) for name, values in columns.items()}
    indices = gather_rows(places, places, len(images))
    statistics = [sum_over_processes(running) for running in statistics]
    if not len(indices):
        raise DataError("not one of the images can be read")
    broken = indices[~torch.isfinite(rows["errors"][:, 0])]
    if len(broken):  # all processes see the same rows, and so all raise
        name = images.source.name(int(broken[0]))
        raise ModelError(f"the reconstruction of {name} is not finite; try float32 weights, or another checkpoint")

    means = rows["errors"].double().mean(dim=0).tolist()
    metrics = {name: None if value != value else value for name, value in zip(PER_IMAGE, means)}  # NaN
    for running, reference in zip(statistics, references):
        enough = running.count > 1 and reference.mean is not None
        distance = frechet_distance(reference.mean, reference.covariance, *running.finish()) if enough else None
        metrics[metric_name("rFID", reference.features)] = distance
    moments = rows["latent_moments"].double().mean(dim=0)
    return Reconstruction(
        metrics=metrics,
        bands=dict(zip(band_names(levels), rows["bands"].double().mean(dim=0).tolist())),
        errors=rows["errors"],
        indices=indices,
        images_per_second=1 / min(seconds) if seconds else None,
        spectra={name: rows[name].mean(dim=0) for name in ("original", "reconstruction", "error", "latent")},
        latent_mean=moments[0],
        latent_std=(moments[1] - moments[0].square()).clamp_min(0).sqrt(),
    )


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def named_model(text: str) -> tuple[str, str]:
    """NAME=PATH, or PATH alone, which is then its name."""
    name, separator, path = text.partition("=")
    return (name, path) if separator else (Path(text).name, text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", required=True, type=named_model, metavar="[NAME=]PATH", help="may be repeated"
    )
    add_data_arguments(parser, "--data", split="validation")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    add_feature_arguments(parser)
    parser.add_argument("--reference", help="statistics for rFID (.safetensors or .npz) in place of the images' own")
    parser.add_argument(
        "--lpips-weights", help="VGG16: a file, or 'download'; without this, LPIPS is measured if they are cached"
    )
    parser.add_argument("--posterior", choices=["mode", "sample"], default="mode")
    parser.add_argument("--levels", type=int, default=3, help="of the transform, for the errors per band")
    parser.add_argument("--examples", type=int, default=8, help="images in comparison.png")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(arguments)
    except (FavaeError, OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: results.json has the models that were finished")


def run(arguments: argparse.Namespace) -> None:
    if arguments.levels < 1 or arguments.resolution % 2**arguments.levels:
        raise DataError(f"--levels {arguments.levels} needs a --resolution that 2^levels divides")
    images = ImageDataset(open_data_arguments(arguments), arguments.resolution)
    extractors = open_extractors(arguments)
    lpips = _open_lpips(arguments.lpips_weights)
    loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    statistics = Reference(arguments.reference, extractors, None) if arguments.reference else None
    originals = references = image_statistics(
        CroppedImages(images), extractors, keep=0, description="originals", **loading
    )
    if statistics is not None:
        references = statistics.statistics((arguments.resolution, arguments.resolution), **loading)
    protocol = {
        "num_images": originals[0].count,
        "data": {"hash": originals[0].hash},
        "data_name": data_name(arguments),
        "resolution": arguments.resolution,
        "crop": "center",
        "posterior": arguments.posterior,
        "uint8": UINT8,
        "features": {extractor.name: extractor.hash for extractor in extractors},
        "reference": {r.features: {"hash": r.hash, "num_images": r.count} for r in references},
        "reference_name": arguments.reference or "the same images",
        "lpips": None if lpips is None else {"vgg16": hash_model(lpips)},
    }

    rows, finished, failures = [], [], []
    for name, path in arguments.model:
        error = vae = None
        try:
            vae = load_autoencoder(path)
            budget = measure_budget(vae, arguments.resolution)
        except ModelError as caught:
            error = caught
        if not everyone(error is None):
            failures.append(f"{name}: {error or 'it failed in another process'}")
            continue  # the other models have nothing to do with it
        try:
            result = evaluate_reconstruction(
                vae,
                images,
                extractors,
                references,
                lpips=lpips,
                posterior=arguments.posterior,
                levels=arguments.levels,
                **loading,
            )
        except ModelError as caught:  # in all processes
            failures.append(f"{name}: {caught}")
            continue
        finished.append((name, vae.cpu(), result))
        speed = {"images_per_second": result.images_per_second, "batch_size": arguments.batch_size}
        about = {"model": name, "path": path, "metrics": result.metrics, "bands": result.bands}
        rows.append({**about, **asdict(budget), **speed})
        if process_state().is_main_process:  # after each model, so that nothing is lost when a later one fails
            write_results(arguments.output, "reconstruction", protocol, rows)
    if process_state().is_main_process and rows:
        save_pictures(arguments, images, finished)
        against = f"against {arguments.reference}" if arguments.reference else "against the same images"
        print(
            f"{protocol['num_images']:,} images of {data_name(arguments)} at {arguments.resolution} px, centre crop, "
            f"posterior {arguments.posterior}, {extractors[0].metric('rFID')} {against}"
        )
        print(format_table([table_row(row) for row in rows]))
    if failures:
        raise ModelError("; ".join(failures))


def table_row(row: dict) -> dict[str, str]:
    """The numbers of one model as they are shown, by heading."""
    tokens = row.get("tokens_per_image")
    latent = f"{tokens:,} tokens, {row['bits_per_image']:,.0f} bits" if tokens else f"{row['floats_per_image']:,}"
    return {
        "model": row["model"],
        **shown_metrics(row),
        "floats/image": latent,
        "f": str(row["factor"]),
        "parameters": f"{row['params'] / 1e6:.2f}M",
        "GFLOP": f"{row['flops'] / 1e9:.2f}",
        "images/s": f"{row['images_per_second'] or 0:.1f}",
    }


def save_pictures(arguments: argparse.Namespace, images: ImageDataset, finished: list[tuple]) -> None:
    """comparison.png, spectra.png and latents.png of the models that were measured."""
    names = [
        name if all(name != n for n, _, _ in finished[:i]) else f"{name} ({i})"
        for i, (name, _, _) in enumerate(finished)
    ]
    results = {name: result for name, (_, _, result) in zip(names, finished)}
    worst = torch.stack([result.errors[:, 0] for result in results.values()]).mean(dim=0)
    chosen = worst.argsort(descending=True)[: arguments.examples]
    indices = [int(next(iter(results.values())).indices[i]) for i in chosen]
    x = torch.stack([images[i]["image"] for i in indices]).to(process_state().device)
    decoded = {}
    for name, (_, vae, _) in zip(names, finished):
        vae = vae.to(x.device)
        with torch.no_grad():
            z = encode(vae, x, arguments.posterior, [image_generator(0, i) for i in indices])
            decoded[name] = decode(vae, z).cpu()
        vae.cpu()
    save_comparison(arguments.output / "comparison.png", x.cpu(), decoded, worst[chosen].tolist())
    original = next(iter(results.values())).spectra["original"]
    of = {kind: {n: r.spectra[kind] for n, r in results.items()} for kind in ("reconstruction", "error", "latent")}
    save_spectra(arguments.output / "spectra.png", original, of["reconstruction"], of["error"])
    means = {name: result.latent_mean for name, result in results.items()}
    stds = {name: result.latent_std for name, result in results.items()}
    save_latents(arguments.output / "latents.png", of["latent"], means, stds)


def _open_lpips(weights: str | None) -> LPIPS | None:
    if weights is None and not cached_vgg16():
        logger.warning("no LPIPS: its VGG16 weights are not cached; --lpips-weights FILE, or --lpips-weights download")
        return None
    file = None if weights == "download" else weights or cached_vgg16()
    with hint("--lpips-weights FILE takes a local file"):
        return LPIPS(file).to(process_state().device)


if __name__ == "__main__":
    main()
