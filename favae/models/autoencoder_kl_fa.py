"""`AutoencoderKLFA`: a KL autoencoder of wavelet bands behind the face of diffusers' `AutoencoderKL`."""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder
from torch import Tensor, nn

from favae.models.frequency_complement import Branch, ComplementedDecoder, check_widths
from favae.models.hub import HubModelMixin
from favae.models.linear_shortcut import LatentsToPatches, PatchesToLatents, start_linear
from favae.models.tiling import map_tiles
from favae.wavelets import WaveletBands


def _check_size(images: Tensor, stride: int) -> None:
    height, width = images.shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"height and width must be multiples of {stride}, got {height}x{width}")


class ImageEncoder(Encoder):
    """diffusers' `Encoder`, which would crop images of sizes that do not fit without a word."""

    def forward(self, sample: Tensor) -> Tensor:
        _check_size(sample, 2 ** (len(self.down_blocks) - 1))
        return super().forward(sample)


class WaveletEncoder(nn.Module):
    """Image -> wavelet bands -> one `Encoder` per band group -> moments, low latents before high latents.

    Args:
        low, high: encoders of the low band (3 channels) and of the high bands (9, with one level), each giving mean
            and logvar.
        bands: the transform.
        stride: the pixels a latent covers along each side.
        upsample_low: resize LL to the image's size first, as the published model does (four times the work).
        shortcut: patches to latents, added to the mean; None for none.
    """

    def __init__(
        self,
        low: Encoder,
        high: Encoder,
        bands: WaveletBands,
        stride: int,
        upsample_low: bool,
        shortcut: PatchesToLatents | None,
    ):
        super().__init__()
        self.bands = bands
        self.low = low
        self.high = high
        self.stride = stride
        self.upsample_low = upsample_low
        self.shortcut = shortcut

    def forward(self, sample: Tensor) -> Tensor:
        _check_size(sample, self.stride)
        low, high = self.bands(sample)  # (B, 3, H/2, W/2), (B, 9, H/2, W/2)
        if self.upsample_low:
            low = F.interpolate(low, size=sample.shape[-2:], mode="bicubic")
        low_mean, low_logvar = self.low(low).chunk(2, dim=1)
        high_mean, high_logvar = self.high(high).chunk(2, dim=1)
        mean = torch.cat([low_mean, high_mean], dim=1)
        if self.shortcut is not None:
            mean = mean + self.shortcut(sample)
        return torch.cat([mean, low_logvar, high_logvar], dim=1)


class WaveletDecoder(nn.Module):
    """The mirror of `WaveletEncoder`: latents -> one `Decoder` per band group -> inverse transform -> image.

    Args:
        low_latents, high_latents: which of the latent channels each decoder reads.
        low, high, bands, upsample_low: as in `WaveletEncoder`.
        shortcut: latents to patches, added to the image; None for none.
        whole_image: `low` decodes the image itself, and the high bands are added to it.
    """

    def __init__(
        self,
        low: Decoder,
        high: Decoder,
        bands: WaveletBands,
        low_latents: slice,
        high_latents: slice,
        upsample_low: bool,
        shortcut: LatentsToPatches | None,
        whole_image: bool = False,
    ):
        super().__init__()
        self.low = low
        self.high = high
        self.bands = bands
        self.low_latents = low_latents
        self.high_latents = high_latents
        self.upsample_low = upsample_low
        self.shortcut = shortcut
        self.whole_image = whole_image

    def forward(self, sample: Tensor) -> Tensor:
        low = self.low(sample[:, self.low_latents])
        high = self.high(sample[:, self.high_latents])
        if self.whole_image:
            return low + self.bands.inverse(high.new_zeros(len(high), low.shape[1], *high.shape[-2:]), high)
        if self.upsample_low:
            low = F.interpolate(low, size=high.shape[-2:], mode="bicubic")
        image = self.bands.inverse(low, high)
        return image if self.shortcut is None else image + self.shortcut(sample)


