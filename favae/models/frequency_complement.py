"""Frequency complement modules, the decoder that carries them, and the features that spectrum losses compare."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

ComplementType = Literal["conv", "res", "attn"]


class FrequencyComplement(nn.Module):
    """Adds to a decoder's features what an encoder's features have and they lack; a spectrum loss trains it to.

    "conv": h + B(h); the loss sees B(h), the complement. Its last layer starts at zero, so that a trained decoder
        decodes as before.
    "res": h + B(h); the loss sees the sum. The image is the same as with "conv", only the loss constrains another
        tensor.
    "attn": GroupNorm and a transformer layer over the positions take the place of h; the loss sees the result. The cost
        grows with the square of the number of positions. torch's transformer layer does not call its own leaves, so
        offloading at leaf level does not work.

    B is twice GroupNorm, SiLU and a 3x3 convolution. The loss looks at the output of `constrained`. The decoder's own
    path is never blurred, and the encoder's features are not used to decode.

    Args:
        complement_type: one of the three.
        channels: in and out.
        groups: of the norm; the greatest common divisor with `channels` is taken.

    Raises:
        ValueError: for another type.
    Source: Lin et al., CVPR 2023 (arXiv 2305.02541); the start at zero is ours.
    """

    def __init__(self, complement_type: ComplementType, channels: int, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        if complement_type not in ("conv", "res", "attn"):
            raise ValueError(f"frequency_complement must be 'conv', 'res', 'attn' or None, got {complement_type!r}")
        self.complement_type = complement_type
        groups = math.gcd(channels, groups)
        if complement_type == "attn":
            heads = math.gcd(channels, 8)
            self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
            self.block = nn.TransformerEncoderLayer(channels, heads, dim_feedforward=2048, batch_first=True)
            return
        block = ResnetBlock2D(in_channels=channels, temb_channels=None, groups=groups, eps=1e-6, dropout=dropout)
        if complement_type == "conv":
            nn.init.zeros_(block.conv2.weight)
            nn.init.zeros_(block.conv2.bias)
        self.block = block

    @property
    def constrained(self) -> nn.Module:
        """The module whose output a spectrum loss compares with the encoder's."""
        return self.block.get_submodule("conv2") if self.complement_type == "conv" else self

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if self.complement_type != "attn":
            return self.block(sample, None)
        tokens = self.norm(sample).flatten(2).transpose(1, 2)  # (B, HW, C)
        return self.block(tokens).transpose(1, 2).unflatten(2, sample.shape[-2:])


class ComplementedDecoder(Decoder):
    """diffusers' `Decoder` with a `FrequencyComplement` at each of its four stage boundaries.

    latent -> complement 0 -> conv_in -> complement 1 -> mid block -> complement 2 -> up blocks -> complement 3 -> norm,
    activation, conv_out. With "attn" the last one, at the size of the image, is a "res".

    Args:
        in_channels, out_channels, up_block_types, block_out_channels, layers_per_block, norm_num_groups: as for
            `Decoder`.
        frequency_complement: the type of the complements; None puts identities in their places.
        latent_norm_num_groups: of the norms in the first complement; None takes the greatest common divisor of
            `in_channels` and `norm_num_groups`.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        frequency_complement: ComplementType | None,
        latent_norm_num_groups: int | None = None,
    ):
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        if frequency_complement is None:
            self.complements = nn.ModuleList(nn.Identity() for _ in range(4))
            return
        deepest, last = block_out_channels[-1], block_out_channels[0]
        self.complements = nn.ModuleList(
            [
                FrequencyComplement(frequency_complement, in_channels, latent_norm_num_groups or norm_num_groups),
                FrequencyComplement(frequency_complement, deepest, norm_num_groups),
                FrequencyComplement(frequency_complement, deepest, norm_num_groups),
            ]
        )
        if frequency_complement == "attn":
            self.complements.append(FrequencyComplement("res", last, norm_num_groups, dropout=0.1))
        else:
            self.complements.append(FrequencyComplement(frequency_complement, last, norm_num_groups))

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """(B, C', h, w) -> (B, C, f h, f w)."""
        sample = self.conv_in(self._run(self.complements[0], sample))
        sample = self._run(self.mid_block, self._run(self.complements[1], sample), latent_embeds)
        sample = self._run(self.complements[2], sample)
        for block in self.up_blocks:
            sample = self._run(block, sample, latent_embeds)
        sample = self._run(self.complements[3], sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Runs a block, with gradient checkpointing where it is enabled."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class FeatureRecorder:
    """Records what a spectrum loss compares: outputs of a decoder's modules with those of an encoder's, one pass of
    each.

        with FeatureRecorder(vae.compared_modules) as recorder:
            vae.decode(vae.encode(images).latents)
        complements, activations = recorder.pairs()

    Args:
        modules: of the decoder and of the encoder, in pairs; see `VQModelFA.compared_modules`.
    """

    def __init__(self, modules: Sequence[tuple[nn.Module, nn.Module]]):
        self.modules = modules

    def __enter__(self) -> "FeatureRecorder":
        self._features: dict[nn.Module, Tensor] = {}
        self._handles = [module.register_forward_hook(self._record) for pair in self.modules for module in pair]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Keeps the output of the first pass, whatever is decoded after it."""
        self._features.setdefault(module, output)

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Complements and activations, (B, C_i, H_i, W_i) each."""
        complements, activations = zip(*self.modules)
        return [self._features[module] for module in complements], [self._features[module] for module in activations]
