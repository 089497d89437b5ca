#!/usr/bin/env python
"""Speed of the wavelet transform against the same transform written as one strided convolution, paired.

    python benchmarks/wavelet_transform.py                                          (256 px, on this machine's CPU)

In each round both handle the same batch: transform and inverse alone, with and without gradients, and the encoding and
decoding of an `AutoencoderKLFA` of default size. Prints the ratios of the times (median over the rounds, with the
quartiles; below 1 the library's transform is faster) and writes docs/results/wavelet_transform.json. Times are CPU
seconds of this process, which other programs on the machine change less than the time on the clock.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae import AutoencoderKLFA
from favae.wavelets import InverseWaveletTransform2D, WaveletBands, WaveletTransform2D

ROOT = Path(__file__).resolve().parent.parent
WAVELETS = ("haar", "db2", "bior4.4")


def filter_bank(low: list[float], high: list[float]) -> Tensor:
    """(4, 1, length, length), in the order LL, LH, HL, HH."""
    low, high = torch.tensor(low), torch.tensor(high)
    pairs = [(low, low), (high, low), (low, high), (high, high)]
    return torch.stack([torch.outer(rows, columns) for rows, columns in pairs]).unsqueeze(1)


class StridedConvolution(nn.Module):
    """The reference for `WaveletTransform2D`: circular padding and one convolution of stride 2."""

    def __init__(self, wavelet: str):
        super().__init__()
        bank = pywt.Wavelet(wavelet)
        self.padding = bank.dec_len // 2 - 1
        self.register_buffer("filters", filter_bank(bank.dec_lo[::-1], bank.dec_hi[::-1]))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels, height, width = images.shape
        images = images.reshape(batch * channels, 1, height, width)
        if self.padding:
            images = F.pad(images, (self.padding,) * 4, mode="circular")
        bands = F.conv2d(images, self.filters, stride=2).reshape(batch, channels, 4, height // 2, width // 2)
        return bands[:, :, 0], bands[:, :, 1:]


class StridedTransposedConvolution(nn.Module):
    """The reference for `InverseWaveletTransform2D`."""

    def __init__(self, wavelet: str):
        super().__init__()
        bank = pywt.Wavelet(wavelet)
        self.length = bank.rec_len
        self.register_buffer("filters", filter_bank(bank.rec_lo, bank.rec_hi))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        batch, channels, height, width = low.shape
        bands = torch.cat([low.unsqueeze(2), high], dim=2).reshape(batch * channels, 4, height, width)
        wrap = self.length // 4  # coefficients that reach over the border
        if wrap:
            bands = F.pad(bands, (wrap,) * 4, mode="circular")
        images = F.conv_transpose2d(bands, self.filters, stride=2)
        start = self.length // 2 - 1 + 2 * wrap
        images = images[:, :, start : start + 2 * height, start : start + 2 * width]
        return images.reshape(batch, channels, 2 * height, 2 * width)


def with_reference(model: nn.Module) -> nn.Module:
    """A copy of an autoencoder whose transforms are the reference's."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, WaveletBands):
            wavelet = module.transform.wavelet
            module.transform = StridedConvolution(wavelet)
            module.inverse_transform = StridedTransposedConvolution(wavelet)
    return model


def seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def compare(ours: Callable[[], Tensor], reference: Callable[[], Tensor], rounds: int) -> dict:
    """Ratios of paired times; which of the two goes first alternates."""
    difference = float((ours() - reference()).abs().max())  # warms both up, too
    pairs = []
    for i in range(rounds):
        if i % 2:
            other, own = seconds(reference), seconds(ours)
        else:
            own, other = seconds(ours), seconds(reference)
        pairs.append((own, other))
    quartiles = statistics.quantiles([own / other for own, other in pairs], n=4)
    return {
        "ratio": quartiles[1],
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "milliseconds": 1e3 * statistics.median(own for own, _ in pairs),
        "milliseconds_reference": 1e3 * statistics.median(other for _, other in pairs),
        "max_difference": difference,
    }


def compare_transforms(wavelet: str, images: Tensor, rounds: int) -> dict:
    """Transform and inverse alone."""
    pairs = {
        "ours": (WaveletTransform2D(wavelet), InverseWaveletTransform2D(wavelet)),
        "reference": (StridedConvolution(wavelet), StridedTransposedConvolution(wavelet)),
    }

    def forward(name: str) -> Tensor:
        transform, inverse = pairs[name]
        return inverse(*transform(images))

    def with_gradient(name: str) -> Tensor:
        transform, inverse = pairs[name]
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(inverse(*transform(leaf)).square().sum(), leaf)[0]

    with torch.no_grad():
        result = {"forward": compare(lambda: forward("ours"), lambda: forward("reference"), rounds)}
    result["with_gradient"] = compare(lambda: with_gradient("ours"), lambda: with_gradient("reference"), rounds)
    return result


@torch.no_grad()
def compare_autoencoders(resolution: int, rounds: int) -> dict:
    """Encoding and decoding one image with an `AutoencoderKLFA`, random weights."""
    model = AutoencoderKLFA().eval()
    reference = with_reference(model)
    image = torch.rand(1, 3, resolution, resolution) * 2 - 1
    return compare(lambda: model(image).sample, lambda: reference(image).sample, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="of the transform alone")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/results/wavelet_transform.json")
    arguments = parser.parse_args()

    # both sides see the same images
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    results = {wavelet: compare_transforms(wavelet, images, arguments.rounds) for wavelet in WAVELETS}
    results["AutoencoderKLFA"] = {"encode_decode": compare_autoencoders(arguments.resolution, arguments.rounds)}

    settings = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    settings |= {name: getattr(arguments, name) for name in ("rounds", "batch_size", "resolution")}
    arguments.output.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n")

    print(f"{'':18}{'':16}{'ms':>9}{'reference':>11}{'ratio':>8}{'quartiles':>16}")
    for name, rows in results.items():
        for part, row in rows.items():
            spread = "{:.3f}-{:.3f}".format(*row["ratio_quartiles"])
            times = f"{row['milliseconds']:9.1f}{row['milliseconds_reference']:11.1f}"
            print(f"{name:18}{part:16}{times}{row['ratio']:8.3f}{spread:>16}")


if __name__ == "__main__":
    main()
