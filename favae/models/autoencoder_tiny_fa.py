"""`AutoencoderTinyFA`: a small convolutional autoencoder whose decoder may leave the last octaves to a wavelet."""

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from favae.models.hub import HubModelMixin
from favae.models.sizes import check_image_size, compression_ratio
from favae.models.tiling import map_tiles
from favae.wavelets import WaveletBands

GRAY = 0.5  # between 0 and 1, in which the networks work
LATENT_BOUND = 3.0  # latents z are read as 3 tanh(z / 3)


class AutoencoderTinyFA(HubModelMixin, ModelMixin, AutoencoderMixin):
    r"""
    An autoencoder of plain convolutions, for latents that a larger one has made: TAESD's and TAEF2's architecture, with
    a decoder that may end in an inverse wavelet transform.

    A network that stops `wavelet_levels` octaves before the image does a quarter of the work for each, and gives the
    bands of the image in place of its pixels. It has the interface of [`AutoencoderTiny`]: images (B, C, H, W) in
    [-1, 1], H and W multiples of f = 2 ** (len(block_out_channels) - 1); `encode` gives `latents`, without a
    distribution. Neither `encode` nor `decode` applies the latent statistics: pipelines do.

    Parameters:
        in_channels, out_channels: color channels of the image.
        latent_channels: channels of the latent.
        block_out_channels, num_encoder_blocks: widths of the stages, from the image to the latent, and how many
            blocks each has. Each stage after the first halves the size.
        decoder_block_out_channels, num_decoder_blocks: the same of the decoder, from the latent up. There is a stage
            for each of the encoder's, but for `wavelet_levels` of them.
        high_block_out_channels: widths of a branch of its own for the high bands; `None` lets one network give all.
        latent_pooling: whether blocks at the latent's size see statistics of all of it, as in TAEF2. Decoding in tiles
            is not exact then.
        wavelet: any discrete wavelet of pywt.
        wavelet_levels: how many octaves the inverse transform replaces; 0 is TAESD's own decoder.
        scaling_factor, shift_factor, latents_mean, latents_std: as in [`AutoencoderKL`].

    Raises:
        ValueError: if settings do not fit together; the message names them.

    Source: madebyollin/taesd (architecture); the wavelet head is ours.
    """

    _supports_gradient_checkpointing = True
    _group_offload_block_modules = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        latent_channels: PositiveInt = 4,
        block_out_channels: tuple[PositiveInt, ...] = (64, 64, 64, 64),
        num_encoder_blocks: tuple[NonNegativeInt, ...] = (1, 3, 3, 3),
        decoder_block_out_channels: tuple[PositiveInt, ...] = (64, 64, 64),
        num_decoder_blocks: tuple[NonNegativeInt, ...] = (3, 3, 3),
        high_block_out_channels: tuple[PositiveInt, ...] | None = None,
        latent_pooling: bool = False,
        wavelet: str = "haar",
        wavelet_levels: NonNegativeInt = 1,
        sample_size: PositiveInt = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        super().__init__()
        stages = len(block_out_channels)
        if wavelet_levels >= stages:
            raise ValueError(f"wavelet_levels must be below the {stages} stages, got {wavelet_levels}")
        lengths = {
            "num_encoder_blocks": (num_encoder_blocks, stages),
            "decoder_block_out_channels": (decoder_block_out_channels, stages - wavelet_levels),
            "num_decoder_blocks": (num_decoder_blocks, stages - wavelet_levels),
            "high_block_out_channels": (high_block_out_channels, stages - wavelet_levels),
        }
        for name, (values, length) in lengths.items():
            if values is not None and len(values) != length:
                raise ValueError(f"{name} must have {length} entries for wavelet_levels={wavelet_levels}, not {values}")
        if high_block_out_channels is not None and not wavelet_levels:
            raise ValueError("high_block_out_channels needs wavelet_levels: without, there are no high bands")
        self.encoder = TinyEncoder(in_channels, latent_channels, block_out_channels, num_encoder_blocks, latent_pooling)
        self.decoder = TinyDecoder(
            latent_channels,
            out_channels,
            decoder_block_out_channels,
            num_decoder_blocks,
            latent_pooling,
            high_block_out_channels=high_block_out_channels,
            bands=WaveletBands(wavelet, wavelet_levels) if wavelet_levels else None,
        )
        self.use_slicing = self.use_tiling = False

    @property
    def spatial_compression_ratio(self) -> int:
        """Image pixels per latent along each side, f."""
        return compression_ratio(len(self.config.block_out_channels))

    @property
    def blocks(self) -> list[nn.Module]:
        """What is compiled and sharded one by one."""
        return [module for module in self.modules() if isinstance(module, TinyBlock)]

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """(B, C, H, W) in [-1, 1] -> latents (B, C', H/f, W/f)."""
        ratio = self.spatial_compression_ratio
        check_image_size(x, ratio)
        parts = x.split(1) if self.use_slicing else [x]
        latents = torch.cat([self._in_tiles(self.encoder, part, self.config.sample_size, ratio) for part in parts])
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C', h, w) -> images (B, C, f h, f w), around [-1, 1]; nothing is random."""
        size = self.config.sample_size // self.spatial_compression_ratio
        parts = x.split(1) if self.use_slicing else [x]
        sample = torch.cat([self._in_tiles(self.decoder, part, size, 1) for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _in_tiles(self, network: nn.Module, sample: Tensor, tile: int, unit: int) -> Tensor:
        if not self.use_tiling:
            return network(sample)
        tile = max(1, tile // unit)
        return map_tiles(network, sample, tile * unit, overlap=tile // 4 * unit, unit=unit)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes images."""
        (latents,) = self.encode(sample, return_dict=False)
        return self.decode(latents, return_dict=return_dict)


class TinyEncoder(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> latents. Its layers are numbered as in TAESD's files."""

    gradient_checkpointing = False

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        num_blocks: tuple[int, ...],
        latent_pooling: bool,
    ):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)]
        last = len(num_blocks) - 1
        for stage, (width, count) in enumerate(zip(block_out_channels, num_blocks)):
            if stage > 0:
                layers.append(nn.Conv2d(block_out_channels[stage - 1], width, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(width, pooling=latent_pooling and stage == last) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(block_out_channels[-1], latent_channels, 3, padding=1))

    def forward(self, sample: Tensor) -> Tensor:
        return _run(self, self.layers, (sample + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents (B, C', h, w) -> images around [-1, 1], at first gray ones. Its layers are numbered as in TAESD's files.

    Args:
        bands: the wavelet transform whose inverse ends the decoder; None for pixels.
        Others: see `AutoencoderTinyFA`.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        num_blocks: tuple[int, ...],
        latent_pooling: bool,
        high_block_out_channels: tuple[int, ...] | None = None,
        bands: WaveletBands | None = None,
    ):
        super().__init__()
        self.bands, self.out_channels = bands, out_channels
        high_channels = 0 if bands is None else out_channels * bands.num_high_bands
        joint = 0 if high_block_out_channels else high_channels
        self.layers = _decoder_layers(
            latent_channels, out_channels + joint, block_out_channels, num_blocks, latent_pooling
        )
        self.high_layers = None
        if high_block_out_channels:
            self.high_layers = _decoder_layers(
                latent_channels, high_channels, high_block_out_channels, num_blocks, latent_pooling
            )
        # Layers that were trained for other output layers keep what they know while new ones find their size.
        outputs = [layers[-1] for layers in (self.layers, self.high_layers) if layers is not None]
        for parameter in nn.ModuleList(outputs).parameters():
            nn.init.zeros_(parameter)
        nn.init.constant_(outputs[0].get_parameter("bias")[:out_channels], GRAY)

    def forward(self, sample: Tensor) -> Tensor:
        output = _run(self, self.layers, sample)
        if self.bands is not None:
            low, high = output[:, : self.out_channels], output[:, self.out_channels :]
            if self.high_layers is not None:
                high = _run(self, self.high_layers, sample)
            output = self.bands.inverse(low, high)
        return output * 2 - 1


def _decoder_layers(
    latent_channels: int, out_channels: int, widths: tuple[int, ...], num_blocks: tuple[int, ...], latent_pooling: bool
) -> nn.Sequential:
    layers: list[nn.Module] = [BoundLatents(), nn.Conv2d(latent_channels, widths[0], 3, padding=1), nn.ReLU()]
    for stage, (width, count) in enumerate(zip(widths, num_blocks)):
        if stage > 0:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(widths[stage - 1], width, 3, padding=1, bias=False)]
        layers += [TinyBlock(width, pooling=latent_pooling and stage == 0) for _ in range(count)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], out_channels, 3, padding=1))


def _run(network: nn.Module, layers: nn.Sequential, sample: Tensor) -> Tensor:
    for layer in layers:
        if torch.is_grad_enabled() and network.gradient_checkpointing:
            sample = network._gradient_checkpointing_func(layer, sample)  # type: ignore[operator]
        else:
            sample = layer(sample)
    return sample


class BoundLatents(nn.Module):
    """Latents of any size -> latents between -3 and 3."""

    def forward(self, sample: Tensor) -> Tensor:
        return torch.tanh(sample / LATENT_BOUND) * LATENT_BOUND


class TinyBlock(nn.Module):
    """relu(convolutions(x) + x), (B, C, h, w).

    Args:
        channels: C.
        pooling: whether x + pool(x) takes the place of x, where pool normalizes by the statistics of the whole map.
    """

    def __init__(self, channels: int, pooling: bool = False):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.pool = None
        if pooling:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                nn.GroupNorm(4, 4 * channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )

    def forward(self, sample: Tensor) -> Tensor:
        if self.pool is not None:
            sample = sample + self.pool(sample)
        return torch.relu(self.conv(sample) + sample)
