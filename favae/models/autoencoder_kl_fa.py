"""`AutoencoderKLFA`: a KL autoencoder of wavelet bands with the interface of diffusers' `AutoencoderKL`."""

from typing import Literal

from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from pydantic import PositiveInt
from torch import Tensor, nn

from favae.models.linear_shortcut import start_linear
from favae.models.sizes import check_widths
from favae.models.tiling import FullTilesAutoencoderKL
from favae.models.wavelet_networks import UnitMeanConv2d, WaveletDecoder, WaveletEncoder
from favae.wavelets import WaveletBands


class AutoencoderKLFA(FullTilesAutoencoderKL):
    r"""
    A frequency-aware KL autoencoder: an image is split by a wavelet transform, its low band and its high bands get
    encoders, latent channels and decoders of their own, and one inverse transform gives the image back.

    It replaces an [`AutoencoderKL`], from which everything but the two networks is inherited (slicing, tiling,
    attention processors, loading and saving). `encode` takes (B, C, H, W) in [-1, 1], H and W multiples of
    f = 2 ** (len(block_out_channels) - 1), and its latents are [low | high] along the channels. Neither `encode` nor
    `decode` applies `scaling_factor`, `shift_factor`, `latents_mean` or `latents_std`: pipelines do.

    Parameters:
        in_channels, out_channels: color channels of the image.
        block_out_channels: one width per octave, by whose number pipelines know f. The low branch has them all but the
            first `wavelet_levels`, which stand for the octaves that the wavelet transform replaces.
        high_block_out_channels: widths of the high branch, from the bands' size down; `None` takes the low branch's.
        layers_per_block, norm_num_groups: as in [`AutoencoderKL`], for all branches.
        latent_channels: channels of the whole latent.
        high_latent_channels: how many of them, counted from the last, are the high branch's.
        wavelet: any discrete wavelet of pywt.
        wavelet_levels: how often the image is split; see `WaveletBands`.
        shortcut: a linear path from patches to latents and back, which the networks only correct: an untrained model is
            then a linear codec, which helps in trainings of a few hundred steps. "overlapping" decodes a patch from its
            latent and the eight around it, "patches" from its own alone; "decoder" is "overlapping" without the way
            from patches to latents; `None` is without.
        latent_norm: "rms" divides the latents of each position by their root mean square over the channels, and there
            is no posterior: train it with noise (`loss.latent_noise`), and with `loss.kl` 0.
        sample_size, scaling_factor, shift_factor, latents_mean, latents_std, force_upcast: as in [`AutoencoderKL`].

    Raises:
        ValueError: if settings do not fit together; the message names them.

    Source: the two-branch wavelet FA-VAE on VA-VAE (Haar LL and LH, HL, HH, each with its own VAE), here as one model
    with one latent of the usual size, trained end to end in image space; the shortcut is ours.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        block_out_channels: tuple[PositiveInt, ...] = (128, 160, 256, 320, 640),
        high_block_out_channels: tuple[PositiveInt, ...] | None = (96, 128, 192, 256),
        layers_per_block: PositiveInt = 2,
        norm_num_groups: PositiveInt = 32,
        latent_channels: PositiveInt = 32,
        high_latent_channels: PositiveInt = 6,
        wavelet: str = "haar",
        wavelet_levels: PositiveInt = 1,
        shortcut: Literal["overlapping", "patches", "decoder"] | None = None,
        latent_norm: Literal["rms"] | None = None,
        sample_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 256,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
    ):
        ModelMixin.__init__(self)  # AutoencoderKL's own would build its networks
        if not 0 < wavelet_levels < len(block_out_channels):
            raise ValueError(f"wavelet_levels must be in 1 ... {len(block_out_channels) - 1}, got {wavelet_levels}")
        if not 0 < high_latent_channels < latent_channels:
            raise ValueError(f"high_latent_channels must be in 1 ... {latent_channels - 1}, got {high_latent_channels}")
        if shortcut not in (None, "overlapping", "patches", "decoder"):
            raise ValueError(f"shortcut must be 'overlapping', 'patches', 'decoder' or None, got {shortcut!r}")
        if latent_norm not in (None, "rms"):
            raise ValueError(f"latent_norm must be 'rms' or None, got {latent_norm!r}")
        low_widths = tuple(block_out_channels[wavelet_levels:])
        high_widths = tuple(high_block_out_channels or low_widths)
        if len(high_widths) != len(low_widths):
            raise ValueError(f"high_block_out_channels must be {len(low_widths)} widths, got {len(high_widths)}")
        check_widths(norm_num_groups, block_out_channels=low_widths, high_block_out_channels=high_widths)
        bands = WaveletBands(wavelet, wavelet_levels)

        self.decoder = WaveletDecoder(
            latent_channels=latent_channels,
            low_latent_channels=latent_channels - high_latent_channels,
            out_channels=out_channels,
            low_block_out_channels=low_widths,
            high_block_out_channels=high_widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            bands=bands,
            spatial_compression_ratio=self.spatial_compression_ratio,
            shortcut="overlapping" if shortcut == "decoder" else shortcut,
        )
        self.encoder = WaveletEncoder(
            in_channels=in_channels,
            low_latent_channels=latent_channels - high_latent_channels,
            high_latent_channels=high_latent_channels,
            low_block_out_channels=low_widths,
            high_block_out_channels=high_widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            bands=bands,
            spatial_compression_ratio=self.spatial_compression_ratio,
            shortcut=shortcut in ("overlapping", "patches"),
        )
        quant_conv = nn.Conv2d if latent_norm is None else UnitMeanConv2d
        self.quant_conv = quant_conv(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        if shortcut is not None:
            start_linear(
                quant_convs=[self.quant_conv, self.post_quant_conv],
                encoders=[] if shortcut == "decoder" else [self.encoder.low, self.encoder.high],
                decoders=[self.decoder.low, self.decoder.high],
            )
        self.reset_tiling(sample_size)

    @property
    def low_latent_channels(self) -> int:
        """How many of the latent channels, counted from the first, hold the low band: those that alignment acts on."""
        return self.config.latent_channels - self.config.high_latent_channels

    def low_pass(self, images: Tensor) -> Tensor:
        """The images without their high bands, (B, C, H, W)."""
        return self.encoder.bands.low_pass(images)