class AutoencoderKLFA(HubModelMixin, AutoencoderKL):
    r"""
    A frequency-aware KL autoencoder: an image is split by a wavelet transform, its low band and its high bands get
    encoders, latent channels and decoders of their own, and one inverse transform gives the image back.

    A drop-in for [`AutoencoderKL`], from which everything but the two networks is inherited (slicing, tiling, attention
    processors, loading and saving). `encode` takes (B, 3, H, W) in [-1, 1], H and W multiples of
    f = 2 ** (len(block_out_channels) - 1), and its latents are [low | high] along the channels; neither `encode` nor
    `decode` applies `scaling_factor`, `shift_factor`, `latents_mean` or `latents_std`: pipelines do.

    Parameters:
        in_channels, out_channels: colour channels of the image.
        block_out_channels: one width per octave. The first stands for the octave that the wavelet transform replaces
            (the first two for two levels) and is unused with `low_branch="native"`; the others are the low branch's.
        high_block_out_channels: widths of the high branch, from the bands' size down; `None` takes those of
            `block_out_channels`.
        layers_per_block, act_fn, norm_num_groups, mid_block_add_attention: as in [`AutoencoderKL`], for all branches.
        attention: whether the branches' deepest blocks have attention, as VA-VAE's.
        latent_channels: channels of the whole latent, of which the last `high_latent_channels` are the high branch's.
        wavelet: any discrete bank of pywt.
        wavelet_levels: how often the image is split; see `WaveletBands`.
        band_scales: what the low and the high bands are divided by before encoding, and multiplied by after decoding.
        encoder_type: "wavelet"; or "image", a stock encoder of `block_out_channels`, whose latents belong to no band:
            see `from_autoencoder_kl`.
        down_block_types: of the "image" encoder; `None` takes "DownEncoderBlock2D" throughout.
        low_branch: "native" works on LL as it is; "upsampled" resizes it to the image's size first, as published;
            "image", with an "image" encoder, is a whole stock decoder, to which the high branch adds, from nothing.
        high_decoder_input: "all" latents (they hold what the details belong to), or only the "high" ones, as published.
        frequency_complement: "conv", "res" or "attn" puts `FrequencyComplement` modules into the decoders.
        shortcut: a linear path from patches to latents and back, which the networks only correct: an untrained model is
            then a linear codec, rather than noise. "overlapping" decodes a patch from its latent and the eight around
            it, "patches" from its own alone; `None` is without.
        use_quant_conv, use_post_quant_conv, sample_size, scaling_factor, shift_factor, latents_mean, latents_std,
            force_upcast: as in [`AutoencoderKL`].

    Raises:
        ValueError: if settings do not fit together; the message names them.

    Source: the two-branch wavelet FA-VAE on VA-VAE (Haar LL and LH, HL, HH, each with its own VAE), here as one model
    with one latent of the usual size, trained end to end in image space; the shortcut is ours.
    """

    _skip_layerwise_casting_patterns = ["complements"]

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
        attention: bool = False,
        latent_channels: int = 32,
        high_latent_channels: int = 6,
        wavelet: str = "haar",
        wavelet_levels: int = 1,
        band_scales: tuple[float, float] = (2.0, 0.5),
        encoder_type: str = "wavelet",
        down_block_types: tuple[str, ...] | None = None,
        low_branch: str = "native",
        high_decoder_input: str = "all",
        frequency_complement: str | None = None,
        shortcut: Literal["overlapping", "patches"] | None = "overlapping",
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
        upsample_low = low_branch == "upsampled"
        whole_image = low_branch == "image"
        low_widths = tuple(block_out_channels)[0 if upsample_low or whole_image else wavelet_levels :]
        high_widths = tuple(high_block_out_channels or block_out_channels[wavelet_levels:])
        _check_settings(self.config, low_widths, high_widths)
        stride = 2 ** (len(block_out_channels) - 1)
        low_channels = latent_channels - high_latent_channels
        low_latents, high_latents = slice(None, low_channels), slice(None)
        if high_decoder_input == "high":
            high_latents = slice(low_channels, None)
        common = {
            "layers_per_block": layers_per_block,
            "act_fn": act_fn,
            "norm_num_groups": norm_num_groups,
            "mid_block_add_attention": mid_block_add_attention,
        }

        deepest = "Attn" if attention else ""

        def decoder(latents: slice, bands: int, widths: tuple[int, ...]) -> Decoder:
            channels = len(range(latent_channels)[latents])
            types = (f"{deepest}UpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (len(widths) - 1)
            settings = (channels, bands * out_channels, types, widths)
            if frequency_complement is None:
                return Decoder(*settings, **common)
            return ComplementedDecoder(*settings, frequency_complement=frequency_complement, **common)

        bands = WaveletBands(wavelet, wavelet_levels, *band_scales)
        self.decoder = WaveletDecoder(
            decoder(low_latents, 1, low_widths),
            decoder(high_latents, bands.num_high_bands, high_widths),
            bands,
            low_latents,
            high_latents,
            upsample_low,
            LatentsToPatches(latent_channels, out_channels, stride, shortcut == "overlapping") if shortcut else None,
            whole_image,
        )
        if whole_image:
            for parameter in self.decoder.high.conv_out.parameters():
                nn.init.zeros_(parameter)
        if encoder_type == "image":
            types = down_block_types or ("DownEncoderBlock2D",) * len(block_out_channels)
            self.encoder = ImageEncoder(
                in_channels, latent_channels, types, block_out_channels, double_z=True, **common
            )
        else:

            def encoder(bands: int, channels: int, widths: tuple[int, ...]) -> Encoder:
                types = ("DownEncoderBlock2D",) * (len(widths) - 1) + (f"{deepest}DownEncoderBlock2D",)
                return Encoder(bands * in_channels, channels, types, widths, double_z=True, **common)

            self.encoder = WaveletEncoder(
                encoder(1, low_channels, low_widths),
                encoder(bands.num_high_bands, high_latent_channels, high_widths),
                bands,
                stride,
                upsample_low,
                PatchesToLatents(in_channels, latent_channels, stride) if shortcut else None,
            )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        if shortcut:
            start_linear(self, [self.encoder.low, self.encoder.high], [self.decoder.low, self.decoder.high])

        self.use_slicing = False
        self.use_tiling = False
        size = max(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
        self.tile_sample_min_size = size
        self.tile_latent_min_size = max(1, size // stride)
        self.tile_overlap_factor = 0.25

    @property
    def low_latent_channels(self) -> int:
        """How many of the latent channels, counted from the first, hold the low band: those that alignment acts on."""
        return self.config.latent_channels - self.config.high_latent_channels

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What spectrum losses compare.

        Raises:
            ValueError: for an "image" encoder, whose features have other sizes than the decoders'.
        """
        if self.config.encoder_type == "image":
            raise ValueError("encoder_type='image' has no features that match those of the decoders' complements")
        encoder, decoder = self.encoder, self.decoder
        return (
            Branch(encoder.low, decoder.low, decoder.low_latents),
            Branch(encoder.high, decoder.high, decoder.high_latents),
        )

    def _tiled_encode(self, x: Tensor) -> Tensor:
        stride = 2 ** (len(self.config.block_out_channels) - 1)
        _check_size(x, stride)
        tile = max(1, self.tile_sample_min_size // stride)  # in latents

        def encode(tile: Tensor) -> Tensor:
            moments = self.encoder(tile)
            return moments if self.quant_conv is None else self.quant_conv(moments)

        overlap = int(tile * self.tile_overlap_factor)
        return map_tiles(encode, x, stride * tile, stride * overlap, unit=stride)

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """As `encode`, in overlapping tiles of `tile_sample_min_size`, cross-faded."""
        posterior = DiagonalGaussianDistribution(self._tiled_encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """(B, C, h, w) in overlapping tiles of `tile_latent_min_size`, cross-faded -> as `decode`."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        tile = self.tile_latent_min_size
        sample = map_tiles(self.decoder, z, tile, int(tile * self.tile_overlap_factor))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def from_autoencoder_kl(cls, vae: AutoencoderKL, warm_start: bool = True, **settings) -> "AutoencoderKLFA":
        """The encoder and latent space of a trained autoencoder, frozen, with a new frequency-aware decoder.

        Latents stay what they are, so a generator trained on them profits from a better decoder as it is. Only the
        decoder and `post_quant_conv` want gradients.

        Args:
            vae: a stock [`AutoencoderKL`], such as Stable Diffusion's or VA-VAE.
            warm_start: let both branches begin as the trained decoder up to its last octave, which the inverse
                transform replaces, as far as their widths agree (`high_block_out_channels=None` takes its widths), with
                untrained output layers. With `low_branch="image"` the whole decoder is kept, and images are at the
                start what they were.
            settings: what concerns the decoder: `high_block_out_channels`, `wavelet`, `frequency_complement`, ...
        Raises:
            ValueError: for another kind of autoencoder, settings that the encoder has decided, or a decoder that
                `low_branch="image"` cannot keep whole.
        """
        if not isinstance(vae, AutoencoderKL) or isinstance(vae, cls):
            raise ValueError(f"from_autoencoder_kl takes a stock AutoencoderKL, got {type(vae).__name__}")
        kept = (
            *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "act_fn", "norm_num_groups"),
            *(
                "mid_block_add_attention",
                "latent_channels",
                "down_block_types",
                "use_quant_conv",
                "use_post_quant_conv",
            ),
            *("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast"),
        )
        for name in settings:
            if name in (*kept, "encoder_type", "high_latent_channels", "shortcut"):
                raise ValueError(f"{name} is decided by the autoencoder given to from_autoencoder_kl")
        settings.setdefault("high_block_out_channels", None)
        settings.setdefault("attention", vae.config.up_block_types[0].startswith("Attn"))
        config = {name: vae.config[name] for name in kept}
        model = cls(**config, encoder_type="image", high_latent_channels=0, shortcut=None, **settings)
        for name in ("encoder", "quant_conv", "post_quant_conv"):
            if getattr(model, name) is not None:
                getattr(model, name).load_state_dict(getattr(vae, name).state_dict())
        if warm_start:
            whole = _begin_as(model.decoder.low, vae.decoder)
            _begin_as(model.decoder.high, vae.decoder)
            if model.config.low_branch == "image" and not whole:
                raise ValueError(
                    "low_branch='image' keeps decoders with attention in the deepest blocks or none, not this"
                )
        model.encoder.requires_grad_(False)
        if model.quant_conv is not None:
            model.quant_conv.requires_grad_(False)
        return model


def _begin_as(branch: Decoder, trained: Decoder) -> bool:
    """Copies the blocks from the latent on, until one is another; returns whether none was."""

    def stages(decoder: Decoder) -> list[nn.Module]:
        return [decoder.conv_in, decoder.mid_block, *decoder.up_blocks, decoder.conv_norm_out, decoder.conv_out]

    for ours, theirs in zip(stages(branch), stages(trained)):
        own, state = ours.state_dict(), theirs.state_dict()
        if any(name not in state or state[name].shape != value.shape for name, value in own.items()):
            return False
        ours.load_state_dict({name: state[name] for name in own})
    return trained.state_dict().keys() <= branch.state_dict().keys()


def _check_settings(config, low_widths: tuple[int, ...], high_widths: tuple[int, ...]) -> None:
    """Raises ValueError for settings of `AutoencoderKLFA` that do not fit together."""
    image = config.encoder_type == "image"
    for name, allowed in {
        "encoder_type": ("wavelet", "image"),
        "low_branch": ("native", "upsampled", "image"),
        "high_decoder_input": ("all", "high"),
        "shortcut": ("overlapping", "patches", None),
    }.items():
        if config[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {config[name]!r}")
    if not image and not 0 < config.high_latent_channels < config.latent_channels:
        raise ValueError(
            f"high_latent_channels must be between 1 and latent_channels - 1 = {config.latent_channels - 1}, "
            f"got {config.high_latent_channels}"
        )
    if image and config.high_latent_channels != 0:
        raise ValueError(
            f"encoder_type='image' has no latents of the high band: high_latent_channels must be 0, "
            f"got {config.high_latent_channels}"
        )
    if image and config.high_decoder_input == "high":
        raise ValueError("encoder_type='image' has no latents of the high band: high_decoder_input must be 'all'")
    if config.low_branch == "image" and not image:
        raise ValueError("low_branch='image' is a decoder for latents that exist: it needs encoder_type='image'")
    if image and config.shortcut:
        raise ValueError("encoder_type='image' keeps its latent space: shortcut must be None")
    if image and config.down_block_types is not None and len(config.down_block_types) != len(config.block_out_channels):
        raise ValueError(
            f"down_block_types must have as many entries as block_out_channels ({len(config.block_out_channels)}), "
            f"got {len(config.down_block_types)}"
        )
    if len(config.band_scales) != 2 or min(config.band_scales) <= 0:
        raise ValueError(f"band_scales must be two positive numbers, got {tuple(config.band_scales)}")
    if not image and config.down_block_types is not None:
        raise ValueError("encoder_type='wavelet' has its own blocks: down_block_types must be None")
    if config.low_branch == "upsampled" and config.wavelet_levels != 1:
        raise ValueError(f"low_branch='upsampled' needs wavelet_levels=1, got {config.wavelet_levels}")
    octaves = len(config.block_out_channels) - config.wavelet_levels
    if config.wavelet_levels < 1 or octaves < 1:
        raise ValueError(
            f"wavelet_levels must be at least 1 and below the number of block_out_channels "
            f"({len(config.block_out_channels)}), got {config.wavelet_levels}"
        )
    if len(high_widths) != octaves:
        raise ValueError(
            f"high_block_out_channels must have {octaves} entries, those of block_out_channels "
            f"({len(config.block_out_channels)}) less wavelet_levels ({config.wavelet_levels}), got {len(high_widths)}"
        )
    check_widths("block_out_channels", config.block_out_channels if image else low_widths, config.norm_num_groups)
    check_widths("high_block_out_channels", high_widths, config.norm_num_groups)
