"""`VQModelFA`: the VQGAN autoencoder with frequency complement modules and a codebook whose entries stay in use."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, Encoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, ResidualVQ, VectorQuantize

from favae.models.frequency_complement import ComplementedDecoder, FrequencyComplement
from favae.models.hub import HubModelMixin
from favae.models.scale_quantizers import MultiScaleQuantizer, ScaleQuantizer, WaveletQuantizer
from favae.models.sizes import check_image_size, check_widths, compression_ratio
from favae.precision import no_autocast


@dataclass
class QuantizerOutput(BaseOutput):
    """
    Attributes:
        latents: (B, C, h, w), codebook vectors, with the gradient of the latents they replace.
        indices: (B, h, w), (B, h, w, Q) for a residual quantizer, or (B, N) from coarse to fine; integers.
        loss: scalar, the commitment loss: the mean squared distance between the latents (normalized, for "vq") and
            their entries, for "residual" the mean over its codebooks; 0 outside training, but for the two orders from
            coarse to fine.
    """

    latents: Tensor
    indices: Tensor
    loss: Tensor


class VQModelFA(HubModelMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    A vector-quantized autoencoder with frequency complement modules in its decoder.

    `encode` takes (B, C, H, W) in [-1, 1], H and W multiples of f = 2 ** (len(block_out_channels) - 1), to continuous
    latents (B, latent_channels, H/f, W/f). `quantize` takes them to codebook vectors and indices. `decode` takes
    indices (an integer tensor) or latents, which it quantizes unless told not to. Indices from coarse to fine may stop
    after any scale: "next_scale" decodes to the whole image, less exactly, "next_band" to a smaller one.

    The codebook changes in training mode only, and only by latents that carry a gradient: under `torch.no_grad`, or
    with the encoder frozen (`requires_grad_(False)`), it stays as it is. Latents that are not finite come out as NaN
    and leave its entries finite.

    Parameters:
        in_channels, out_channels: color channels of the image.
        block_out_channels: one width per octave.
        layers_per_block, norm_num_groups: as in [`AutoencoderKL`].
        attention: whether the deepest blocks have attention (the published f16 and f8 models have it, f4 has not).
        latent_channels: channels of the latents.
        quantizer: "vq" (one codebook, cosine similarity, moving averages), "residual" (several in a row), "fsq"
            (a fixed grid), "next_scale" (see `MultiScaleQuantizer`) or "next_band" (see `WaveletQuantizer`).
        codebook_size: entries per codebook, 1,024 by default; for "fsq" the product of `fsq_levels`, or None.
        codebook_dim: size of the entries; None takes `latent_channels`, another value adds projections, of "vq" and
            "residual".
        num_quantizers: codebooks in a row, of "residual"; two or more.
        scales: of "next_scale" and "next_band", cells along each side, of the latents at last: images of only one size
            are encoded.
        fsq_levels: grid points per dimension, of "fsq", three or more.
        codebook_decay: of the moving averages. The published code has 0.8.
        dead_code_threshold: entries used less often than this, in uses per step by a moving average, are replaced by
            latents of the batch; 0 replaces none, as published. A new entry counts as used once. The one codebook of
            "next_scale" is used, and averages, once for each scale in a step.
        frequency_complement: "conv", "res", "attn" or None; see `FrequencyComplement`.
        sample_size, scaling_factor, force_upcast: as in [`VQModel`]; only pipelines read them.
        norm_eps: of the group norms. The published code has 1e-5.
        latent_norm_num_groups: of the first complement's norms, over the latents; None takes the greatest common
            divisor of `latent_channels` and `norm_num_groups`. The published f4 model has 3 for 3 channels.

    Raises:
        ValueError: if settings do not fit together; the message names them.

    Source: Lin et al., CVPR 2023 (arXiv 2305.02541), on VQGAN (Esser et al., CVPR 2021).
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # like `VQModel`: `lookup` does not call the codebook, so its hooks do not run
    _skip_layerwise_casting_patterns = ["codebook", "complements"]

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        block_out_channels: tuple[PositiveInt, ...] = (128, 128, 256, 256, 512),
        layers_per_block: PositiveInt = 2,
        norm_num_groups: PositiveInt = 32,
        attention: bool = True,
        latent_channels: PositiveInt = 256,
        quantizer: Literal["vq", "residual", "fsq", "next_scale", "next_band"] = "vq",
        codebook_size: PositiveInt | None = None,
        codebook_dim: PositiveInt | None = None,
        num_quantizers: PositiveInt = 4,
        scales: tuple[PositiveInt, ...] = (1, 2, 4, 8, 16),
        fsq_levels: tuple[Annotated[int, Field(ge=3)], ...] = (8, 8, 8, 6, 5),
        codebook_decay: Annotated[float, Field(ge=0, le=1)] = 0.99,
        dead_code_threshold: NonNegativeFloat = 0.02,
        frequency_complement: Literal["conv", "res", "attn"] | None = "conv",
        sample_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
        norm_eps: PositiveFloat = 1e-6,
        latent_norm_num_groups: PositiveInt | None = None,
    ):
        super().__init__()
        check_widths(norm_num_groups, block_out_channels=block_out_channels)
        deepest = "Attn" if attention else ""
        plain = len(block_out_channels) - 1

        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=(*["DownEncoderBlock2D"] * plain, f"{deepest}DownEncoderBlock2D"),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.codebook = make_quantizer(
            latent_channels,
            quantizer=quantizer,
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
            num_quantizers=num_quantizers,
            scales=scales,
            fsq_levels=fsq_levels,
            codebook_decay=codebook_decay,
            dead_code_threshold=dead_code_threshold,
        )
        self.decoder = ComplementedDecoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=(f"{deepest}UpDecoderBlock2D", *["UpDecoderBlock2D"] * plain),
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            frequency_complement=frequency_complement,
            latent_norm_num_groups=latent_norm_num_groups,
        )
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = norm_eps

        # Entries of a "vq" codebook are chosen and trained by their directions. Their lengths are kept apart: 1 for a
        # new codebook, other ones for published codebooks, whose moving averages are not normalized.
        self.register_buffer("entry_norms", torch.ones(self.num_tokens) if quantizer == "vq" else None)
        if quantizer == "vq":
            self.codebook._codebook.register_forward_hook(self._stretch)

    def _stretch(self, module: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook of the codebook, which gives directions: multiplies them by the lengths of their entries."""
        entries, indices, *rest = output
        return entries * self.entry_norms[indices].unsqueeze(-1), indices, *rest

    @property
    def compared_modules(self) -> list[tuple[nn.Module, nn.Module]]:
        """What a spectrum loss compares: the complements, the image's side first, each with its part of the encoder.

        These are the first convolution, all down blocks, the mid block, and the latent before noise or quantization.
        Source: Lin et al., CVPR 2023; their code pairs tensors as here, but blurs the two of a pair differently.
        """
        complements = [each for each in self.decoder.complements if isinstance(each, FrequencyComplement)]
        encoder = [self.encoder.conv_in, self.encoder.down_blocks[-1], self.encoder.mid_block, self.quant_conv]
        return list(zip((complement.constrained for complement in reversed(complements)), encoder))

    @property
    def num_tokens(self) -> int:
        """How many different indices there are, per codebook."""
        return self.codebook.codebook_size

    @property
    def spatial_compression_ratio(self) -> int:
        """Image pixels per latent along each side, f."""
        return compression_ratio(len(self.config.block_out_channels))

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """(B, C, H, W) in [-1, 1] -> latents (B, C', H/f, W/f), not quantized.

        Raises:
            ValueError: if H or W is not a multiple of f, or not f times the last of the scales.
        """
        check_image_size(x, self.spatial_compression_ratio)
        if isinstance(self.codebook, ScaleQuantizer):
            size = self.spatial_compression_ratio * self.codebook.scales[-1]
            if tuple(x.shape[-2:]) != (size, size):
                raise ValueError(f"scales {self.codebook.scales} are for images of {size}x{size}, got {tuple(x.shape)}")
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Latents (B, C, h, w) -> the codebook vectors nearest to them, their indices, and the commitment loss."""
        frozen = not (torch.is_grad_enabled() and latents.requires_grad)
        with no_autocast(latents.device):
            # Values that are not finite would spoil the codebook, so it sees zeros in their places. They are added
            # again as NaN afterwards: whoever looks at the loss notices them, and no process has to take a decision
            # of its own, which the others would wait for.
            not_finite = 0 * latents.float()
            values = latents.float().nan_to_num(0, 0, 0).to(self._codebook_dtype)
            if isinstance(self.codebook, ScaleQuantizer):
                quantized, indices, loss = self.codebook(values, freeze_codebook=frozen)
                quantized = self.codebook.lookup(indices) if frozen else quantized  # half precision adds up otherwise
            else:
                quantized, indices, loss = self._quantize_positions(values, frozen)
        quantized = (quantized + not_finite).to(latents.dtype).contiguous()  # as `lookup` gives them: equal to a bit
        return QuantizerOutput(latents=quantized, indices=indices.long(), loss=loss)

    def _quantize_positions(self, latents: Tensor, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Each position by itself: (B, C, h, w) -> vectors (B, C, h, w), indices (B, h, w[, Q]) and the loss."""
        size, tokens = latents.shape[-2:], latents.flatten(2).transpose(1, 2)  # (B, hw, C)
        if self.config.quantizer == "fsq":
            quantized, indices = self.codebook(tokens)
            loss = tokens.new_zeros(())
        else:
            quantized, indices, loss = self.codebook(tokens, freeze_codebook=frozen)
        return quantized.transpose(1, 2).unflatten(2, size), indices.unflatten(1, size), loss.mean()

    @property
    def _codebook_dtype(self) -> torch.dtype:
        """The dtype of the codebook's projections. Distances are computed in float32."""
        return next((p.dtype for p in self.codebook.parameters()), torch.float32)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w), (B, h, w, Q) or (B, n) -> codebook vectors (B, C, h, w).

        Raises:
            ValueError: if an index is outside the codebook, which compiled code does not check; or if n is not the
                number of tokens of some first scales.
        """
        unchecked = torch.compiler.is_compiling() or indices.numel() == 0
        if not unchecked and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_tokens:
            raise ValueError(f"indices must be in 0 ... {self.num_tokens - 1}, got {indices.min()} ... {indices.max()}")
        indices = indices.long()  # of smaller types, torch takes some as masks, and refuses the others
        if isinstance(self.codebook, ScaleQuantizer):
            return self.codebook.lookup(indices).contiguous()
        tokens = indices.flatten(1, 2)  # (B, hw) or (B, hw, Q)
        if self.config.quantizer == "fsq":
            codes = self.codebook.project_out(self.codebook.implicit_codebook[tokens].to(self._codebook_dtype))
        elif self.entry_norms is not None:
            codes = self.codebook.get_codes_from_indices(tokens) * self.entry_norms[tokens].unsqueeze(-1)
            codes = self.codebook.project_out(codes)
        else:
            codes = self.codebook.get_output_from_indices(tokens)
        return codes.transpose(1, 2).unflatten(2, indices.shape[1:3]).contiguous()

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """
        Args:
            h: indices, an integer tensor (B, h, w), (B, h, w, Q) or (B, n); or latents (B, C, h, w).
            force_not_quantize: the latents are codebook vectors already.
            shape: (B, h, w, C), for indices that come flat, as pipelines of [`VQModel`] give them.
        Returns:
            The image (B, C, H, W), in [-1, 1] up to overshoot, and the commitment loss, 0 where nothing was quantized.
        """
        loss = torch.zeros((), device=h.device)
        if not h.is_floating_point():
            if shape is not None:
                h = h.reshape(*shape[:3], *([-1] if self.config.quantizer == "residual" else []))
            h = self.lookup(h).to(self.dtype)
        elif not force_not_quantize:
            quantized = self.quantize(h)
            h, loss = quantized.latents, quantized.loss
        sample = self.decoder(h)
        return DecoderOutput(sample=sample, commit_loss=loss) if return_dict else (sample, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, Tensor]:
        """Reconstruction of (B, C, H, W) through the codebook."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


