"""Frequency complement modules, the decoder that carries them, and the features that spectrum losses compare."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

KINDS = ("conv", "res", "attn")


def check_widths(name: str, widths: Sequence[int], norm_num_groups: int) -> None:
    """Raises ValueError for widths that cannot be normalised in groups."""
    if any(width % norm_num_groups for width in widths):
        raise ValueError(f"{name} must be multiples of norm_num_groups = {norm_num_groups}, got {tuple(widths)}")


class FrequencyComplement(nn.Module):
    """Adds to a decoder's features what an encoder's had and they lack; a spectrum loss tells it what that is.

    "conv": h + B(h), the loss sees B(h), the complement. Its last layer starts at zero, so that a trained decoder
        decodes as before.
    "res": h + B(h), the loss sees the sum. The same image as "conv"; only what the loss constrains differs.
    "attn": GroupNorm and a transformer layer over the positions in place of h, the loss sees the result; cost grows
        with the square of the positions. "attn" is for the three stages at the latent's size; the last is a "res".
        torch's layer goes past the hooks of its own leaves: no offloading at leaf level.

    B is two times GroupNorm, SiLU, 3x3 convolution. The loss looks at the output of `constrained`; the decoder's own
    path is never blurred, and the encoder's features are not used to decode.

    Args:
        kind: one of the three.
        channels: in and out.
        groups: of the norm; the largest common divisor with `channels` is taken.

    Source: Lin et al., CVPR 2023 (arXiv 2305.02541); the zero start is ours.
    """

    def __init__(self, kind: str, channels: int, groups: int = 32, dropout: float = 0.0):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"frequency_complement must be one of {', '.join(KINDS)} or None, got {kind!r}")
        self.kind = kind
        groups = math.gcd(channels, groups)
        if kind == "attn":
            heads = math.gcd(channels, 8)
            self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
            self.block = nn.TransformerEncoderLayer(channels, heads, dim_feedforward=2048, batch_first=True)
        else:
            self.block = ResnetBlock2D(
                in_channels=channels, temb_channels=None, groups=groups, eps=1e-6, dropout=dropout
            )
        if kind == "conv":
            nn.init.zeros_(self.block.conv2.weight)
            nn.init.zeros_(self.block.conv2.bias)

    @property
    def constrained(self) -> nn.Module:
        """The module whose output a spectrum loss compares with the encoder's."""
        return self.block.conv2 if self.kind == "conv" else self

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        if self.kind != "attn":
            return self.block(sample, None)
        tokens = self.norm(sample).flatten(2).transpose(1, 2)  # (B, HW, C)
        return self.block(tokens).transpose(1, 2).unflatten(2, sample.shape[-2:])


class ComplementedDecoder(Decoder):
    """diffusers' `Decoder` with a `FrequencyComplement` at each of its four stage boundaries.

    latent -FCM1-> conv_in -FCM2-> mid block -FCM3-> up blocks -FCM4-> norm, activation, conv_out

    Args:
        frequency_complement: the kind.
        Others as for `Decoder`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        *,
        frequency_complement: str,
        norm_num_groups: int = 32,
        **settings,
    ):
        super().__init__(
            in_channels, out_channels, up_block_types, block_out_channels, norm_num_groups=norm_num_groups, **settings
        )
        kind, deepest = frequency_complement, block_out_channels[-1]
        self.complements = nn.ModuleList(
            [FrequencyComplement(kind, channels, norm_num_groups) for channels in (in_channels, deepest, deepest)]
        )
        last = ("res", block_out_channels[0], norm_num_groups, 0.1) if kind == "attn" else None
        self.complements.append(FrequencyComplement(*(last or (kind, block_out_channels[0], norm_num_groups))))

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing

        def run(block: nn.Module, *inputs) -> Tensor:
            return self._gradient_checkpointing_func(block, *inputs) if checkpointing else block(*inputs)

        sample = self.conv_in(run(self.complements[0], sample))
        sample = run(self.mid_block, run(self.complements[1], sample), latent_embeds)
        sample = run(self.complements[2], sample)
        for block in self.up_blocks:
            sample = run(block, sample, latent_embeds)
        sample = run(self.complements[3], sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class Branch(NamedTuple):
    """An encoder, the decoder that mirrors it, and the latent channels the decoder reads."""

    encoder: Encoder
    decoder: Decoder
    latents: slice = slice(None)


class FeatureRecorder:
    """Records what a spectrum loss compares: features A_i of an encoder with C_{3-i} of its decoder, one pass of each.

    A_0 follows the encoder's first convolution, A_1 all down blocks, A_2 the mid block, and A_3 is the latent as it is
    before noise or quantisation; C_0 ... C_3 are the decoder's complements in order. Four pairs per branch:

        with FeatureRecorder(vae.branches) as recorder:
            posterior = vae.encode(images).latent_dist
            vae.decode(posterior.sample())
        complements, activations = recorder.pairs(posterior.mean)

    Raises:
        ValueError: if a decoder has no complements.
    Source: Lin et al., CVPR 2023; their code pairs tensors as here, but blurs the two of a pair differently.
    """

    LEVELS = 4

    def __init__(self, branches: Sequence[Branch]):
        if not all(isinstance(branch.decoder, ComplementedDecoder) for branch in branches):
            raise ValueError("features can be compared only where the decoder has frequency_complement modules")
        self.branches = branches

    def __enter__(self) -> "FeatureRecorder":
        self._features: dict[nn.Module, Tensor] = {}
        self._handles = []
        for branch in self.branches:
            for module in (*self._encoder_modules(branch), *self._decoder_modules(branch)):
                self._handles.append(module.register_forward_hook(self._keep))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, module: nn.Module, inputs, output: Tensor) -> None:
        self._features.setdefault(module, output)  # of the first pass, whatever is decoded after it

    @staticmethod
    def _encoder_modules(branch: Branch) -> tuple[nn.Module, ...]:
        return branch.encoder.conv_in, branch.encoder.down_blocks[-1], branch.encoder.mid_block

    @staticmethod
    def _decoder_modules(branch: Branch) -> list[nn.Module]:
        return [complement.constrained for complement in branch.decoder.complements]

    def pairs(self, latents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """
        Args:
            latents: (B, C, h, w), before noise or quantisation.
        Returns:
            complements and activations, four per branch, the image's side first; (B, C_i, H_i, W_i) each.
        """
        complements, activations = [], []
        for branch in self.branches:
            complements += [self._features[module] for module in reversed(self._decoder_modules(branch))]
            activations += [self._features[module] for module in self._encoder_modules(branch)]
            activations.append(latents[:, branch.latents])
        return complements, activations
