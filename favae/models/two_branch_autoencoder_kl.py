"""`TwoBranchAutoencoderKL`: the published two-branch wavelet FA-VAE, a baseline for `AutoencoderKLFA`."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from pydantic import PositiveInt
from torch import Tensor, nn

from favae.models.sizes import check_image_size, check_widths
from favae.models.tiling import FullTilesAutoencoderKL
from favae.wavelets import WaveletBands


class TwoBranchEncoder(nn.Module):
    """Two independent encoders: one of LL, resized to the image's size, and one of LH, HL and HH.

    Args:
        low: encoder of the image's size, double_z. high: encoder of the bands' size, double_z.
        bands: the wavelet transform.
        spatial_compression_ratio: image pixels per latent along each side.
    """

    def __init__(self, low: Encoder, high: Encoder, bands: WaveletBands, spatial_compression_ratio: int):
        super().__init__()
        self.low, self.high, self.bands = low, high, bands
        self.spatial_compression_ratio = spatial_compression_ratio

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> [low mean | high mean | low logvar | high logvar], (B, 2 C', H/f, W/f).

        Raises:
            ValueError: if H or W is not a multiple of f, the compression ratio.
        """
        check_image_size(sample, self.spatial_compression_ratio)
        low, high = self.bands(sample)
        low = F.interpolate(low, size=sample.shape[-2:], mode="bicubic")
        low_mean, low_logvar = self.low(low).chunk(2, dim=1)
        high_mean, high_logvar = self.high(high).chunk(2, dim=1)
        return torch.cat([low_mean, high_mean, low_logvar, high_logvar], dim=1)


class TwoBranchDecoder(nn.Module):
    """The mirror of `TwoBranchEncoder`; each branch reads its own latents only.

    Args:
        low, high, bands: as in `TwoBranchEncoder`.
        low_latent_channels: latent channels of the low branch, counted from the first.
    """

    def __init__(self, low: Decoder, high: Decoder, bands: WaveletBands, low_latent_channels: int):
        super().__init__()
        self.low, self.high, self.bands = low, high, bands
        self.low_latent_channels = low_latent_channels

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C', h, w) -> (B, C, f h, f w)."""
        low = self.low(sample[:, : self.low_latent_channels])
        high = self.high(sample[:, self.low_latent_channels :])
        return self.bands.inverse(F.interpolate(low, size=high.shape[-2:], mode="bicubic"), high)


class TwoBranchAutoencoderKL(FullTilesAutoencoderKL):
    r"""
    The published wavelet FA-VAE: two VA-VAEs, one of the Haar band LL resized to the image's size, one of the bands LH,
    HL and HH, all divided by 2, with attention in their deepest blocks and nothing that joins them but the latent.

    Parameters:
        block_out_channels: widths of the low branch, one per octave of the image.
        high_block_out_channels: widths of the high branch, one fewer.
        Others: as in [`AutoencoderKLFA`].

    Raises:
        ValueError: if settings do not fit together; the message names them.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        block_out_channels: tuple[PositiveInt, ...] = (128, 128, 256, 256, 512),
        high_block_out_channels: tuple[PositiveInt, ...] = (128, 256, 256, 512),
        layers_per_block: PositiveInt = 2,
        norm_num_groups: PositiveInt = 32,
        latent_channels: PositiveInt = 64,
        high_latent_channels: PositiveInt = 32,
        sample_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        ModelMixin.__init__(self)  # AutoencoderKL's own would build its networks
        if not 0 < high_latent_channels < latent_channels:
            raise ValueError(f"high_latent_channels must be in 1 ... {latent_channels - 1}, got {high_latent_channels}")
        if len(high_block_out_channels) != len(block_out_channels) - 1:
            raise ValueError(
                f"high_block_out_channels must be {len(block_out_channels) - 1} widths, "
                f"got {len(high_block_out_channels)}"
            )
        check_widths(
            norm_num_groups,
            block_out_channels=block_out_channels,
            high_block_out_channels=high_block_out_channels,
        )
        bands = WaveletBands("haar", levels=1, low_scale=2.0, high_scale=2.0)
        low_channels = latent_channels - high_latent_channels
        octaves, high_octaves = len(block_out_channels), len(high_block_out_channels)

        self.decoder = TwoBranchDecoder(
            low=Decoder(
                in_channels=low_channels,
                out_channels=out_channels,
                up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (octaves - 1)),
                block_out_channels=block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
            ),
            high=Decoder(
                in_channels=high_latent_channels,
                out_channels=3 * out_channels,
                up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (high_octaves - 1)),
                block_out_channels=high_block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
            ),
            bands=bands,
            low_latent_channels=low_channels,
        )
        self.encoder = TwoBranchEncoder(
            low=Encoder(
                in_channels=in_channels,
                out_channels=low_channels,
                down_block_types=(*["DownEncoderBlock2D"] * (octaves - 1), "AttnDownEncoderBlock2D"),
                block_out_channels=block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
                double_z=True,
            ),
            high=Encoder(
                in_channels=3 * in_channels,
                out_channels=high_latent_channels,
                down_block_types=(*["DownEncoderBlock2D"] * (high_octaves - 1), "AttnDownEncoderBlock2D"),
                block_out_channels=high_block_out_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
                double_z=True,
            ),
            bands=bands,
            spatial_compression_ratio=self.spatial_compression_ratio,
        )
        # 1x1 convolutions around the latent would mix the branches
        self.quant_conv = self.post_quant_conv = None
        self.reset_tiling(sample_size)

    @property
    def low_latent_channels(self) -> int:
        """How many of the latent channels, counted from the first, hold the low band: those that alignment acts on."""
        return self.config.latent_channels - self.config.high_latent_channels

    def low_pass(self, images: Tensor) -> Tensor:
        """The images without their high bands, (B, C, H, W)."""
        return self.encoder.bands.low_pass(images)
