"""ComfyUI nodes for favae's autoencoders: copy this file into ComfyUI/custom_nodes.

favae must be installed in ComfyUI's Python (`pip install -e .` in a clone). The node "Load FAVAE" lists the
folders with a config.json in ComfyUI/models/vae, and gives a VAE for the nodes VAE Encode, VAE Decode, their tiled
versions, and the inpainting ones.
"""

import logging
import os
from contextlib import contextmanager

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
import torch.nn.functional as F

from favae.autoencoders import decode, encode, image_channels, load_autoencoder, spatial_compression_ratio
from favae.normalization import denormalize_latents, has_batch_norm, normalize_latents

AS_ENCODED = "as encoded"
FORMATS = ("SD15", "SDXL", "SD3", "Flux", "Flux2", "Wan21")  # classes of comfy.latent_formats; Qwen-Image's is Wan21
# Rough numbers of values that a network holds at once, per pixel of the image, as ComfyUI has them for its own VAEs.
VALUES_PER_PIXEL_ENCODE, VALUES_PER_PIXEL_DECODE = 1767, 2178


class FavaeVAE:
    """An autoencoder of favae or diffusers with the methods that ComfyUI's nodes call on a VAE.

    Images are (B, H, W, C) in [0, 1]; latents are what the nodes pass to the samplers, which a model's latent format
    scales. "as encoded" leaves latents as the autoencoder gives them (packed and normalized if it has FLUX.2's batch
    norm), as ComfyUI's own VAEs do. This is right where the format has the same scale as the autoencoder's config.
    With the name of a format, latents are such that this format's scaling gives normalized ones.

    Args:
        path: folder of the autoencoder.
        latent_format: "as encoded", or a class of `comfy.latent_formats`.
    Raises:
        ValueError: if the format has other channels.
    """

    latent_dim = 2
    extra_1d_channel = None

    def __init__(self, path: str, latent_format: str = AS_ENCODED):
        management = comfy.model_management
        self.first_stage_model = load_autoencoder(path)
        config = self.first_stage_model.config
        upcast = config.get("force_upcast", False)
        self.device = management.vae_device()
        self.output_device = management.intermediate_device()
        allowed = [torch.bfloat16, torch.float32] if upcast else [torch.float16, torch.bfloat16, torch.float32]
        self.vae_dtype = management.vae_dtype(self.device, allowed)
        if self.vae_dtype != self.first_stage_model.dtype:
            self.first_stage_model.to(self.vae_dtype)
        self.patcher = comfy.model_patcher.ModelPatcher(
            self.first_stage_model, load_device=self.device, offload_device=management.vae_offload_device()
        )

        self.format = None if latent_format == AS_ENCODED else getattr(comfy.latent_formats, latent_format)()
        channels = config.get("latent_channels") or config["z_dim"]
        self.packs = self._has_norm or latent_format == "Flux2"  # 2 x 2 neighbors are one latent
        self.latent_channels = channels * (1 + 3 * self.packs)
        if self.format and self.format.latent_channels != self.latent_channels:
            wanted = self.format.latent_channels
            raise ValueError(f"{path} has latents of {channels} channels, {latent_format} of {wanted}")
        self.downscale_ratio = self.upscale_ratio = spatial_compression_ratio(self.first_stage_model) * (1 + self.packs)

    @property
    def _has_norm(self) -> bool:
        return has_batch_norm(self.first_stage_model)

    # ------------------------------------------------------------------------------------------------------------------
    # Latents of the autoencoder, (B, C, h, w), and those of ComfyUI

    def to_comfy(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> what samplers get: (B, C, h, w), packed (B, 4 C, h/2, w/2), or (B, C, 1, h, w)."""
        if self.format is None and not self._has_norm:
            return latents
        latents = normalize_latents(self.first_stage_model, latents)
        latents = F.pixel_unshuffle(latents, 2) if self.packs else latents
        if self.format is None:
            return latents
        return self.format.process_out(latents.unsqueeze(2) if self._has_time else latents)

    def from_comfy(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_comfy`."""
        if latents.ndim == 5 and not self._has_time:
            latents = latents[:, :, 0]
        if self.format is not None:
            latents = self.format.process_in(latents)
        elif not self._has_norm:
            return latents
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
        latents = F.pixel_shuffle(latents, 2) if self.packs else latents
        return denormalize_latents(self.first_stage_model, latents)

    @property
    def _has_time(self) -> bool:
        return getattr(self.format, "latent_dimensions", 2) == 3

    # ------------------------------------------------------------------------------------------------------------------
    # What nodes call

    @torch.no_grad()
    def decode(self, samples_in: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Latents -> (B, H, W, 3), or 4 with opacity, in [0, 1]; in tiles if memory runs out."""
        try:
            return self._decode(samples_in)
        except comfy.model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when decoding; trying again in tiles.")
            comfy.model_management.soft_empty_cache()
        return self.decode_tiled(samples_in)

    @torch.no_grad()
    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) in [0, 1] -> latents, the posterior's mean; in tiles if memory runs out."""
        try:
            return self._encode(pixel_samples)
        except comfy.model_management.OOM_EXCEPTION:
            logging.warning("Ran out of memory when encoding; trying again in tiles.")
            comfy.model_management.soft_empty_cache()
        return self.encode_tiled(pixel_samples)

    @torch.no_grad()
    def decode_tiled(self, samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As `decode`, in tiles of the larger of the sides, in ComfyUI's latents; the overlap is the model's own."""
        with self._tiles(max(tile_x or 0, tile_y or 0) * (1 + self.packs)):
            return self._decode(samples)

    @torch.no_grad()
    def encode_tiled(self, pixel_samples, tile_x=None, tile_y=None, overlap=None, tile_t=None, overlap_t=None):
        """As `encode`, in tiles of the larger of the sides, in pixels; the overlap is the model's own."""
        with self._tiles(max(tile_x or 0, tile_y or 0) // spatial_compression_ratio(self.first_stage_model)):
            return self._encode(pixel_samples)

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The middle of images, with sides that are multiples of the compression ratio."""
        ratio = self.downscale_ratio
        height, width = (side // ratio * ratio for side in pixels.shape[1:3])
        top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
        return pixels[:, top : top + height, left : left + width]

    def spacial_compression_decode(self) -> int:  # the spelling is ComfyUI's
        return self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        pass

    def get_sd(self) -> dict[str, torch.Tensor]:
        return self.first_stage_model.state_dict()

    # ------------------------------------------------------------------------------------------------------------------

    def _decode(self, samples: torch.Tensor) -> torch.Tensor:
        latents = self.from_comfy(samples)
        ratio = spatial_compression_ratio(self.first_stage_model)
        step = self._load(latents.shape[-2] * latents.shape[-1] * ratio**2 * VALUES_PER_PIXEL_DECODE)
        images = [
            decode(self.first_stage_model, part.to(self.device, self.vae_dtype)).to(self.output_device)
            for part in latents.split(step)
        ]
        images = ((torch.cat(images) + 1) / 2).clamp(0, 1).movedim(1, -1)
        return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else images

    def _in_channels(self, images: torch.Tensor) -> torch.Tensor:
        """RGB or RGBA images (B, C, H, W) in [0, 1] in the channels of the autoencoder: gray, RGB or RGBA."""
        channels = image_channels(self.first_stage_model)
        if channels == 1:
            return images[:, :3].mean(dim=1, keepdim=True)
        return F.pad(images, (0, 0, 0, 0, 0, max(0, channels - images.shape[1])), value=1.0)[:, :channels]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        images = self._in_channels(self.vae_encode_crop_pixels(pixels).movedim(-1, 1)) * 2 - 1
        step = self._load(images.shape[-2] * images.shape[-1] * VALUES_PER_PIXEL_ENCODE)
        latents = [
            encode(self.first_stage_model, part.to(self.device)).float().to(self.output_device)
            for part in images.split(step)
        ]
        return self.to_comfy(torch.cat(latents))

    def _load(self, values: int) -> int:
        """Moves the whole model to its device; returns how many images fit beside it."""
        management = comfy.model_management
        needed = values * management.dtype_size(self.vae_dtype)
        management.load_models_gpu([self.patcher], memory_required=needed, force_full_load=True)
        return max(1, int(management.get_free_memory(self.device) / max(1, needed)))

    @contextmanager
    def _tiles(self, latents_per_side: int):
        """Turns the model's tiling on inside the block, with tiles of so many latents if it can; 0 is its own size."""
        model = getattr(self.first_stage_model, "autoencoder", self.first_stage_model)  # of one inside an adapter
        sizes = {}
        if latents_per_side and hasattr(model, "tile_latent_min_size"):
            ratio = spatial_compression_ratio(model)
            sizes = {"tile_latent_min_size": latents_per_side, "tile_sample_min_size": latents_per_side * ratio}
        before = {name: getattr(model, name, False) for name in ("use_tiling", *sizes)}
        try:
            for name, value in {"use_tiling": True, **sizes}.items():
                setattr(model, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(model, name, value)


def find_autoencoders() -> dict[str, str]:
    """The folders with a config.json in ComfyUI's folders of VAEs, by their names there."""
    found = {}
    for root in folder_paths.get_folder_paths("vae"):
        for folder, _, files in os.walk(root, followlinks=True):
            if "config.json" in files:
                found.setdefault(os.path.relpath(folder, root), folder)
    return dict(sorted(found.items()))


class LoadFAVAE:
    """Opens an autoencoder that favae has trained, or any that diffusers has."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        formats = [name for name in FORMATS if hasattr(comfy.latent_formats, name)]
        return {"required": {"vae": (list(find_autoencoders()),), "latent_format": ([AS_ENCODED, *formats],)}}

    def load(self, vae: str, latent_format: str) -> tuple[FavaeVAE]:
        return (FavaeVAE(find_autoencoders()[vae], latent_format),)


NODE_CLASS_MAPPINGS = {"LoadFAVAE": LoadFAVAE}
NODE_DISPLAY_NAME_MAPPINGS = {"LoadFAVAE": "Load FAVAE"}
