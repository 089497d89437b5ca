"""The same few functions for any diffusers autoencoder of images, whose outputs and value ranges differ.

`encode` of `AutoencoderKL` and its relatives gives `latent_dist`, that of `AutoencoderTiny` and `VQModel` `latents`,
that of `AutoencoderDC` and `AutoencoderRAE` `latent`. `AutoencoderRAE` works in [0, 1], the others in [-1, 1]. Those of
videos that encode an image as one frame, such as `AutoencoderKLQwenImage` and `AutoencoderKLWan`, get and give that
frame. Scaling factors, shifts and latent statistics belong to generators: here `decode` takes what `encode` gives.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from favae.channels import MODES
from favae.errors import ModelError, one_line
from favae.models import VQModelFA
from favae.models.hub import find_class, silent_about_previews
from favae.models.scale_quantizers import ScaleQuantizer
from favae.models.sizes import compression_ratio
from favae.normalization import AUTOENCODER_RAE, MIN_LOGVAR


def load_autoencoder(path: str) -> ModelMixin:
    """Opens an autoencoder as the class that its config names: one of ours, any of diffusers, or one that is imported.

    Args:
        path: a folder or a hub name. The autoencoder of a saved pipeline is its `vae`.

    Raises:
        ModelError: if there is no autoencoder, or it cannot be opened.
    """
    name = "model"
    try:
        try:
            # AutoModel.load_config would do, but once it has read a pipeline's index it goes on reading such files.
            options, config = {}, diffusers.AutoencoderKL.load_config(path)
        except OSError:
            options = {"subfolder": "vae"}
            config = diffusers.AutoencoderKL.load_config(path, **options)
        name = config["_class_name"]
        model_class = find_class(name)
        if not (hasattr(model_class, "encode") and hasattr(model_class, "decode")):
            raise ModelError(f"{path}: a {name} is not an autoencoder")
        with silent_about_previews():
            model, found = model_class.from_pretrained(path, output_loading_info=True, **options)
        if found["missing_keys"]:  # diffusers would begin with random ones
            lacking = sorted(found["missing_keys"])
            raise ModelError(f"{path}: the file lacks {len(lacking)} weights of its config, such as {lacking[0]}")
        return model.eval()
    except NameError as error:  # AutoencoderRAE uses names of transformers that it could not import
        raise ModelError(f"{path}: a {name} needs the package transformers ({error})") from error
    except (OSError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: no autoencoder could be opened here ({one_line(error)})") from error


def spatial_compression_ratio(vae: ModelMixin) -> int:
    """Image pixels per latent along each side.

    Raises:
        ModelError: if neither the autoencoder nor its config tells.
    """
    config = vae.config
    if "dim_mult" in config:  # Qwen-Image's and Wan's, whose own number does not follow their settings
        return compression_ratio(len(config.dim_mult)) * (config.get("patch_size") or 1)
    if hasattr(vae, "spatial_compression_ratio"):
        return int(vae.spatial_compression_ratio)
    for widths in ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "ch_mult"):
        if widths in config:
            return compression_ratio(len(config[widths]))
    if isinstance(vae, AUTOENCODER_RAE):
        # the image is resized for the encoder, which gives one latent per patch
        patches = config.encoder_input_size // config.encoder_patch_size
        return (config.image_size or config.patch_size * patches) // patches
    raise ModelError(f"the spatial compression ratio of a {type(vae).__name__} is not known")


def image_channels(vae: ModelMixin) -> int:
    """Channels of the images that an autoencoder takes and gives back: 1 (gray), 3 (RGB) or 4 (RGBA).

    Raises:
        ModelError: if it takes others than it gives back, or none of these.
    """
    config = vae.config
    taken = next((config[key] for key in ("in_channels", "input_channels", "num_channels") if key in config), 3)
    given = config.get("out_channels", taken)
    patch = (config.get("patch_size") or 1) ** 2 if isinstance(vae, diffusers.AutoencoderKLWan) else 1
    if taken != given or taken // patch not in MODES:
        gray, rgb, rgba = (patch * channels for channels in MODES)
        raise ModelError(
            f"this {type(vae).__name__} has in_channels={taken} and out_channels={given}; both must be {gray} for gray "
            f"images, {rgb} for RGB or {rgba} for RGBA"
        )
    return taken // patch


def encode(
    vae: ModelMixin,
    images: Tensor,
    posterior: Literal["mode", "sample"] = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Encodes images to latents that `decode` takes.

    Args:
        images: (B, C, H, W) in [-1, 1].
        posterior: "mode" (the mean) or "sample"; it does not matter for autoencoders without a posterior.
    Returns:
        (B, C', h, w), in the autoencoder's dtype.
    """
    output = _encode(vae, images)
    if hasattr(output, "latent_dist"):
        distribution = output.latent_dist
        latents = distribution.mode() if posterior == "mode" else distribution.sample(generator)
    else:
        latents = _latents_of(output)
    return latents.squeeze(2) if takes_frames(vae) else latents


def encode_moments(vae: ModelMixin, images: Tensor) -> Tensor:
    """Encodes images to the mean and log-variance of their posteriors.

    Args:
        images: (B, C, H, W) in [-1, 1].
    Returns:
        (B, 2C', h, w), in the autoencoder's dtype. Without a posterior the log-variance is diffusers' smallest, -30.
    """
    output = _encode(vae, images)
    if hasattr(output, "latent_dist"):
        moments = torch.cat([output.latent_dist.mean, output.latent_dist.logvar], dim=1)
    else:
        latents = _latents_of(output)
        moments = torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)
    return moments.squeeze(2) if takes_frames(vae) else moments


