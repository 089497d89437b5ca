"""`AsymmetricAutoencoderKLFA`: the encoder of an existing autoencoder with a wavelet decoder."""

import inspect

from diffusers import AutoencoderKL, AutoencoderKLFlux2, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, Encoder
from pydantic import PositiveInt
from torch import Tensor, nn

from favae.models.hub import LATENT_RGB_KEYS
from favae.models.sizes import check_image_size, check_widths, compression_ratio
from favae.models.tiling import FullTilesAutoencoderKL
from favae.models.wavelet_networks import WaveletDecoder
from favae.wavelets import WaveletBands


class SizeCheckedEncoder(Encoder):
    """diffusers' `Encoder`, which silently crops sizes that are not a multiple of its ratio; this one raises."""

    def forward(self, sample: Tensor) -> Tensor:
        check_image_size(sample, compression_ratio(len(self.down_blocks)))
        return super().forward(sample)


class AsymmetricAutoencoderKLFA(FullTilesAutoencoderKL):
    r"""
    The encoder of an [`AutoencoderKL`], with a decoder that ends in an inverse wavelet transform.

    Its latents are those of another autoencoder, so that a generator trained on them can use it as it is.
    `from_autoencoder_kl` takes over that one's encoder; an encoder of its own can learn them. Both branches of the
    decoder read all latent channels. `encode` and `decode` have the interface of [`AutoencoderKL`] and apply none of
    the latent statistics.

    Parameters:
        low_block_out_channels, high_block_out_channels: widths of the decoder's branches, from the bands' size down;
            `None` takes those of `block_out_channels` from the bands' size on.
        wavelet: any discrete wavelet of pywt.
        wavelet_levels: how many octaves the inverse transform replaces.
        Others: as in [`AutoencoderKL`]. They describe the encoder, the latents, and what else the decoder's blocks are.

    Raises:
        ValueError: if settings do not fit together; the message names them.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: PositiveInt = 3,
        out_channels: PositiveInt = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4,
        block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512),
        low_block_out_channels: tuple[PositiveInt, ...] | None = None,
        high_block_out_channels: tuple[PositiveInt, ...] | None = None,
        layers_per_block: PositiveInt = 2,
        act_fn: str = "silu",
        latent_channels: PositiveInt = 4,
        norm_num_groups: PositiveInt = 32,
        wavelet: str = "haar",
        wavelet_levels: PositiveInt = 1,
        sample_size: PositiveInt | tuple[PositiveInt, PositiveInt] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        ModelMixin.__init__(self)  # AutoencoderKL's own would build its decoder
        if not 0 < wavelet_levels < len(block_out_channels):
            raise ValueError(f"wavelet_levels must be in 1 ... {len(block_out_channels) - 1}, got {wavelet_levels}")
        octaves = len(block_out_channels) - wavelet_levels
        low_widths = tuple(low_block_out_channels or block_out_channels[wavelet_levels:])
        high_widths = tuple(high_block_out_channels or block_out_channels[wavelet_levels:])
        if not len(low_widths) == len(high_widths) == octaves:
            raise ValueError(
                f"low_block_out_channels and high_block_out_channels must be {octaves} widths, got {len(low_widths)} "
                f"and {len(high_widths)}"
            )
        check_widths(norm_num_groups, low_block_out_channels=low_widths, high_block_out_channels=high_widths)

        self.decoder = WaveletDecoder(
            latent_channels=latent_channels,
            low_latent_channels=latent_channels,
            out_channels=out_channels,
            low_block_out_channels=low_widths,
            high_block_out_channels=high_widths,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            bands=WaveletBands(wavelet, wavelet_levels),
            spatial_compression_ratio=self.spatial_compression_ratio,
            up_block_types=tuple(up_block_types[:octaves]),
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder = SizeCheckedEncoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=down_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            norm_num_groups=norm_num_groups,
            double_z=True,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.reset_tiling(sample_size)

    @classmethod
    def from_autoencoder_kl(
        cls,
        vae: AutoencoderKL | AutoencoderKLFlux2,
        *,
        low_block_out_channels: tuple[PositiveInt, ...] | None = None,
        high_block_out_channels: tuple[PositiveInt, ...] | None = None,
        wavelet: str = "haar",
        wavelet_levels: PositiveInt = 1,
        warm_start: bool = True,
    ) -> "AsymmetricAutoencoderKLFA":
        """A new decoder for the latents of a trained autoencoder, whose encoder is copied and frozen.

        Args:
            vae: a stock [`AutoencoderKL`], such as Stable Diffusion's or VA-VAE, or an [`AutoencoderKLFlux2`], whose
                batch norm stays with the pipeline: see `swap_vae`.
            low_block_out_channels, high_block_out_channels, wavelet, wavelet_levels: see the class.
            warm_start: let both branches begin as the trained decoder, from the latent on, as far as their widths are
                the same. Their output layers begin untrained.
        Raises:
            ValueError: if `vae` is of another class, or its settings do not fit the others.
        """
        if type(vae) not in (AutoencoderKL, AutoencoderKLFlux2):
            raise ValueError(
                f"from_autoencoder_kl takes a stock AutoencoderKL or AutoencoderKLFlux2, got {type(vae).__name__}"
            )
        known = inspect.signature(cls.__init__).parameters
        config = {name: value for name, value in vae.config.items() if name in known}
        if isinstance(vae, AutoencoderKLFlux2):
            config |= {"scaling_factor": 1.0, "force_upcast": False}
        previews = {name: vae.config[name] for name in LATENT_RGB_KEYS if name in vae.config}  # of the same latents
        model = cls(
            **config,
            low_block_out_channels=low_block_out_channels,
            high_block_out_channels=high_block_out_channels,
            wavelet=wavelet,
            wavelet_levels=wavelet_levels,
        )
        model.register_to_config(**previews)
        model.encoder.load_state_dict(vae.encoder.state_dict())
        for name in ("quant_conv", "post_quant_conv"):
            if getattr(vae, name) is not None:
                getattr(model, name).load_state_dict(getattr(vae, name).state_dict())
        model.encoder.requires_grad_(False)
        if model.quant_conv is not None:
            model.quant_conv.requires_grad_(False)
        if warm_start:
            copy_first_blocks(vae.decoder, model.decoder.low)
            copy_first_blocks(vae.decoder, model.decoder.high)
        return model


def copy_first_blocks(trained: Decoder, branch: Decoder) -> None:
    """Copies the weights of one decoder's blocks into another one's, from the latent on, until two differ in shape."""
    sources = [trained.conv_in, trained.mid_block, *trained.up_blocks]
    targets = [branch.conv_in, branch.mid_block, *branch.up_blocks]
    for source, target in zip(sources, targets):
        # a branch's last block lacks the upsampler that the trained one has there
        weights = {name: value for name, value in source.state_dict().items() if name in target.state_dict()}
        shapes = {name: value.shape for name, value in weights.items()}
        if shapes != {name: value.shape for name, value in target.state_dict().items()}:
            return
        target.load_state_dict(weights)
