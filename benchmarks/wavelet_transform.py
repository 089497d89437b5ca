#!/usr/bin/env python
"""Speed of the wavelet transform against the same transform written as one strided convolution.

    OMP_NUM_THREADS=1 python -m benchmarks.wavelet_transform            (256 px; ten minutes on a CPU)

Both handle the same batch in turn in every round: transform and inverse alone, with and without gradients, and the
encoding and decoding of an `AutoencoderKLFA` of default size. CPU times are compared, which other programs on the
machine change less than the time on the clock. Writes docs/results/wavelet_transform.json.
"""

import copy
import statistics
from collections.abc import Callable

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import environment, make_parser, parse_arguments, speedup, time_paired, with_range, write_result
from favae import AutoencoderKLFA
from favae.wavelets import InverseWaveletTransform2D, WaveletBands, WaveletTransform2D

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


def compare(ours: Callable[[], Tensor], reference: Callable[[], Tensor], rounds: int) -> dict:
    """Speed relative to the reference, and the largest difference between both results."""
    timings = time_paired({"ours": ours, "reference": reference}, rounds=rounds)
    own, other = timings["ours"], timings["reference"]
    return {
        **speedup(own.cpu_seconds, other.cpu_seconds),
        "milliseconds": 1e3 * statistics.median(own.cpu_seconds),
        "milliseconds_reference": 1e3 * statistics.median(other.cpu_seconds),
        "max_difference": float((own.result - other.result).abs().max()),
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


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="of the transform alone")
    arguments = parse_arguments(parser, "wavelet_transform.json", argv, rounds=31)

    # Both sides see the same images.
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.resolution, arguments.resolution)
    results = {wavelet: compare_transforms(wavelet, images, arguments.rounds) for wavelet in WAVELETS}
    results["AutoencoderKLFA"] = {"encode_decode": compare_autoencoders(arguments.resolution, arguments.rounds)}

    settings = {name: getattr(arguments, name) for name in ("rounds", "batch_size", "resolution")}
    write_result(arguments.output, environment() | settings | {"results": results})
    for name, rows in results.items():
        for part, row in rows.items():
            print(f"{name:18}{part:16}{row['milliseconds']:8.1f} ms, {with_range(row)} the reference")


if __name__ == "__main__":
    main()
