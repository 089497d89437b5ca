"""The two networks of wavelet autoencoders: one branch for the low band of an image, one for its high bands."""

from typing import Literal

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents
from favae.models.sizes import check_image_size
from favae.normalization import MIN_LOGVAR
from favae.wavelets import WaveletBands


class WaveletEncoder(nn.Module):
    """Image -> wavelet bands -> one `Encoder` for the low band and one for the high bands -> moments.

    Args:
        in_channels: color channels of the image.
        low_latent_channels, high_latent_channels: channels of the latent that each branch gives.
        low_block_out_channels, high_block_out_channels: widths of the branches, from the bands' size down.
        layers_per_block, norm_num_groups: as in diffusers' `Encoder`.
        bands: the wavelet transform.
        spatial_compression_ratio: image pixels per latent along each side.
        shortcut: whether a linear map of the patches, `PatchesToLatents`, is added to the mean.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        low_latent_channels: int,
        high_latent_channels: int,
        low_block_out_channels: tuple[int, ...],
        high_block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        bands: WaveletBands,
        spatial_compression_ratio: int,
        shortcut: bool,
    ):
        super().__init__()
        self.bands = bands
        self.spatial_compression_ratio = spatial_compression_ratio
        self.low = Encoder(
            in_channels=in_channels,
            out_channels=low_latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(low_block_out_channels),
            block_out_channels=low_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=True,
        )
        self.high = Encoder(
            in_channels=in_channels * bands.num_high_bands,
            out_channels=high_latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(high_block_out_channels),
            block_out_channels=high_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=True,
        )
        self.shortcut = None
        if shortcut:
            self.shortcut = PatchesToLatents(
                in_channels, low_latent_channels + high_latent_channels, size=spatial_compression_ratio
            )

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C, H, W) -> [low mean | high mean | low logvar | high logvar], (B, 2 C', H/f, W/f).

        Raises:
            ValueError: if H or W is not a multiple of f, the compression ratio.
        """
        check_image_size(sample, self.spatial_compression_ratio)
        low, high = self.bands(sample)
        low_mean, low_logvar = self.low(low).chunk(2, dim=1)
        high_mean, high_logvar = self.high(high).chunk(2, dim=1)
        mean = torch.cat([low_mean, high_mean], dim=1)
        if self.shortcut is not None:
            mean = mean + self.shortcut(sample)
        return torch.cat([mean, low_logvar, high_logvar], dim=1)


class WaveletDecoder(nn.Module):
    """Latents -> one `Decoder` for the low band and one for the high bands -> inverse transform -> image.

    Args:
        latent_channels: channels of the latent, all of which the high branch reads: they hold what the details are of.
        low_latent_channels: the low branch reads this many of them, from the first.
        out_channels: color channels of the image.
        low_block_out_channels, high_block_out_channels: widths of the branches, from the bands' size down.
        layers_per_block, norm_num_groups, act_fn, mid_block_add_attention: as in diffusers' `Decoder`.
        bands: the wavelet transform.
        spatial_compression_ratio: image pixels per latent along each side.
        up_block_types: of both branches, from the latent up; None takes "UpDecoderBlock2D" throughout.
        shortcut: which linear map of the latents is added to the image, see `LatentsToPatches`; None for none.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        low_latent_channels: int,
        out_channels: int,
        low_block_out_channels: tuple[int, ...],
        high_block_out_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        bands: WaveletBands,
        spatial_compression_ratio: int,
        up_block_types: tuple[str, ...] | None = None,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        shortcut: Literal["overlapping", "patches"] | None = None,
    ):
        super().__init__()
        self.bands = bands
        self.low_latent_channels = low_latent_channels
        up_block_types = up_block_types or ("UpDecoderBlock2D",) * len(low_block_out_channels)
        self.low = Decoder(
            in_channels=low_latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=low_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.high = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels * bands.num_high_bands,
            up_block_types=up_block_types,
            block_out_channels=high_block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.shortcut = None
        if shortcut is not None:
            self.shortcut = LatentsToPatches(
                latent_channels,
                out_channels,
                size=spatial_compression_ratio,
                overlapping={"overlapping": True, "patches": False}[shortcut],
            )

    def forward(self, sample: Tensor) -> Tensor:
        """(B, C', h, w) -> (B, C, f h, f w)."""
        low = self.low(sample[:, : self.low_latent_channels])
        high = self.high(sample)
        image = self.bands.inverse(low, high)
        return image if self.shortcut is None else image + self.shortcut(sample)


class UnitMeanConv2d(nn.Conv2d):
    """A convolution to moments (B, 2 C', h, w): means of the root mean square 1 at each position, without a variance.

    Source: GAE, arXiv 2603.10365.
    """

    def forward(self, input: Tensor) -> Tensor:
        mean, _ = super().forward(input).chunk(2, dim=1)
        mean = mean * torch.rsqrt(mean.float().square().mean(dim=1, keepdim=True) + 1e-6).to(mean)
        return torch.cat([mean, torch.full_like(mean, MIN_LOGVAR)], dim=1)
