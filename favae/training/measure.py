"""How big a model is and what it costs: parameters, floats per image, FLOPs."""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from favae.models import VQModelFA
from favae.training.config import RunConfig


def floats_per_image(vae: nn.Module, resolution: int) -> int:
    """Numbers in the latent of one square image."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels * (resolution // factor) ** 2


def latent_size(vae: nn.Module, resolution: int) -> dict[str, int | float]:
    """The budget of one square image: {"floats_per_image": ...}, or for a codebook {"tokens_per_image": ...,
    "bits_per_image": ...}."""
    if not isinstance(vae, VQModelFA):
        return {"floats_per_image": floats_per_image(vae, resolution)}
    depth = vae.config.num_quantizers if vae.config.quantizer == "residual" else 1
    tokens = depth * (resolution // vae.stride) ** 2
    return {"tokens_per_image": tokens, "bits_per_image": tokens * math.log2(vae.num_tokens)}


@torch.no_grad()
def flops_per_image(vae: nn.Module, resolution: int) -> int:
    """Floating-point operations of encoding and decoding one square image; a multiplication and an addition are two."""
    device = next(vae.parameters()).device
    image = torch.zeros(1, vae.config.in_channels, resolution, resolution, device=device, dtype=vae.dtype)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see inside it
    with FlopCounterMode(display=False) as counter:
        if isinstance(vae, VQModelFA):
            vae.decode(vae.encode(image).latents, force_not_quantize=True)  # without the search in the codebook
        else:
            vae(image)
    torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops()


def describe_tokenizer(vae: nn.Module, resolution: int) -> str:
    size = latent_size(vae, resolution)
    if "floats_per_image" in size:
        latent = f"{size['floats_per_image']:,} floats"
    else:
        latent = f"{size['tokens_per_image']:,} tokens of {math.log2(vae.num_tokens):.4g} bits"
    return (
        f"tokenizer: {vae.num_parameters():,} parameters, {latent} per {resolution} px image, "
        f"{flops_per_image(vae, resolution) / 1e9:.2f} GFLOP to encode and decode one"
    )


def describe_run(config: RunConfig, num_images: int | None, num_processes: int) -> str:
    """Batch, steps per epoch and epochs, as far as the number of images is known."""
    train = config.train
    batch = train.batch_size * train.gradient_accumulation_steps * num_processes
    text = f"training: {train.steps:,} steps of {batch} images ({num_processes} process(es))"
    if num_images is None:
        return f"{text}; steps per epoch: unknown without data"
    epochs = train.steps * batch / num_images
    return f"{text}; {num_images:,} images, {num_images / batch:,.1f} steps per epoch, {epochs:,.2f} epochs"
