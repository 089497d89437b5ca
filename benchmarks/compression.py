#!/usr/bin/env python
"""How long writing and reading a photograph of 768 x 512 pixels takes, and which share of it the entropy coder has.

    python -m benchmarks.compression                             (the small model of photos_fa_hific)
    python -m benchmarks.compression --recipe configs/compression/fa_hific_low.yaml --rounds 2

Weights are random but for the scales of the latents, which are those of a file of about half a bit per pixel. In every
round a file is written and read; the coder's share is the time that it takes alone for the same numbers. Writes
docs/results/compression_speed.json.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch

from benchmarks.timing import ROOT, environment, make_parser, parse_arguments, write_result
from favae import HyperpriorModelFA, bitstream
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig

HEIGHT, WIDTH = 512, 768


def build(recipe: str) -> HyperpriorModelFA:
    torch.manual_seed(0)
    model = build_model(load_config(TokenizerConfig, recipe).model).eval()
    latents = model.encode(torch.rand(1, 3, 64, 64) * 2 - 1).latents
    model.encoder.conv_out.weight.data /= latents.std() / 1.5
    model.hyper_scales[-1].bias.data += 1.0
    model.update_table()
    return model


class CodedSeconds:
    """Measures what is inside the range coder."""

    def __init__(self):
        self.total = 0.0

    def timed(self, method: Callable) -> Callable:
        def call(*arguments):
            started = time.perf_counter()
            result = method(*arguments)
            self.total += time.perf_counter() - started
            return result

        return call

    @contextmanager
    def measured(self) -> Iterator[None]:
        owners = [
            (bitstream.Writer, ("channels", "gaussians", "payload")),
            (bitstream.Reader, ("channels", "gaussians")),
        ]
        with ExitStack() as stack:
            for owner, names in owners:
                for name in names:
                    stack.enter_context(mock.patch.object(owner, name, self.timed(getattr(owner, name))))
            yield


@torch.no_grad()
def measure(model: HyperpriorModelFA, rounds: int) -> dict:
    coded = CodedSeconds()
    image = torch.nn.functional.interpolate(torch.rand(1, 3, HEIGHT // 8, WIDTH // 8), size=(HEIGHT, WIDTH)) * 2 - 1
    seconds: dict[str, list[float]] = {"compress": [], "decompress": [], "coder_share": []}
    for number in range(rounds + 1):
        coded.total, started = 0.0, time.perf_counter()
        with coded.measured():
            (data,) = model.compress(image)
            written = time.perf_counter()
            model.decompress([data])
        finished = time.perf_counter()
        if number:  # the first round warms up
            seconds["compress"].append(written - started)
            seconds["decompress"].append(finished - written)
            seconds["coder_share"].append(coded.total / (finished - started))
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return found | {"bpp": 8 * len(data) / (HEIGHT * WIDTH), "params": model.num_parameters()}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(str(__doc__))
    parser.add_argument("--recipe", default=str(ROOT / "configs/compression/photos_fa_hific.yaml"))
    arguments = parse_arguments(parser, "compression_speed.json", argv, rounds=5)
    result = measure(build(arguments.recipe), arguments.rounds)
    write_result(arguments.output, environment() | {"size": [WIDTH, HEIGHT], **result})
    print(
        f"{result['compress']:.2f} s to write and {result['decompress']:.2f} s to read {WIDTH} x {HEIGHT} pixels, "
        f"{result['bpp']:.2f} bits per pixel; the entropy coder has {100 * result['coder_share']:.0f} % of both"
    )


if __name__ == "__main__":
    main()
