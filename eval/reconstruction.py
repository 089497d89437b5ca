"""How well autoencoders give images back.

    python -m favae.eval.reconstruction --model ours=runs/favae/final --model theirs=stabilityai/sd-vae-ft-mse \\
        --data IMAGES --resolution 256 --output runs/reconstruction
    torchrun --nproc_per_node 8 -m favae.eval.reconstruction ...

Prints a table and writes results.json and comparison.png (originals, reconstructions, errors) into the output folder.
Recon, Low and High are mean squared errors in [-1, 1], unclamped, of the image, its Haar LL band and the mean of LH, HL
and HH; the transform is orthonormal, so Recon = (Low + 3 High) / 4. PSNR and SSIM are means over images, on 8 bits.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm.auto import tqdm

from favae.data.images import (
    DataError,
    ImageDataset,
    add_data_arguments,
    data_name,
    open_data_arguments,
    skip_missing,
    to_uint8,
)
from favae.data.latents import CacheError, check_resolution, load_autoencoder
from favae.distributed import process_state
from favae.eval.features import FeatureExtractor, add_feature_arguments, gather_rows, image_generator, own_indices
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.report import format_table, save_comparison
from favae.foundation import MissingWeights
from favae.losses.perceptual import LPIPS, cached_vgg16
from favae.models import VQModelFA
from favae.training.measure import flops_per_image, latent_size
from favae.wavelets import WaveletTransform2D

logger = logging.getLogger(__name__)

PER_IMAGE = ("recon", "low", "high", "psnr", "ssim", "lpips")


def reconstruct(
    vae, images: Tensor, posterior: str = "mode", generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, unclamped.

    Args:
        posterior: "mode" (the mean) or "sample"; a codebook has neither.
    """
    if isinstance(vae, VQModelFA):
        return vae(images.to(vae.dtype)).sample.float()
    distribution = vae.encode(images.to(vae.dtype)).latent_dist
    latents = distribution.mode() if posterior == "mode" else distribution.sample(generator)
    return vae.decode(latents).sample.float()


def image_errors(images: Tensor, reconstructions: Tensor, lpips: LPIPS | None = None) -> Tensor:
    """The columns of `PER_IMAGE`, one row per image: (B, 6) float32, on the CPU; LPIPS is NaN without its network.

    Args:
        images, reconstructions: (B, 3, H, W), H and W even, images in [-1, 1].
    """
    images, reconstructions = images.float(), reconstructions.float()
    low, high = WaveletTransform2D("haar").to(images.device)(reconstructions - images)
    recon = (reconstructions - images).square().mean((1, 2, 3))
    first, second = to_uint8(images).float() / 255, to_uint8(reconstructions).float() / 255
    squared = (first - second).square().mean((1, 2, 3))
    psnr = -10 * squared.clamp_min(1e-10).log10()  # at most 100 dB
    ssim = structural_similarity_index_measure(second, first, data_range=1.0, reduction="none").reshape(-1)
    distance = torch.full_like(recon, torch.nan) if lpips is None else lpips(reconstructions.clamp(-1, 1), images)
    columns = [recon, low.square().mean((1, 2, 3)), high.square().mean((1, 2, 3, 4)), psnr, ssim, distance]
    return torch.stack(columns, dim=1).cpu()


@torch.no_grad()
def evaluate_reconstruction(
    vae,
    images: ImageDataset,
    extractor: FeatureExtractor,
    *,
    lpips: LPIPS | None = None,
    posterior: str = "mode",
    batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[dict, Tensor]:
    """Measures one autoencoder on all images, in all processes together.

    Returns:
        The results by name, and the errors of each image (N, 6) in the order of `PER_IMAGE`.
    """
    device = process_state().device
    vae = vae.to(device).eval()
    indices = own_indices(len(images))
    loader = DataLoader(Subset(images, indices), batch_size, num_workers=num_workers, collate_fn=skip_missing)
    rows, real, fake, places = [], [], [], []
    for batch in tqdm(loader, desc="reconstruction", disable=not process_state().is_main_process):
        if batch is None:
            continue
        x = batch["image"].to(device)
        y = reconstruct(vae, x, posterior, [image_generator(0, int(i)) for i in batch["index"]])
        rows.append(image_errors(x, y, lpips))
        real.append(extractor(to_uint8(x))[0].cpu())
        fake.append(extractor(to_uint8(y))[0].cpu())
        places.append(batch["index"])
    if not rows:
        raise DataError("not one of the images can be read")
    places = torch.cat(places)
    rows, real, fake = (gather_rows(torch.cat(column), places, len(images)) for column in (rows, real, fake))
    mean = {name: float(value) for name, value in zip(PER_IMAGE, rows.double().mean(dim=0))}
    return {
        **mean,
        "lpips": None if lpips is None else mean["lpips"],
        "rfd": frechet_distance(*feature_statistics(real.numpy()), *feature_statistics(fake.numpy())),
        **latent_size(vae, images.resolution),
        "params": vae.num_parameters(),
        "flops": flops_per_image(vae, images.resolution),
        "num_images": len(rows),
    }, rows


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
    parser.add_argument("--output", required=True)
    add_feature_arguments(parser)
    parser.add_argument(
        "--lpips-weights", help="VGG16: a file, or 'download'; without this, LPIPS is measured if they are cached"
    )
    parser.add_argument("--posterior", choices=["mode", "sample"], default="mode")
    parser.add_argument("--examples", type=int, default=8, help="images in comparison.png")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(arguments)
    except (CacheError, DataError, MissingWeights, ValueError) as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    images = ImageDataset(open_data_arguments(arguments), arguments.resolution)
    extractor = FeatureExtractor(arguments.features, arguments.weights)
    models = {name: load_autoencoder(path) for name, path in arguments.model}
    for vae in models.values():
        check_resolution(vae, arguments.resolution)
    lpips = None
    if arguments.lpips_weights or cached_vgg16():
        file = None if arguments.lpips_weights == "download" else arguments.lpips_weights or cached_vgg16()
        lpips = LPIPS(file, "--lpips-weights FILE takes a local file").to(process_state().device)
    else:
        logger.warning("no LPIPS: its VGG16 weights are not cached; --lpips-weights FILE, or --lpips-weights download")

    results = {}
    for name, vae in models.items():
        results[name], _ = evaluate_reconstruction(
            vae,
            images,
            extractor,
            lpips=lpips,
            posterior=arguments.posterior,
            batch_size=arguments.batch_size,
            num_workers=arguments.num_workers,
        )
    if not process_state().is_main_process:
        return

    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    settings = {
        "data": data_name(arguments),
        "resolution": arguments.resolution,
        "crop": "center",
        "posterior": arguments.posterior,
        "uint8": "round((x + 1) * 127.5)",
        "features": extractor.name,
        "reference": "the same images",
        "num_processes": process_state().num_processes,
    }
    (output / "results.json").write_text(json.dumps({"settings": settings, "models": results}, indent=1))
    chosen = np.random.default_rng(0).permutation(len(images))[: arguments.examples]
    examples = skip_missing([images[int(i)] for i in chosen])
    if examples is not None:
        x = examples["image"].to(process_state().device)
        with torch.no_grad():
            decoded = {name: reconstruct(vae, x, arguments.posterior).cpu() for name, vae in models.items()}
        save_comparison(output / "comparison.png", examples["image"], decoded)
    count = next(iter(results.values()))["num_images"]
    print(f"{count} images of {data_name(arguments)} at {arguments.resolution} px, posterior {arguments.posterior}")
    print(format_table(results, extractor.name))


if __name__ == "__main__":
    main()
