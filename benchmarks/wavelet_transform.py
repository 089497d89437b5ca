#!/usr/bin/env python
"""How fast the wavelet transform is, relative to the same transform written as one strided convolution.

    python -m benchmarks.wavelet_transform           (256 px; minutes on a CPU)

Both handle the same images in turn in every round: transform and inverse alone, with and without gradients, and the
encoding and decoding of one image by an `AutoencoderKLFA` of default size. Weights are random, since speed does not
depend on them. On a CPU the times are CPU seconds. Writes docs/results/wavelet_transform.json.
"""

import copy
from collections.abc import Callable

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import (
    device,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
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
            module.transform = StridedConvolution(wavelet).to(device())
            module.inverse_transform = StridedTransposedConvolution(wavelet).to(device())
    return model


def compare(ours: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], x: Tensor, rounds: int) -> dict:
    """Times of both, how many times as fast ours is, and how much their results differ."""
    timings = time_paired({"ours": lambda: ours(x), "reference": lambda: reference(x)}, rounds=rounds)
    seconds = {name: timing.seconds if x.is_cuda else timing.cpu_seconds for name, timing in timings.items()}
    return {
        **speedup(seconds["ours"], seconds["reference"]),
        "milliseconds": {name: 1e3 * sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "max_difference": float((timings["ours"].result - timings["reference"].result).abs().max()),
    }


def round_trip(transform: nn.Module, inverse: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images -> the same images, by the transform and its inverse."""
    return torch.no_grad()(lambda images: inverse(*transform(images)))


def gradient(transform: nn.Module, inverse: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images -> the gradient of the squared sum of what the transform and its inverse give."""

    def differentiate(images: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        return torch.autograd.grad(inverse(*transform(leaf)).square().sum(), leaf)[0]

    return differentiate


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="of the transform alone")
    arguments = parse_arguments(parser, "wavelet_transform.json", rounds=31, argv=argv)

    torch.manual_seed(0)
    size, results = arguments.resolution, {}
    images = (torch.rand(arguments.batch_size, 3, size, size) * 2 - 1).to(device())
    for wavelet in WAVELETS:
        ours = WaveletTransform2D(wavelet).to(device()), InverseWaveletTransform2D(wavelet).to(device())
        reference = StridedConvolution(wavelet).to(device()), StridedTransposedConvolution(wavelet).to(device())
        for name, make in (("transform", round_trip), ("gradient", gradient)):
            results[f"{name}, {wavelet}"] = compare(make(*ours), make(*reference), images, arguments.rounds)

    model = AutoencoderKLFA().to(device()).eval()
    other = with_reference(model)
    calls = [torch.no_grad()(lambda image, vae=vae: vae(image).sample) for vae in (model, other)]
    results["encode and decode, AutoencoderKLFA"] = compare(*calls, images[:1], arguments.rounds)

    for name, result in results.items():
        print(f"{name:36}{result['milliseconds']['ours']:10.1f} ms, {with_range(result, digits=3)}")
    settings = {key: getattr(arguments, key) for key in ("rounds", "batch_size", "resolution")}
    write_result(arguments.output, environment() | settings | {"results": results})


if __name__ == "__main__":
    main()
