"""The precision in which a processor trains faster."""

from functools import cache

import torch
from torch import nn

from benchmarks.timing import device, time_paired


@cache
def fastest_precision() -> str:
    """ "bf16" or "no", measured on convolutions: on some processors bf16 is 20 times as slow as float32."""
    layers = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
    layers, images = (x.to(device(), memory_format=torch.channels_last) for x in (layers, torch.randn(8, 64, 32, 32)))

    def step(enabled: bool) -> None:
        with torch.autocast(device(), torch.bfloat16, enabled=enabled):
            layers(images).float().square().mean().backward()

    timings = time_paired({"no": lambda: step(False), "bf16": lambda: step(True)}, rounds=5)
    return min(timings, key=lambda name: timings[name].median)
