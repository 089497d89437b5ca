"""Models that are in a comparison only to tell two explanations apart."""

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, start_linear
from favae.models.sizes import compression_ratio
from favae.wavelets import WaveletBands


class ControlEncoder(nn.Module):
    """diffusers' encoder of images or of their wavelet bands, with a linear map of the patches added to its mean."""

    def __init__(self, network: Encoder, bands: WaveletBands | None, shortcut: PatchesToLatents | None):
        super().__init__()
        self.network, self.bands, self.shortcut = network, bands, shortcut

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> mean and log-variance, (B, 2 C', H / f, W / f)."""
        moments = self.network(images if self.bands is None else torch.cat(self.bands(images), dim=1))
        if self.shortcut is None:
            return moments
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([mean + self.shortcut(images), logvar], dim=1)


class ControlDecoder(nn.Module):
    """diffusers' decoder to images or to their wavelet bands, with a linear map of the latents added to the image."""

    def __init__(self, network: Decoder, bands: WaveletBands | None, shortcut: LatentsToPatches | None):
        super().__init__()
        self.network, self.bands, self.shortcut = network, bands, shortcut

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C', H / f, W / f) -> (B, 3, H, W)."""
        images = self.network(latents)
        if self.bands is not None:
            images = self.bands.inverse(images[:, :3], images[:, 3:])
        return images if self.shortcut is None else images + self.shortcut(latents)


class ControlAutoencoder(AutoencoderKL):
    """A stock autoencoder with one idea of `AutoencoderKLFA` at a time.

    Args:
        in_channels: channels of the images.
        block_out_channels: widths of the levels; images are halved between each two.
        latent_channels: channels of the latents.
        wavelet: give the four Haar bands of the image to one network, in place of its first level.
        shortcut: add the linear map between patches and latents, which starts as an optimal linear codec.
        overlapping: of the shortcut, see `LatentsToPatches`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 32, 64, 128),
        latent_channels: int = 16,
        wavelet: bool = False,
        shortcut: bool = False,
        overlapping: bool = False,
    ):
        ModelMixin.__init__(self)
        # The wavelet transform halves the image itself, so the first level goes.
        channels = in_channels * 4 if wavelet else in_channels
        widths = block_out_channels[1:] if wavelet else block_out_channels
        patch_size = compression_ratio(len(block_out_channels))
        common = {"layers_per_block": 1, "norm_num_groups": 8}
        bands = WaveletBands() if wavelet else None

        self.encoder = ControlEncoder(
            network=Encoder(
                in_channels=channels,
                out_channels=latent_channels,
                down_block_types=("DownEncoderBlock2D",) * (len(widths) - 1) + ("AttnDownEncoderBlock2D",),
                block_out_channels=widths,
                **common,
            ),
            bands=bands,
            shortcut=PatchesToLatents(in_channels, latent_channels, patch_size) if shortcut else None,
        )
        self.decoder = ControlDecoder(
            network=Decoder(
                in_channels=latent_channels,
                out_channels=channels,
                up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(widths) - 1),
                block_out_channels=widths,
                **common,
            ),
            bands=bands,
            shortcut=LatentsToPatches(latent_channels, in_channels, patch_size, overlapping) if shortcut else None,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        if shortcut:
            start_linear([self.quant_conv, self.post_quant_conv], [self.encoder.network], [self.decoder.network])
        self.use_slicing = self.use_tiling = False
