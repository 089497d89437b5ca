"""`AutoencoderKLFA`: a KL autoencoder of wavelet bands behind the face of diffusers' `AutoencoderKL`."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from favae.wavelets import InverseWaveletTransform2D, WaveletTransform2D


class WaveletEncoder(nn.Module):
    """Image -> wavelet bands -> one `Encoder` per band group -> moments, low latents before high latents.

    Args:
        low, high: encoders of the LL band (3 channels) and of LH, HL, HH (9 channels), each giving mean and logvar.
        wavelet: a pywt bank.
        band_scales: what the low and the high bands are divided by, so that both reach their network near unit size.
        stride: the pixels a latent covers along each side.
        upsample_low: resize LL to the image's size first, as the published model does (four times the work).
    """

    def __init__(
        self,
        low: Encoder,
        high: Encoder,
        wavelet: str,
        band_scales: tuple[float, float],
        stride: int,
        upsample_low: bool,
    ):
        super().__init__()
        self.transform = WaveletTransform2D(wavelet)
        self.low = low
        self.high = high
        self.band_scales = tuple(band_scales)
        self.stride = stride
        self.upsample_low = upsample_low

    def forward(self, sample: Tensor) -> Tensor:
        height, width = sample.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(f"height and width must be multiples of {self.stride}, got {height}x{width}")
        low, high = self.transform(sample)  # (B, 3, H/2, W/2), (B, 3, 3, H/2, W/2)
        low, high = low / self.band_scales[0], high.flatten(1, 2) / self.band_scales[1]
        if self.upsample_low:
            low = F.interpolate(low, size=(height, width), mode="bicubic")
        low_mean, low_logvar = self.low(low).chunk(2, dim=1)
        high_mean, high_logvar = self.high(high).chunk(2, dim=1)
        return torch.cat([low_mean, high_mean, low_logvar, high_logvar], dim=1)


class WaveletDecoder(nn.Module):
    """The mirror of `WaveletEncoder`: latents -> one `Decoder` per band group -> inverse transform -> image.

    Args:
        low_latent_channels: how many of the latent channels, counted from the first, the low decoder reads.
        high_sees_all: whether the high decoder reads all latents, or only those after the low ones.
        low, high, wavelet, band_scales, upsample_low: as in `WaveletEncoder`.
    """

    def __init__(
        self,
        low: Decoder,
        high: Decoder,
        wavelet: str,
        band_scales: tuple[float, float],
        low_latent_channels: int,
        high_sees_all: bool,
        upsample_low: bool,
    ):
        super().__init__()
        self.low = low
        self.high = high
        self.transform = InverseWaveletTransform2D(wavelet)
        self.band_scales = tuple(band_scales)
        self.low_latent_channels = low_latent_channels
        self.high_sees_all = high_sees_all
        self.upsample_low = upsample_low

    def forward(self, sample: Tensor) -> Tensor:
        low = self.low(sample[:, : self.low_latent_channels])
        high = self.high(sample if self.high_sees_all else sample[:, self.low_latent_channels :])
        if self.upsample_low:
            low = F.interpolate(low, size=high.shape[-2:], mode="bicubic")
        high = high.unflatten(1, (-1, 3))  # (B, 3, 3, H/2, W/2)
        return self.transform(low * self.band_scales[0], high * self.band_scales[1])


class AutoencoderKLFA(AutoencoderKL):
    r"""
    A frequency-aware KL autoencoder: an image is split by a wavelet transform, its low band and its three high bands
    get encoders, latent channels and decoders of their own, and one inverse transform gives the image back.

    A drop-in for [`AutoencoderKL`], from which everything but the two networks is inherited (slicing, tiling, attention
    processors, loading and saving). `encode` takes (B, 3, H, W) in [-1, 1], H and W multiples of
    f = 2 ** (len(block_out_channels) - 1), and its latents are [low | high] along the channels; neither `encode` nor
    `decode` applies `scaling_factor`, `shift_factor`, `latents_mean` or `latents_std`: pipelines do.

    Parameters:
        in_channels, out_channels: colour channels of the image.
        block_out_channels: one width per octave. The first stands for the octave that the wavelet transform replaces
            and is unused with `low_branch="native"`; the others are the low branch's.
        high_block_out_channels: widths of the high branch, from half the image's size down; `None` takes
            `block_out_channels[1:]`.
        layers_per_block, act_fn, norm_num_groups, mid_block_add_attention: as in [`AutoencoderKL`], for all branches.
        latent_channels: channels of the whole latent, of which the last `high_latent_channels` are the high branch's.
        wavelet: any discrete bank of pywt.
        band_scales: the low and the high bands are divided by these before encoding and multiplied after decoding.
        low_branch: "native" works on LL as it is; "upsampled" resizes it to the image's size first, as published.
        high_decoder_input: "all" latents (they hold what the details belong to), or only the "high" ones, as published.
        use_quant_conv, use_post_quant_conv, sample_size, scaling_factor, shift_factor, latents_mean, latents_std,
            force_upcast: as in [`AutoencoderKL`].

    Raises:
        ValueError: if widths and latent channels do not fit together.

    Source: the two-branch wavelet FA-VAE on VA-VAE (Haar LL and LH, HL, HH, each with its own VAE), here as one model
    with one latent of the usual size, trained end to end in image space.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 160, 256, 320, 640),
        high_block_out_channels: tuple[int, ...] | None = (96, 128, 192, 256),
        layers_per_block: int = 2,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        latent_channels: int = 32,
        high_latent_channels: int = 6,
        wavelet: str = "haar",
        band_scales: tuple[float, float] = (2.0, 0.5),
        low_branch: str = "native",
        high_decoder_input: str = "all",
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        ModelMixin.__init__(self)  # everything of AutoencoderKL but its networks
        low_channels = latent_channels - high_latent_channels
        if not 0 < high_latent_channels < latent_channels:
            raise ValueError(
                f"high_latent_channels must be between 1 and latent_channels - 1 = {latent_channels - 1}, "
                f"got {high_latent_channels}"
            )
        if low_branch not in ("native", "upsampled"):
            raise ValueError(f"low_branch must be 'native' or 'upsampled', got {low_branch!r}")
        if high_decoder_input not in ("all", "high"):
            raise ValueError(f"high_decoder_input must be 'all' or 'high', got {high_decoder_input!r}")
        upsample_low = low_branch == "upsampled"
        low_widths = tuple(block_out_channels) if upsample_low else tuple(block_out_channels)[1:]
        high_widths = tuple(high_block_out_channels or block_out_channels[1:])
        if len(high_widths) != len(block_out_channels) - 1:
            raise ValueError(
                f"high_block_out_channels must have one entry less than block_out_channels "
                f"({len(block_out_channels) - 1}), got {len(high_widths)}"
            )

        common = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }

        def encoder(bands: int, channels: int, widths: tuple[int, ...]) -> Encoder:
            blocks = ("DownEncoderBlock2D",) * len(widths)
            return Encoder(bands * in_channels, channels, blocks, widths, double_z=True, **common)

        def decoder(channels: int, bands: int, widths: tuple[int, ...]) -> Decoder:
            blocks = ("UpDecoderBlock2D",) * len(widths)
            return Decoder(channels, bands * out_channels, blocks, widths, **common)

        self.encoder = WaveletEncoder(
            encoder(1, low_channels, low_widths),
            encoder(3, high_latent_channels, high_widths),
            wavelet=wavelet,
            band_scales=band_scales,
            stride=2 ** (len(block_out_channels) - 1),
            upsample_low=upsample_low,
        )
        self.decoder = WaveletDecoder(
            decoder(low_channels, 1, low_widths),
            decoder(latent_channels if high_decoder_input == "all" else high_latent_channels, 3, high_widths),
            wavelet=wavelet,
            band_scales=band_scales,
            low_latent_channels=low_channels,
            high_sees_all=high_decoder_input == "all",
            upsample_low=upsample_low,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size
        self.tile_latent_min_size = sample_size // self.encoder.stride
        self.tile_overlap_factor = 0.25

    @property
    def low_latent_channels(self) -> int:
        """How many of the latent channels, counted from the first, hold the low band: those that alignment acts on."""
        return self.config.latent_channels - self.config.high_latent_channels
