"""`HyperpriorModelFA`: an autoencoder whose latents are written to files of few bytes."""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from favae import bitstream
from favae.errors import CompressedFileError, ModelError
from favae.hashing import hash_model
from favae.models.entropy import (
    LARGEST_SYMBOL,
    MIN_SCALE,
    FactorizedDensity,
    bits,
    gaussian_likelihood,
    lower_bound,
    round_straight_through,
    scale_indices,
    scale_table,
    with_uniform_noise,
)
from favae.models.frequency_complement import FrequencyComplement
from favae.models.hub import HubModelMixin
from favae.models.sizes import check_image_size, compression_ratio
from favae.precision import no_autocast

HYPER_RATIO = 4  # latents per number of the hyperprior, along each side
SMALLEST_SIDE = 2  # of latents, which borders are mirrored in


@dataclass
class RatedLatents(BaseOutput):
    """
    Attributes:
        latents: (B, C, h, w), rounded around their means, with the gradient of the latents they replace.
        bits: (B,), what they cost; in training mode with uniform noise in place of rounding, differentiable.
        rounded_bits: (B,), what they cost when they are rounded, without a gradient.
    """

    latents: Tensor
    bits: Tensor
    rounded_bits: Tensor


class HyperpriorModelFA(HubModelMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    HiFiC's autoencoder with frequency complements in its generator and a mean-scale hyperprior, for files.

    `encode` takes (B, C, H, W) in [-1, 1], H and W multiples of f = 2 ** (len(block_out_channels) - 1), to continuous
    latents (B, latent_channels, H/f, W/f). `quantize` rounds them and says what they cost. `decode` takes latents,
    which it quantizes unless told not to. `compress` and `decompress` take images of any size to bytes and back; they
    need the package constriction. Latents are coded around means and with scales that the hyperprior gives, which is
    computed in float64 on the CPU, so that a reader on another device finds the same scales.

    Parameters:
        in_channels, out_channels: color channels of the image.
        block_out_channels: one width per octave, the image's first.
        num_residual_blocks: of the generator, at the size of the latents.
        latent_channels: channels of the latents.
        hyper_channels: width of the hyperprior.
        frequency_complement: "conv", "res" or None: of the generator's features at the size of the image and at half
            of it; see `FrequencyComplement`. "attn" would attend to every pixel.

    Raises:
        ValueError: for fewer than two widths.

    Source: Mentzer et al., NeurIPS 2020 (arXiv 2006.09965); the complements: Lin et al., CVPR 2023, and FA-HiFiC. As in
        the published network, convolutions mirror the borders, and each pixel's channels are normalized.
    """

    _supports_gradient_checkpointing = False
    _supports_group_offloading = False
    _skip_layerwise_casting_patterns = ["density", "hyper_"]

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        block_out_channels: tuple[PositiveInt, ...] = (60, 120, 240, 480, 960),
        num_residual_blocks: NonNegativeInt = 9,
        latent_channels: PositiveInt = 220,
        hyper_channels: PositiveInt = 320,
        frequency_complement: Literal["conv", "res"] | None = "conv",
    ):
        super().__init__()
        if len(block_out_channels) < 2:
            raise ValueError(f"block_out_channels must have two or more widths, got {tuple(block_out_channels)}")
        self.encoder = HiFiCEncoder(in_channels, block_out_channels, latent_channels)
        self.decoder = HiFiCGenerator(
            latent_channels, block_out_channels, out_channels, num_residual_blocks, frequency_complement
        )
        self.hyper_encoder = nn.Sequential(
            nn.Conv2d(latent_channels, hyper_channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hyper_channels, hyper_channels, 5, stride=2, padding=2), nn.ReLU(),
            nn.Conv2d(hyper_channels, hyper_channels, 5, stride=2, padding=2),
        )  # fmt: skip
        self.hyper_means = make_hyper_decoder(hyper_channels, latent_channels)
        self.hyper_scales = make_hyper_decoder(hyper_channels, latent_channels)
        self.density = FactorizedDensity(hyper_channels)

    @property
    def spatial_compression_ratio(self) -> int:
        """Image pixels per latent along each side, f."""
        return compression_ratio(len(self.config.block_out_channels))

    @property
    def compared_modules(self) -> list[tuple[nn.Module, nn.Module]]:
        """What a spectrum loss compares: complements and the encoder's features, at the image's size and at half."""
        complements = [each for each in self.decoder.complements if isinstance(each, FrequencyComplement)]
        return list(zip((complement.constrained for complement in complements), self.encoder.blocks))

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled and sharded one by one."""
        return [*self.encoder.blocks, self.decoder.residual_blocks, *self.decoder.up_blocks]

    # Latents and images -----------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """(B, C, H, W) in [-1, 1] -> latents (B, C', H/f, W/f), not quantized.

        Raises:
            ValueError: if H or W is not a multiple of f, or smaller than 2 f.
        """
        check_image_size(x, self.spatial_compression_ratio)
        smallest = SMALLEST_SIDE * self.spatial_compression_ratio
        if min(x.shape[-2:]) < smallest:
            raise ValueError(f"images must have {smallest} pixels or more per side")
        latents = self.encoder(x)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    def quantize(self, latents: Tensor) -> RatedLatents:
        """Latents (B, C', h, w) -> the same, rounded, and their bits. Computed outside of autocast."""
        with no_autocast(latents.device):
            y = latents.to(next(self.hyper_means.parameters()).dtype)
            z = self._hyper_latents(y)
            rounded_z = round_straight_through(z).clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL)
            height, width = y.shape[-2:]
            means = self.hyper_means(rounded_z)[..., :height, :width]
            scales = lower_bound(self.hyper_scales(rounded_z)[..., :height, :width], MIN_SCALE)
            distances = round_straight_through(y - means)
            with torch.no_grad():
                rounded = bits(gaussian_likelihood(distances, scales)) + bits(self.density.likelihood(rounded_z))
            found = rounded
            if self.training:
                noisy = gaussian_likelihood(with_uniform_noise(y - means), scales)
                found = bits(noisy) + bits(self.density.likelihood(with_uniform_noise(z)))
        # In the dtype of the parameters: autocast's would round the latents once more, as files do not.
        return RatedLatents(latents=means + distances, bits=found, rounded_bits=rounded)

    @apply_forward_hook
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """
        Args:
            h: latents (B, C', h, w). force_not_quantize: they are rounded already.
        Returns:
            The image (B, C, H, W), in [-1, 1] up to overshoot.
        """
        sample = self.decoder(h if force_not_quantize else self.quantize(h).latents)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstruction of (B, C, H, W) through rounded latents."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)

    def _hyper_latents(self, y: Tensor) -> Tensor:
        """(B, C', h, w) -> (B, N, ceil(h / 4), ceil(w / 4)), not rounded."""
        bottom, right = (-side % HYPER_RATIO for side in y.shape[-2:])
        return self.hyper_encoder(F.pad(y, (0, right, 0, bottom), mode="replicate"))

    # Files ------------------------------------------------------------------------------------------------------------

    def update_table(self) -> None:
        """Makes weights fit for `compress` that have changed since the model was saved or loaded; both do the same."""
        self.density.update_table()

    def compress(self, images: Tensor) -> list[bytes]:
        """(B, C, H, W) in [-1, 1], of any size up to 65,535 -> the content of a file for each.

        For many calls, one `LatentCoder` is quicker.

        Raises:
            ModelError: if weights have changed since `update_table`, latents are not finite, or constriction is not
                installed.
            ValueError: for larger images.
        """
        return LatentCoder(self).compress(images)

    def decompress(self, files: list[bytes]) -> list[Tensor]:
        """What `compress` wrote -> images (C, H, W), in [-1, 1] up to overshoot, float32.

        Raises:
            CompressedFileError: if a file is damaged, foreign, or of another model.
            ModelError: if weights have changed since `update_table`, or constriction is not installed.
        """
        return LatentCoder(self).decompress(files)

    def _latents_of(self, image: Tensor) -> Tensor:
        """Of (1, C, H, W), whose last row and column are repeated up to a multiple of f."""
        height, width = (side * self.spatial_compression_ratio for side in self.latent_size(*image.shape[-2:]))
        padding = (0, width - image.shape[-1], 0, height - image.shape[-2])
        padded = F.pad(image.to(self.device, self.dtype), padding, mode="replicate")
        return self.encode(padded).latents.float()

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """h and w of the latents of an image of any size, which is padded."""
        ratio = self.spatial_compression_ratio
        return max(SMALLEST_SIDE, math.ceil(height / ratio)), max(SMALLEST_SIDE, math.ceil(width / ratio))


class LatentCoder:
    """Writes and reads files of one model, for as long as its weights stay what they are.

    Raises:
        ModelError: if the model is not in float32, or the table of the factorized density is not that of the weights.
    """

    def __init__(self, model: HyperpriorModelFA):
        if model.dtype != torch.float32:
            raise ModelError(f"files are written and read in float32, and the model is in {model.dtype}: call float()")
        if not model.density.table_is_current:
            raise ModelError("the coder's table is older than the weights: call update_table()")
        self.model = model
        self.identity = bytes.fromhex(hash_model(model))[:8]
        self.table = model.density.table.cpu().numpy()
        networks = (model.hyper_means, model.hyper_scales)
        # One after the other: MPS has no float64.
        self.means, self.scales = (copy.deepcopy(each).to("cpu").to(torch.float64) for each in networks)

    @torch.no_grad()
    def compress(self, images: Tensor) -> list[bytes]:
        """As the model's."""
        height, width = images.shape[-2:]
        if max(height, width) > bitstream.LARGEST_SIDE:
            raise ValueError(f"images may have {bitstream.LARGEST_SIDE} pixels per side, got {height} x {width}")
        return [self.write(self.model._latents_of(image), (height, width)) for image in images.unsqueeze(1)]

    @torch.no_grad()
    def decompress(self, files: list[bytes]) -> list[Tensor]:
        """As the model's."""
        images = []
        for data in files:
            latents, (height, width) = self.read(data)
            latents = latents.to(self.model.device, self.model.dtype)
            sample = self.model.decode(latents, force_not_quantize=True).sample
            if not sample.isfinite().all():
                raise ModelError("the images are not finite")
            images.append(sample[0, :, :height, :width].float())
        return images

    def write(self, y: Tensor, size: tuple[int, int]) -> bytes:
        """Latents (1, C', h, w), not quantized, of an image of so many pixels -> the content of its file.

        Raises:
            ModelError: if they are not finite.
        """
        z = self.model._hyper_latents(y).cpu().round().clamp(-LARGEST_SYMBOL, LARGEST_SYMBOL)
        means, indices = self._expected(z, (y.shape[-2], y.shape[-1]))
        if not (y.isfinite().all() and means.isfinite().all() and int(indices.min()) >= 0):
            raise ModelError("the latents are not finite")
        limit = bitstream.LARGEST_DISTANCE
        symbols = (y.cpu().double() - means).round().clamp(-limit, limit).long()
        largest = max(1, int(symbols.abs().max()))
        writer = bitstream.Writer()
        writer.channels((z[0].flatten(1).long() + LARGEST_SYMBOL).numpy(), self.table)
        writer.gaussians(symbols.flatten().numpy(), scale_table()[indices].flatten().numpy(), largest)
        checksum = bitstream.symbols_checksum(indices.numpy(), symbols.numpy())
        return bitstream.write(bitstream.Header(self.identity, *size, largest, checksum), writer.payload())

    def read(self, data: bytes) -> tuple[Tensor, tuple[int, int]]:
        """The content of a file -> latents (1, C', h, w), float64 on the CPU, and the size of the image."""
        header, payload = bitstream.read(data)
        if header.model != self.identity:
            raise CompressedFileError("the file was written by another model, or by other weights of it")
        size = self.model.latent_size(header.height, header.width)
        hyper_size = [math.ceil(side / HYPER_RATIO) for side in size]
        reader = bitstream.Reader(payload)
        z = torch.from_numpy(reader.channels(math.prod(hyper_size), self.table)) - LARGEST_SYMBOL
        means, indices = self._expected(z.double().unflatten(1, hyper_size).unsqueeze(0), size)
        try:
            symbols = reader.gaussians(scale_table()[indices].flatten().numpy(), header.largest)
        except AssertionError:
            symbols = None
        if symbols is None or bitstream.symbols_checksum(indices.numpy(), symbols) != header.symbols_checksum:
            raise CompressedFileError("this machine, or its constriction, computes otherwise than the file's writer")
        return torch.from_numpy(symbols).view(means.shape) + means, (header.height, header.width)

    def _expected(self, z: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Means, float64, and indices of scales of latents (1, C', h, w), from rounded (1, N, h', w') on the CPU."""
        height, width = size
        means = self.means(z.double())[..., :height, :width]
        return means, scale_indices(self.scales(z.double())[..., :height, :width])


# Networks -------------------------------------------------------------------------------------------------------------


class HiFiCEncoder(nn.Module):
    """(B, C, H, W) -> (B, C', H/f, W/f); `blocks` are its features from the image's size on."""

    def __init__(self, in_channels: int, widths: tuple[int, ...], latent_channels: int):
        super().__init__()
        blocks = [_normalized(_mirrored(in_channels, widths[0], 7))]
        blocks += [_normalized(_mirrored(before, after, 3, stride=2)) for before, after in zip(widths, widths[1:])]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = _mirrored(widths[-1], latent_channels, 3)

    def forward(self, sample: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample)
        return self.conv_out(sample)


class HiFiCGenerator(nn.Module):
    """(B, C', h, w) -> (B, C, f h, f w). `complements` follow the last two blocks, that of the image's size first."""

    def __init__(
        self,
        latent_channels: int,
        widths: tuple[int, ...],
        out_channels: int,
        num_residual_blocks: int,
        frequency_complement: Literal["conv", "res"] | None,
    ):
        super().__init__()
        deepest = widths[-1]
        self.conv_in = nn.Sequential(
            _channel_norm(latent_channels), _mirrored(latent_channels, deepest, 3), _channel_norm(deepest)
        )
        self.residual_blocks = nn.Sequential(*(ResidualBlock(deepest) for _ in range(num_residual_blocks)))
        steps = [(widths[i], widths[i - 1]) for i in range(len(widths) - 1, 0, -1)]
        self.up_blocks = nn.ModuleList(
            _normalized(nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1))
            for before, after in steps
        )
        self.complements = nn.ModuleList(
            nn.Identity() if frequency_complement is None else FrequencyComplement(frequency_complement, width)
            for width in widths[:-1][:2]  # of each block's output
        )
        self.conv_out = _mirrored(widths[0], out_channels, 7)

    def forward(self, latents: Tensor) -> Tensor:
        sample = self.conv_in(latents)
        sample = sample + self.residual_blocks(sample)
        for left, block in zip(range(len(self.up_blocks) - 1, -1, -1), self.up_blocks):
            sample = block(sample)
            if left < len(self.complements):
                sample = self.complements[left](sample)
        return self.conv_out(sample)


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        layers = (_mirrored(width, width, 3), _channel_norm(width), nn.ReLU(), _mirrored(width, width, 3))
        self.branch = nn.Sequential(*layers, _channel_norm(width))

    def forward(self, sample: Tensor) -> Tensor:
        return sample + self.branch(sample)


def _mirrored(before: int, after: int, size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution with mirrored borders."""
    return nn.Conv2d(before, after, size, stride=stride, padding=size // 2, padding_mode="reflect")


def _channel_norm(channels: int) -> LayerNorm2d:
    """Of the channels of each pixel: unlike means over the image, these do not depend on its size."""
    return LayerNorm2d(channels, eps=1e-3)


def _normalized(convolution: nn.Conv2d | nn.ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, _channel_norm(convolution.out_channels), nn.ReLU())


def make_hyper_decoder(hyper_channels: int, latent_channels: int) -> nn.Sequential:
    """(B, N, h', w') -> (B, C', 4 h', 4 w'), of means or of scales."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.ConvTranspose2d(hyper_channels, hyper_channels, 5, 2, padding=2, output_padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(hyper_channels, latent_channels, 3, padding=1))
