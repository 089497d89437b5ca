#!/usr/bin/env python
"""What latents in 6 bits cost: bytes, and what is decoded from them against what is decoded from those in float32.

    python scripts/photographs.py --output photographs
    FAVAE_PHOTOGRAPHS=photographs python -m benchmarks.packed_latents --model zoo/flux2-wavelet-tiny

Crops of 128 px of photographs that no model of this repository has learned. Errors and the Fréchet distance (features
of EfficientNet-Lite0) are to the crops themselves, and are more for rounded latents by the shares that are given.
Writes docs/results/packed_latents.json.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.timing import environment, make_parser, parse_arguments, write_result
from experiments.image_sets import InMemoryImages
from experiments.training_sets import PHOTOGRAPHS_128, lite
from favae.autoencoders import decode, load_autoencoder
from favae.data.images import ImageDataset, to_uint8
from favae.data.latent_writing import write_latent_cache
from favae.data.latents import open_latents
from favae.data.sources import Selection
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.frechet import frechet_distance

SETTINGS: dict[str, dict] = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}, "6 bits": {"compress": True}}


def statistics(images: Tensor) -> ImageStatistics:
    return image_statistics(InMemoryImages(to_uint8(images)), [lite()], keep=0)[0]


@torch.no_grad()
def measure(model: str, count: int) -> dict:
    """Bytes per image and view, squared error and FD of what is decoded, for each way to store latents."""
    vae, photographs = load_autoencoder(model).eval(), PHOTOGRAPHS_128.dataset("heldout")
    dataset = ImageDataset(Selection(photographs.source, count), PHOTOGRAPHS_128.size)
    numbers = np.arange(len(dataset))
    images = torch.stack([dataset[int(i)]["image"] for i in numbers])
    real, found = statistics(images), {}
    for name, settings in SETTINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            write_latent_cache(vae, dataset, folder, **settings)
            size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
            cache = open_latents(folder, vae)
            latents = cache.read(numbers, np.zeros_like(numbers))["mean"].float()
        decoded = torch.cat([decode(vae, batch) for batch in latents.split(32)])
        own = statistics(decoded)
        fd = frechet_distance(real.mean, real.covariance, own.mean, own.covariance)
        error = (decoded - images).square().mean().item()
        found[name] = {"bytes": size / len(dataset) / 2, "recon": error, "fd": fd}
    exact = found["float32"]
    for own in found.values():
        own |= {f"{key}_ratio": own[key] / exact[key] for key in ("bytes", "recon", "fd")}
    return {"model": model, "images": len(images), "stored": found}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", action="append", required=True, help="a saved autoencoder; may be repeated")
    parser.add_argument("--images", type=int, default=10_000, help="the first so many")
    arguments = parse_arguments(parser, "packed_latents.json", argv)
    rows = [measure(model, arguments.images) for model in arguments.model]
    for row in rows:
        for name, own in row["stored"].items():
            errors = ", ".join(f"{key} {own[key]:.5g} ({own[f'{key}_ratio'] - 1:+.2%})" for key in ("recon", "fd"))
            print(f"{row['model']}, {name}: {own['bytes']:.0f} bytes, {1 / own['bytes_ratio']:.1f} x fewer; {errors}")
    write_result(arguments.output, {**environment(), "rows": rows})


if __name__ == "__main__":
    main()