def _encode(vae: ModelMixin, images: Tensor) -> Any:
    images = images.to(vae.dtype)
    images = (images + 1) / 2 if _unit_range(vae) else images
    return vae.encode(images.unsqueeze(2) if takes_frames(vae) else images)


def _latents_of(output: Any) -> Tensor:
    return output.latents if hasattr(output, "latents") else output.latent


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Decodes latents of `encode` to images around [-1, 1], unclamped, float32. Codebook models quantize them first."""
    frames = takes_frames(vae)
    images = vae.decode(latents.unsqueeze(2) if frames else latents).sample.float()
    images = images.squeeze(2) if frames else images
    return images * 2 - 1 if _unit_range(vae) else images


def reconstruct(vae: ModelMixin, images: Tensor) -> Tensor:
    """Encodes and decodes (B, C, H, W) in [-1, 1] by the mode of the posterior; the result is not clamped, float32."""
    return decode(vae, encode(vae, images))


def _unit_range(vae: ModelMixin) -> bool:
    """Whether the autoencoder takes and gives images in [0, 1]."""
    return isinstance(vae, AUTOENCODER_RAE)


def takes_frames(vae: ModelMixin) -> bool:
    """Whether the autoencoder takes and gives images with an axis of time, (B, C, T, H, W)."""
    return "temperal_downsample" in vae.config or any(isinstance(module, nn.Conv3d) for module in vae.modules())


@dataclass
class Budget:
    """What an autoencoder costs for one square image.

    Attributes:
        spatial_compression_ratio: image pixels per latent along each side.
        floats_per_image: numbers in the latent; None for a codebook model.
        tokens_per_image, bits_per_image: for a codebook model, otherwise None.
        params: number of parameters.
        flops: of encoding and decoding; a multiplication and an addition count as two.
    """

    spatial_compression_ratio: int
    floats_per_image: int | None
    tokens_per_image: int | None
    bits_per_image: float | None
    params: int
    flops: int

    @property
    def latent(self) -> str:
        """The size of the latent in words."""
        if self.tokens_per_image is None or self.bits_per_image is None:
            return f"{self.floats_per_image:,} floats"
        return f"{self.tokens_per_image:,} tokens of {self.bits_per_image / self.tokens_per_image:.4g} bits"


@torch.no_grad()
def measure_budget(vae: ModelMixin, resolution: int) -> Budget:
    """Encodes and decodes one black image, and counts. It works on the meta device, too.

    Raises:
        ModelError: if the autoencoder does not take images of this size, or gives them back in another.
    """
    name, size = type(vae).__name__, (1, image_channels(vae), resolution, resolution)
    latents, output, flops = _count_round_trip(vae, torch.zeros(size, device=vae.device, dtype=vae.dtype))
    if latents.ndim != 4:
        raise ModelError(f"this {name} has latents of shape {tuple(latents.shape)}, not (B, C, h, w) as images have")

    # the sizes of the latents and of the image that comes back
    ratio = round(resolution / latents.shape[-1])
    if tuple(output.shape) != size:
        found = output.shape[-1]
        # an autoencoder that gives larger images back has one size only
        possible = f"{found}" if found > resolution else f"a multiple of {ratio}"
        raise ModelError(
            f"this {name} gives images of {resolution} px back at {found} px; the resolution must be {possible} "
            "for this autoencoder"
        )
    codebook = _codebook(vae, latents.shape[-2] * latents.shape[-1])
    return Budget(
        spatial_compression_ratio=ratio,
        floats_per_image=None if codebook else latents[0].numel(),
        tokens_per_image=codebook[0] if codebook else None,
        bits_per_image=codebook[0] * math.log2(codebook[1]) if codebook else None,
        params=vae.num_parameters(),
        flops=flops,
    )


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Of the products of queries and keys, (B, heads, L, D), and of these with the values."""
    batch, heads, length, channels = query
    return 2 * batch * heads * length * key[2] * (channels + value[3])


# torch's counter does not know attention on a CPU, and would take it for nothing.
CPU_ATTENTION_FLOPS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _count_round_trip(vae: ModelMixin, image: Tensor) -> tuple[Tensor, Tensor, int]:
    """Latents, the image that comes back, and the FLOPs of both, without the search in a codebook."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see inside it
    try:
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
            latents = encode(vae, image)
            if _codebook(vae, 1) and not vae.config.get("lookup_from_codebook"):
                output = vae.decode(latents, force_not_quantize=True).sample
            else:
                output = decode(vae, latents)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        size = image.shape[-1]
        raise ModelError(f"this {type(vae).__name__} takes no images of {size} px: {one_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return latents, output, counter.get_total_flops()


def _codebook(vae: ModelMixin, positions: int) -> tuple[int, int] | None:
    """Tokens of so many latent positions, and how many different ones there are; None where latents are continuous."""
    if isinstance(vae, VQModelFA):
        if isinstance(vae.codebook, ScaleQuantizer):
            return sum(stage.tokens for stage in vae.codebook.stages), vae.num_tokens
        return positions * (vae.config.num_quantizers if vae.config.quantizer == "residual" else 1), vae.num_tokens
    return (positions, vae.config.num_vq_embeddings) if isinstance(vae, diffusers.VQModel) else None