_MOVING_AVERAGES = ("vq", "residual", "next_scale", "next_band")
QUANTIZERS_WITH = {  # arguments of `VQModelFA` that only some quantizers read
    "num_quantizers": ("residual",),
    "scales": ("next_scale", "next_band"),
    "fsq_levels": ("fsq",),
    "codebook_decay": _MOVING_AVERAGES,
    "dead_code_threshold": _MOVING_AVERAGES,
}


def make_quantizer(
    latent_channels: int,
    *,
    quantizer: Literal["vq", "residual", "fsq", "next_scale", "next_band"],
    codebook_size: int | None,
    codebook_dim: int | None,
    num_quantizers: int,
    scales: tuple[int, ...],
    fsq_levels: tuple[int, ...],
    codebook_decay: float,
    dead_code_threshold: float,
) -> Any:
    """The codebook of a `VQModelFA`, a module; see there for the arguments and what is raised."""
    if quantizer == "fsq":
        if min(fsq_levels) < 3:
            raise ValueError(f"fsq_levels must be 3 or more, got {tuple(fsq_levels)}")
        if codebook_dim is not None or codebook_size not in (None, prod(fsq_levels)):
            raise ValueError(
                f"quantizer='fsq' has one dimension per entry of fsq_levels and {prod(fsq_levels)} entries, their "
                f"product: codebook_dim and codebook_size must be None, got {codebook_dim} and {codebook_size}"
            )
        with torch.device("cpu"):  # it computes with numbers that the meta device does not have
            codebook = FSQ(list(fsq_levels), dim=latent_channels)
        device = torch.get_default_device()
        return codebook if device.type == "cpu" else codebook.to(device)
    settings: dict[str, Any] = {
        "dim": latent_channels,
        "codebook_size": 1024 if codebook_size is None else codebook_size,
        "codebook_dim": codebook_dim,
        "use_cosine_sim": quantizer == "vq",  # where there are residuals, their sizes matter
        "decay": codebook_decay,
        "threshold_ema_dead_code": dead_code_threshold,
        "rotation_trick": False,  # gradients pass straight through, as published
    }
    if quantizer == "vq":
        codebook = VectorQuantize(**settings)
    elif quantizer == "residual":
        if num_quantizers == 1:
            raise ValueError("quantizer='residual' needs two or more codebooks; one is quantizer='vq'")
        codebook = ResidualVQ(num_quantizers=num_quantizers, **settings)
        # Each of its codebooks hands on the whole gradient, and it adds them up.
        codebook.project_out.register_forward_pre_hook(partial(_divide_gradient, num_quantizers))
    elif quantizer in ("next_scale", "next_band"):
        if codebook_dim is not None:
            raise ValueError(f"quantizer={quantizer!r} has no projections: codebook_dim must be None")
        kind = MultiScaleQuantizer if quantizer == "next_scale" else WaveletQuantizer
        codebook = kind(scales=tuple(scales), **settings)
    else:
        raise ValueError(f"quantizer must be 'vq', 'residual', 'fsq', 'next_scale' or 'next_band', got {quantizer!r}")

    # Two attributes of vector-quantize-pytorch's codebooks that its constructors do not expose.
    for module in codebook.modules():
        # A new entry would start with a count at the threshold and be replaced again before it can be found.
        if hasattr(module, "reset_cluster_size"):
            module.reset_cluster_size = dead_code_threshold + 1.0
        # The initialization by k-means, which is off, branches on a tensor: nothing could compile or export.
        if hasattr(module, "init_embed_"):
            module.init_embed_ = _do_nothing
    return codebook


def _do_nothing(*arguments, **options) -> None:
    pass


def _divide_gradient(number: int, module: nn.Module, arguments: tuple[Tensor]) -> None:
    """A hook of a module: its input is what it is, and the input's gradient is divided by a number."""
    (value,) = arguments
    if value.requires_grad:
        value.register_hook(lambda gradient: gradient / number)
