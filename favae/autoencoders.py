"""Any diffusers autoencoder of images behind the same few functions: their outputs, ranges and factors differ.

`AutoencoderKL` and its relatives give a posterior, `AutoencoderTiny` and `VQModel` latents, `AutoencoderDC` and
`AutoencoderRAE` a latent; `AutoencoderRAE` works in [0, 1], the others in [-1, 1]. Scaling factors, shifts and latent
statistics belong to generators: an autoencoder's own `decode` takes what its `encode` gives.
"""

import math
from dataclasses import dataclass

import diffusers
import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from favae.errors import ModelError
from favae.models import VQModelFA


def load_autoencoder(path: str) -> ModelMixin:
    """Opens an autoencoder by the class named in its config: ours, or any of diffusers.

    Args:
        path: a folder or a hub name; of a pipeline, its `vae` is taken.

    Raises:
        ModelError: if there is none.
    """
    import favae

    name = "model"
    try:
        try:  # by a class that keeps its config's name: AutoModel's becomes model_index.json once it has read one
            options, config = {}, diffusers.AutoencoderKL.load_config(path)
        except OSError:
            options = {"subfolder": "vae"}  # of a pipeline
            config = diffusers.AutoencoderKL.load_config(path, **options)
        name = config["_class_name"]
        kind = getattr(favae, name, None) or getattr(diffusers, name)
        if not (hasattr(kind, "encode") and hasattr(kind, "decode")):
            raise ModelError(f"{path}: a {name} is no autoencoder")
        return kind.from_pretrained(path, **options).eval()
    except NameError as error:  # diffusers' RAE without transformers
        raise ModelError(f"{path}: a {name} needs the package transformers ({error})") from error
    except (OSError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: no autoencoder could be opened here ({_first_line(error)})") from error


def spatial_compression_ratio(vae: ModelMixin) -> int:
    """Image pixels per latent along each side.

    Raises:
        ModelError: if neither the autoencoder nor its config tells.
    """
    if hasattr(vae, "spatial_compression_ratio"):
        return int(vae.spatial_compression_ratio)
    for widths in ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels"):
        if widths in vae.config:
            return 2 ** (len(vae.config[widths]) - 1)
    if isinstance(vae, getattr(diffusers, "AutoencoderRAE", ())):
        # The image is resized for the encoder, which gives one latent per patch.
        config = vae.config
        patches = config.encoder_input_size // config.encoder_patch_size
        return (config.image_size or config.patch_size * patches) // patches
    raise ModelError(f"the spatial compression ratio of a {type(vae).__name__} is not known")


def encode(
    vae: ModelMixin,
    images: Tensor,
    posterior: str = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Images to what `decode` takes.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        posterior: "mode" (the mean) or "sample"; autoencoders without a posterior have one latent.
    Returns:
        (B, C, h, w), the autoencoder's dtype.
    """
    images = images.to(vae.dtype)
    output = vae.encode((images + 1) / 2 if _unit_range(vae) else images)
    if hasattr(output, "latent_dist"):
        distribution = output.latent_dist
        return distribution.mode() if posterior == "mode" else distribution.sample(generator)
    return output.latents if hasattr(output, "latents") else output.latent


def decode(vae: ModelMixin, latents: Tensor) -> Tensor:
    """Latents of `encode` to images around [-1, 1], unclamped, float32. Codebooks quantise them first."""
    images = vae.decode(latents).sample.float()
    return images * 2 - 1 if _unit_range(vae) else images


def reconstruct(
    vae: ModelMixin,
    images: Tensor,
    posterior: str = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same, unclamped, float32."""
    return decode(vae, encode(vae, images, posterior, generator))


def _unit_range(vae: ModelMixin) -> bool:
    return isinstance(vae, getattr(diffusers, "AutoencoderRAE", ()))


@dataclass
class Budget:
    """What an autoencoder costs for one square image.

    Attributes:
        factor: pixels per latent position and side.
        floats_per_image: numbers in the latent; None for a codebook.
        tokens_per_image, bits_per_image: of a codebook, otherwise None.
        params: parameters.
        flops: of encoding and decoding; a multiplication and an addition are two.
    """

    factor: int
    floats_per_image: int | None
    tokens_per_image: int | None
    bits_per_image: float | None
    params: int
    flops: int

    @property
    def latent(self) -> str:
        """For people."""
        if self.tokens_per_image is None:
            return f"{self.floats_per_image:,} floats"
        return f"{self.tokens_per_image:,} tokens of {self.bits_per_image / self.tokens_per_image:.4g} bits"


@torch.no_grad()
def measure_budget(vae: ModelMixin, resolution: int) -> Budget:
    """Runs an autoencoder once on an empty image, and looks. Works on the meta device too.

    Raises:
        ModelError: if it takes no RGB images of this size, or gives them back in another.
    """
    name, size = type(vae).__name__, (1, 3, resolution, resolution)
    channels = vae.config.get("in_channels", 3)
    if channels != 3:
        raise ModelError(f"this {name} takes images of {channels} channels, not of 3")
    image = torch.zeros(size, device=vae.device, dtype=vae.dtype)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see inside it
    try:
        with FlopCounterMode(display=False) as counter:
            latents = encode(vae, image)
            if _codebook(vae) and not vae.config.get("lookup_from_codebook"):  # without the search in the codebook
                output = vae.decode(latents, force_not_quantize=True).sample
            else:
                output = decode(vae, latents)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"this {name} takes no images of {resolution} px: {_first_line(error)}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    if latents.ndim != 4:
        raise ModelError(f"this {name} has latents of shape {tuple(latents.shape)}, not an image's (B, C, h, w)")
    factor = round(resolution / latents.shape[-1])
    if tuple(output.shape) != size:
        found = output.shape[-1]
        remedy = f"{found}" if found > resolution else f"a multiple of {factor}"  # the first has one size only
        raise ModelError(
            f"this {name} gives images of {resolution} px back at {found} px; the resolution must be {remedy} "
            "for this autoencoder"
        )
    codebook = _codebook(vae)
    positions = latents.shape[-2] * latents.shape[-1]
    return Budget(
        factor=factor,
        floats_per_image=None if codebook else latents[0].numel(),
        tokens_per_image=codebook[0] * positions if codebook else None,
        bits_per_image=codebook[0] * positions * math.log2(codebook[1]) if codebook else None,
        params=vae.num_parameters(),
        flops=counter.get_total_flops(),
    )


def _codebook(vae: ModelMixin) -> tuple[int, int] | None:
    """Tokens per latent position, and how many different ones there are; None where latents are continuous."""
    if isinstance(vae, VQModelFA):
        return (vae.config.num_quantizers if vae.config.quantizer == "residual" else 1), vae.num_tokens
    return (1, vae.config.num_vq_embeddings) if isinstance(vae, diffusers.VQModel) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
