#!/usr/bin/env python
"""What the decoders of the recipes for existing latents cost, beside the stock decoders of these latents.

    python -m benchmarks.decoder_cost

Every decoder of one latent space decodes one image of 256 px in turn in every round; the reference is the stock one.
Shapes are the published ones; weights are random, since cost does not depend on them. Writes
docs/results/decoder_cost.json.
"""

import statistics

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import (
    ROOT,
    device,
    environment,
    make_parser,
    parse_arguments,
    speedup,
    time_paired,
    with_range,
    write_result,
)
from favae import AsymmetricAutoencoderKLFA
from favae.autoencoders import CPU_ATTENTION_FLOPS, decode
from favae.training.config import load_config
from favae.training.models import build_model
from favae.training.tokenizer_config import TokenizerConfig

LATENT_SIDE = 32  # of an image of 256 px
SHAPE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
CHANNELS = {"sd": 4, "flux1": 16, "flux2": 32, "qwen": 16}


def stock(space: str) -> ModelMixin:
    if space == "qwen":
        return AutoencoderKLQwenImage()
    if space == "flux2":
        return AutoencoderKLFlux2(**SHAPE, latent_channels=CHANNELS[space])
    has_convs = space == "sd"
    convs = {"use_quant_conv": has_convs, "use_post_quant_conv": has_convs}
    return AutoencoderKL(**SHAPE, **convs, latent_channels=CHANNELS[space])


def recipe(space: str, size: str) -> ModelMixin:
    """The model of a recipe, with the stock encoder's shape where the recipe takes its weights from the hub."""
    settings = dict(load_config(TokenizerConfig, ROOT / f"configs/tokenizer/{space}_{size}.yaml").model)
    if settings.pop("from_autoencoder_kl", None) is None:
        return build_model(settings)
    del settings["name"]
    return AsymmetricAutoencoderKLFA.from_autoencoder_kl(stock(space), **settings)


def decoders(space: str) -> dict[str, ModelMixin]:
    """The stock decoder of a latent space, those of its recipes, and FLUX.2's own small one."""
    models = {"stock": stock(space), **{size: recipe(space, size) for size in ("small", "tiny")}}
    if space == "flux2":
        shape = {**SHAPE, "decoder_block_out_channels": (96, 192, 384, 384), "latent_channels": CHANNELS[space]}
        models["own small"] = AutoencoderKLFlux2(**shape)
    return {name: vae.to(device()).eval() for name, vae in models.items()}


@torch.no_grad()
def compare(space: str, rounds: int) -> dict[str, dict]:
    latents = torch.randn(1, CHANNELS[space], LATENT_SIDE, LATENT_SIDE, device=device())
    models = decoders(space)
    timings = time_paired({name: lambda vae=vae: decode(vae, latents) for name, vae in models.items()}, rounds=rounds)
    results = {}
    for name, vae in models.items():
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
            decode(vae, latents)
        row = results[f"{space} {name}"] = {
            "gflop": counter.get_total_flops() / 1e9,
            "params": sum(parameter.numel() for parameter in vae.decoder.parameters()),
            "images_per_second": 1 / statistics.median(timings[name].seconds),
            **speedup(timings[name].seconds, timings["stock"].seconds),
        }
        print(
            f"{space} {name:10}{row['gflop']:8.1f} GFLOP, {row['params'] / 1e6:6.1f} M, {with_range(row)}", flush=True
        )
    return results


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(str(__doc__))
    parser.add_argument("--spaces", nargs="*", choices=list(CHANNELS), default=list(CHANNELS))
    arguments = parse_arguments(parser, "decoder_cost.json", argv, rounds=5)
    results = {}
    for space in arguments.spaces:
        results |= compare(space, arguments.rounds)
    write_result(arguments.output, environment() | {"rounds": arguments.rounds, "results": results})


if __name__ == "__main__":
    main()
