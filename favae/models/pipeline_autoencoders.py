"""Autoencoders of images behind the interfaces that pipelines of FLUX.2, Qwen-Image and Wan know."""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from favae.models.hub import HubModelMixin, find_class
from favae.models.sizes import compression_ratio


class AutoencoderAdapter(HubModelMixin, ModelMixin):
    """An autoencoder inside another model, which is saved and loaded with it.

    Attributes:
        autoencoder: the model inside; images (B, 3, H, W), latents (B, C, h, w).
    """

    _group_offload_block_modules = ["autoencoder", "encoder", "decoder", "quant_conv", "post_quant_conv"]
    autoencoder: ModelMixin

    @classmethod
    def around(cls, autoencoder: ModelMixin, **config: Any) -> "AutoencoderAdapter":
        """Puts an autoencoder that exists into a new adapter with this config."""
        own = {name: value for name, value in autoencoder.config.items() if not name.startswith("_")}
        config["autoencoder_config"] = {"_class_name": type(autoencoder).__name__, **own}
        with init_empty_weights():  # of the copy that it replaces
            adapter = cls(in_channels=own.get("in_channels", 3), **config)
        adapter.autoencoder = autoencoder
        return adapter.train(autoencoder.training)

    def enable_tiling(self) -> None:
        self.autoencoder.enable_tiling()

    def disable_tiling(self) -> None:
        self.autoencoder.disable_tiling()

    def enable_slicing(self) -> None:
        self.autoencoder.enable_slicing()

    def disable_slicing(self) -> None:
        self.autoencoder.disable_slicing()


class PackedNormAutoencoder(AutoencoderAdapter):
    r"""
    An autoencoder for pipelines that normalize packed latents by a batch norm, as those of FLUX.2 do.

    `encode` and `decode` are those of the autoencoder inside. Pipelines read `bn.running_mean` and `bn.running_var`
    (4 C,), the statistics of latents of which 2 x 2 are packed into one, and their own order of these counts.

    Parameters:
        autoencoder_config: that of the model inside, with its `_class_name`.
        in_channels: color channels of the image.
        latent_channels: C.
        block_out_channels: one number per octave and one more; pipelines count them.
        batch_norm_eps: is added to the variances.
    """

    @register_to_config
    def __init__(
        self,
        autoencoder_config: dict[str, Any],
        in_channels: PositiveInt = 3,
        latent_channels: PositiveInt = 32,
        block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512),
        batch_norm_eps: PositiveFloat = 1e-4,
    ):
        super().__init__()
        self.autoencoder = build(autoencoder_config)
        self.bn = nn.BatchNorm2d(4 * latent_channels, eps=batch_norm_eps, affine=False)

    @property
    def spatial_compression_ratio(self) -> int:
        return compression_ratio(len(self.config.block_out_channels))

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | AutoencoderTinyOutput | tuple:
        return self.autoencoder.encode(x, return_dict=return_dict)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        return self.autoencoder.decode(z, return_dict=return_dict)


class SingleFrameAutoencoder(AutoencoderAdapter):
    r"""
    An autoencoder for pipelines whose images are videos of one frame, as those of Qwen-Image and Wan.

    Images are (B, 3, 1, H, W) and latents (B, C, 1, h, w); the autoencoder inside sees them without the time axis.

    Parameters:
        autoencoder_config: that of the model inside, with its `_class_name`.
        in_channels: color channels of the image.
        z_dim: C.
        latents_mean, latents_std: C numbers each, by which pipelines normalize latents.
        scale_factor_spatial: pixels per latent along each side.
        scale_factor_temporal: what pipelines count frames with; it does not matter for one.
        temperal_downsample: one entry per octave, which some pipelines count.
    """

    @register_to_config
    def __init__(
        self,
        autoencoder_config: dict[str, Any],
        in_channels: PositiveInt = 3,
        z_dim: PositiveInt = 16,
        latents_mean: tuple[float, ...] = (0.0,) * 16,
        latents_std: tuple[PositiveFloat, ...] = (1.0,) * 16,
        scale_factor_spatial: PositiveInt = 8,
        scale_factor_temporal: PositiveInt = 4,
        temperal_downsample: tuple[bool, ...] = (False,) * 3,
    ):
        super().__init__()
        self.autoencoder = build(autoencoder_config)
        self.temperal_downsample = list(temperal_downsample)

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.scale_factor_spatial

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | AutoencoderTinyOutput | tuple:
        """(B, 3, 1, H, W) -> a distribution of (B, C, 1, h, w), or latents where the model inside has no distribution.

        Raises:
            ValueError: if there is more than one frame.
        """
        output = self.autoencoder.encode(single_frame(x))
        if not hasattr(output, "latent_dist"):
            latents = output.latents[:, :, None]
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        posterior = DiagonalGaussianDistribution(output.latent_dist.parameters[:, :, None])
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """(B, C, 1, h, w) -> (B, 3, 1, H, W).

        Raises:
            ValueError: if there is more than one frame.
        """
        images = self.autoencoder.decode(single_frame(z), return_dict=False)[0][:, :, None]
        return DecoderOutput(sample=images) if return_dict else (images,)


def build(config: dict[str, Any]) -> ModelMixin:
    """A model from a config with its `_class_name`, with random weights."""
    model_class = find_class(config["_class_name"])
    return model_class.from_config({key: value for key, value in config.items() if key != "_class_name"})


def single_frame(video: Tensor) -> Tensor:
    """(B, C, 1, H, W) -> (B, C, H, W).

    Raises:
        ValueError: if there is more than one frame.
    """
    if video.shape[2] != 1:
        raise ValueError(f"this autoencoder is for single images, got {video.shape[2]} frames; call with num_frames=1")
    return video[:, :, 0]
