"""`VQModelFA`: the VQGAN codec with frequency complement modules and a well-kept codebook."""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, ResidualVQ, VectorQuantize

from favae.models.frequency_complement import Branch, ComplementedDecoder, FrequencyComplement, check_widths
from favae.models.hub import HubModelMixin
from favae.precision import no_autocast


@dataclass
class QuantizerOutput(BaseOutput):
    """
    Attributes:
        latents: (B, C, h, w), codebook vectors, with the gradient of the latents they replace.
        indices: (B, h, w), or (B, h, w, Q) for a residual quantiser; integers.
        loss: scalar, the commitment loss; 0 outside training.
    """

    latents: Tensor
    indices: Tensor
    loss: Tensor


class VQModelFA(HubModelMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    A vector-quantised autoencoder with frequency complement modules in its decoder.

    `encode` takes (B, 3, H, W) in [-1, 1], H and W multiples of f = 2 ** (len(block_out_channels) - 1), to continuous
    latents (B, latent_channels, H/f, W/f); `quantize` takes them to codebook vectors and indices; `decode` takes
    indices (an integer tensor) or latents, which it quantises unless told not to.

    The codebook changes in training mode only, and only by latents that carry a gradient: under `torch.no_grad`, or
    with the encoder frozen (`requires_grad_(False)`), it stays as it is, whatever `train()` says. Latents that are not
    finite do not reach it, but come out as they went in.

    Parameters:
        in_channels, out_channels: colour channels of the image.
        block_out_channels: one width per octave.
        layers_per_block, act_fn, norm_num_groups, mid_block_add_attention: as in [`AutoencoderKL`].
        attention: whether the deepest blocks have attention (the published f16 and f8 models, not f4).
        latent_channels: channels of the latents.
        quantizer: "vq" (one codebook, cosine similarity, moving averages), "residual" (several in a row), or "fsq"
            (a fixed grid).
        codebook_size: entries per codebook; for "fsq", the product of `fsq_levels`, which may be left to them.
        codebook_dim: size of the entries; None takes `latent_channels`, another value adds projections.
        num_quantizers: codebooks in a row, of "residual".
        fsq_levels: grid points per dimension, of "fsq".
        codebook_decay: of the moving averages. The published code has 0.8.
        dead_code_threshold: entries that are used less often than this, in uses per step by a moving average, are
            replaced by latents of the batch; 0 never, as published. A new entry counts as used once.
        commitment_weight: of the mean squared distance between latents (normalised, for cosine similarity) and entries.
        frequency_complement: "conv", "res", "attn" or None; see `FrequencyComplement`.
        sample_size, scaling_factor, force_upcast: as in [`VQModel`]; only pipelines read them.
        norm_eps: of the group norms. The published code has 1e-5.
        latent_norm_num_groups: of the first complement's norms, over the latents; None takes the largest common divisor
            of `latent_channels` and `norm_num_groups`. The published f4 model has 3 for 3 channels.
        codebook_norms: whether the entries have lengths of their own, kept apart from the directions that they are
            chosen and trained by; for published codebooks, whose moving averages are shorter than 1.

    Raises:
        ValueError: if settings do not fit together.

    Source: Lin et al., CVPR 2023 (arXiv 2305.02541), on VQGAN (Esser et al., CVPR 2021).
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = False  # as `VQModel`: `lookup` goes past the hooks of the codebook
    _skip_layerwise_casting_patterns = ["codebook", "complements"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        attention: bool = True,
        latent_channels: int = 256,
        quantizer: str = "vq",
        codebook_size: int | None = None,
        codebook_dim: int | None = None,
        num_quantizers: int = 4,
        fsq_levels: tuple[int, ...] = (8, 8, 8, 6, 5),
        codebook_decay: float = 0.99,
        dead_code_threshold: float = 0.02,
        commitment_weight: float = 1.0,
        frequency_complement: str | None = "conv",
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
        norm_eps: float = 1e-6,
        latent_norm_num_groups: int | None = None,
        codebook_norms: bool = False,
    ):
        super().__init__()
        check_widths("block_out_channels", block_out_channels, norm_num_groups)
        depth = len(block_out_channels)
        deepest = ("Attn",) if attention else ("",)
        down = ("DownEncoderBlock2D",) * (depth - 1) + (deepest[0] + "DownEncoderBlock2D",)
        up = (deepest[0] + "UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (depth - 1)
        common = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(in_channels, latent_channels, down, block_out_channels, double_z=False, **common)
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.codebook = _build_quantizer(self.config)
        if frequency_complement is None:
            self.decoder = Decoder(latent_channels, out_channels, up, block_out_channels, **common)
        else:
            self.decoder = ComplementedDecoder(
                latent_channels,
                out_channels,
                up,
                block_out_channels,
                frequency_complement=frequency_complement,
                **common,
            )
            if latent_norm_num_groups is not None:
                first = FrequencyComplement(frequency_complement, latent_channels, latent_norm_num_groups)
                self.decoder.complements[0] = first
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.eps = norm_eps
        if codebook_norms and quantizer != "vq":
            raise ValueError(f"codebook_norms is for quantizer='vq', got {quantizer!r}")
        self.register_buffer("entry_norms", torch.ones(self.num_tokens) if codebook_norms else None)
        if codebook_norms:
            self.codebook._codebook.register_forward_hook(self._stretch)

    def _stretch(self, module: nn.Module, inputs, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        entries, indices, *rest = output
        return entries * self.entry_norms[indices].unsqueeze(-1), indices, *rest

    @property
    def num_tokens(self) -> int:
        """How many different indices there are, per codebook."""
        return self.codebook.codebook_size

    @property
    def stride(self) -> int:
        """Pixels that one latent covers along each side, f."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What spectrum losses compare."""
        return (Branch(self.encoder, self.decoder),)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, H/f, W/f), not quantised."""
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {height}x{width}")
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def quantize(self, latents: Tensor) -> QuantizerOutput:
        """Latents (B, C, h, w) -> the codebook vectors nearest to them, their indices, and the commitment loss."""
        frozen = not (torch.is_grad_enabled() and latents.requires_grad)
        with no_autocast(latents.device):
            tokens = latents.float().flatten(2).transpose(1, 2)  # (B, hw, C)
            not_finite = 0 * tokens  # NaN where they are not; the same on every process, unlike a decision to skip
            tokens = tokens.nan_to_num(0, 0, 0).to(self._codebook_dtype)
            if self.config.quantizer == "fsq":
                quantized, indices = self.codebook(tokens)
                loss = tokens.new_zeros(())
            else:
                quantized, indices, loss = self.codebook(tokens, freeze_codebook=frozen)
                loss = loss.sum()
        size = latents.shape[-2:]
        quantized = (quantized + not_finite).transpose(1, 2).unflatten(2, size).to(latents.dtype)
        return QuantizerOutput(latents=quantized, indices=indices.long().unflatten(1, size), loss=loss)

    @property
    def _codebook_dtype(self) -> torch.dtype:
        """That of its projections; distances are computed in float32."""
        return next((p.dtype for p in self.codebook.parameters()), torch.float32)

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w) or (B, h, w, Q) -> codebook vectors (B, C, h, w).

        Raises:
            ValueError: if an index is outside the codebook.
        """
        known = torch.compiler.is_compiling() or indices.numel() == 0  # compiled code cannot look
        if not known and not 0 <= int(indices.min()) <= int(indices.max()) < self.num_tokens:
            raise ValueError(f"indices must be in 0 ... {self.num_tokens - 1}, got {indices.min()} ... {indices.max()}")
        tokens = indices.flatten(1, 2)  # (B, hw) or (B, hw, Q)
        if self.config.quantizer == "fsq":
            codes = self.codebook.project_out(self.codebook.implicit_codebook[tokens].to(self._codebook_dtype))
        elif self.entry_norms is not None:
            codes = self.codebook.get_codes_from_indices(tokens) * self.entry_norms[tokens].unsqueeze(-1)
            codes = self.codebook.project_out(codes)
        else:
            codes = self.codebook.get_output_from_indices(tokens)
        return codes.transpose(1, 2).unflatten(2, indices.shape[1:3])

    @apply_forward_hook
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """
        Args:
            h: indices, an integer tensor (B, h, w) or (B, h, w, Q); or latents (B, C, h, w).
            force_not_quantize: the latents are codebook vectors already.
            shape: (B, h, w, C), for indices that come flat, as pipelines of [`VQModel`] give them.
        Returns:
            The image (B, 3, H, W), in [-1, 1] up to overshoot, and the commitment loss, 0 where nothing was quantised.
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

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstruction of (B, 3, H, W) through the codebook."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


def _build_quantizer(config) -> nn.Module:
    size, dim = config.codebook_size, config.latent_channels
    for name in ("codebook_size", "codebook_dim", "num_quantizers"):
        if config[name] is not None and config[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {config[name]}")
    if config.quantizer == "fsq" and config.codebook_dim is not None:
        raise ValueError("quantizer='fsq' has one dimension per entry of fsq_levels: codebook_dim must be None")
    if config.quantizer == "fsq":
        levels = list(config.fsq_levels)
        count = int(torch.tensor(levels).prod())
        if size is not None and size != count:
            raise ValueError(f"codebook_size {size} is not the product of fsq_levels {levels}, {count}")
        return FSQ(levels, dim=dim)
    if config.quantizer not in ("vq", "residual"):
        raise ValueError(f"quantizer must be 'vq', 'residual' or 'fsq', got {config.quantizer!r}")
    settings = {
        "dim": dim,
        "codebook_size": 1024 if size is None else size,
        "codebook_dim": config.codebook_dim,
        "use_cosine_sim": True,
        "decay": config.codebook_decay,
        "threshold_ema_dead_code": config.dead_code_threshold,
        "commitment_weight": config.commitment_weight,
        "rotation_trick": False,  # straight-through, as published
    }
    if config.quantizer == "residual":
        quantizer = ResidualVQ(num_quantizers=config.num_quantizers, **settings)
    else:
        quantizer = VectorQuantize(**settings)
    for module in quantizer.modules():
        if hasattr(module, "reset_cluster_size"):
            module.reset_cluster_size = max(1.0, config.dead_code_threshold)  # time to be found, for a new entry
        if hasattr(module, "init_embed_"):
            module.init_embed_ = _nothing  # of k-means, which is off; it branches on a tensor, so nothing could compile
    return quantizer


def _nothing(*arguments, **options) -> None:
    pass
