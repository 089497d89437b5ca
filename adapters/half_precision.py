"""The same autoencoder with smaller numbers inside, for float16, which ends at 65,504."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from favae.autoencoders import reconstruct
from favae.errors import ModelError

LIMIT = 1000.0  # of an activation: other images may have larger ones, and sums are rounded on their way
TOLERANCE = 1e-3  # of images in [-1, 1]


@dataclass
class Segment:
    """The layers of one size. Each adds to the same features, and what reads these normalizes them first.

    Attributes:
        entry: the convolution that the features begin with.
        resnets, attentions: the layers that add to them.
    """

    entry: nn.Module
    resnets: list[ResnetBlock2D] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)


@dataclass
class HalfPrecisionReport:
    """What `limit_activations` has done.

    Attributes:
        largest_before, largest_after: activation, |h|, of the test images.
        difference: the most that a value of the reconstructions has changed, of images in [-1, 1], in float32.
        half_difference: the same between float16 after and float32 before; NaN if float16 overflows somewhere else.
    """

    largest_before: float
    largest_after: float
    difference: float
    half_difference: float


@torch.no_grad()
def limit_activations(vae: ModelMixin, images: Tensor) -> HalfPrecisionReport:
    """Scales weights in place so that activations stay below `LIMIT`, and the autoencoder computes what it did.

    The networks of an `AutoencoderKL` read their features through group normalization alone, which takes any factor
    back. So all that adds to the features of one size can have a factor in common, and the first convolution of a
    residual block one of its own. Factors are powers of two: only the epsilon of the normalization makes a difference.

    Args:
        vae: an `AutoencoderKL`, ours or stock, or another one of diffusers' `Encoder` and `Decoder`.
        images: (B, C, H, W) in [-1, 1], whose activations are looked at.
    Raises:
        ModelError: if it has other networks or activations that are not finite, or its images change by more than
            rounding.
    """
    networks = [module for module in vae.modules() if isinstance(module, Encoder | Decoder)]
    if not networks:
        raise ModelError(f"a {type(vae).__name__} has other layers than an AutoencoderKL; its activations stay")
    segments = [segment for network in networks for segment in segments_of(network)]
    with recorded(segments) as largest:
        before = reconstruct(vae, images)
    largest_before = max(largest.values())
    if not math.isfinite(largest_before):
        raise ModelError(f"activations of this {type(vae).__name__} are not finite in float32 either")
    for network in networks:
        factor_before = 1.0
        for segment in segments_of(network):
            factor = _factor(max(largest[module] for module in _adding(segment)))
            _scale(segment, factor_before, factor)
            for resnet in segment.resnets:
                _multiply(resnet.conv1, _factor(largest[resnet.conv1]))
            factor_before = factor
    with recorded(segments) as largest:
        after = reconstruct(vae, images)
    difference = (after - before).abs().max().item()
    if not difference <= TOLERANCE:
        raise ModelError(
            f"with scaled weights this {type(vae).__name__} gives other images (by {difference:.2g}): it has layers "
            "that an AutoencoderKL has not, or features so small that the eps of a norm counts"
        )
    half = reconstruct(copy.deepcopy(vae).half(), images)
    return HalfPrecisionReport(largest_before, max(largest.values()), difference, (half - before).abs().max().item())


def segments_of(network: Encoder | Decoder) -> list[Segment]:
    """The layers of a network from its input on."""
    is_encoder = isinstance(network, Encoder)
    blocks = [*network.down_blocks, network.mid_block] if is_encoder else [network.mid_block, *network.up_blocks]
    segments = [Segment(network.conv_in)]
    for block in blocks:
        segments[-1].resnets += block.resnets
        segments[-1].attentions += [layer for layer in getattr(block, "attentions", []) if layer is not None]
        samplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or []
        segments += [Segment(sampler.conv) for sampler in samplers]
    return segments


@contextmanager
def recorded(segments: list[Segment]) -> Iterator[dict[nn.Module, float]]:
    """The largest activation that each layer has given in the block."""
    largest: dict[nn.Module, float] = {}

    def record(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        largest[module] = max(largest.get(module, 0.0), output.float().abs().max().item())

    modules = {module for segment in segments for module in _adding(segment)}
    modules |= {resnet.conv1 for segment in segments for resnet in segment.resnets}
    handles = [module.register_forward_hook(record) for module in modules]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


def _adding(segment: Segment) -> list[nn.Module]:
    """Layers that give the features, or what is added to them."""
    return [segment.entry, *segment.attentions, *segment.resnets, *(resnet.conv2 for resnet in segment.resnets)]


def _factor(largest: float) -> float:
    """A power of two that brings an activation below the limit."""
    return 2.0 ** -max(0, math.ceil(math.log2(max(largest, LIMIT) / LIMIT)))


def _scale(segment: Segment, factor_before: float, factor: float) -> None:
    """Features times `factor`, of which the layers before have given `factor_before`."""
    segment.entry.weight *= factor / factor_before
    segment.entry.bias *= factor
    for resnet in segment.resnets:
        _multiply(resnet.conv2, factor)
        if resnet.conv_shortcut is not None:
            resnet.conv_shortcut.bias *= factor
    for attention in segment.attentions:
        _multiply(attention.to_out[0], factor)


def _multiply(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter *= factor
