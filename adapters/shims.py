"""Our autoencoders with the methods that the scripts of other generators call.

Each shim takes a path that `load_autoencoder` opens, or a loaded model. docs/adapters.md says which line of which
script it replaces, and which constants change with it. SiT and REPA's training need no shim, since an
`AutoencoderKLFA` is an `AutoencoderKL`.
"""

from functools import partial
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from favae.autoencoders import decode, encode, load_autoencoder, takes_frames
from favae.data.decoding import to_channels
from favae.data.images import center_crop, to_tensor, to_uint8
from favae.models import VQModelFA
from favae.models.scale_quantizers import MultiScaleQuantizer
from favae.normalization import has_batch_norm, latent_mean_and_std

__all__ = ["DeTokVAE", "EDM2Encoder", "LlamaGenVQ", "MARVAE", "VARVQ", "VA_VAE"]


class MARVAE(nn.Module):
    """MAR's `AutoencoderKL`: `encode` gives a posterior, `decode` a tensor. Neither normalizes.

    MAR's scripts multiply samples by 0.2325, one over the std of its autoencoder's latents. For latents of std 1 this
    number becomes 1.

    Args:
        vae: an autoencoder with a posterior.

    Source: Li et al., NeurIPS 2024 (arXiv 2406.11838).
    """

    def __init__(self, vae: str | Path | ModelMixin):
        super().__init__()
        self.vae = _open(vae)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> `sample()`, `mode()`, `mean`, `std` (B, C, h, w), and `parameters` (B, 2C, h, w).

        Raises:
            ValueError: for an autoencoder without a posterior.
        """
        return _posterior(self.vae, x)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W) around [-1, 1], unclamped, float32."""
        return decode(self.vae, z.to(self.vae.dtype))


class VA_VAE:
    """LightningDiT's `VA_VAE`. It does not normalize: LightningDiT's scripts do, by statistics that they measure.

    Args:
        vae: any autoencoder.
        img_size: height and width of the images, for `img_transform`.

    Attributes:
        model: a `MARVAE`, for scripts that take the network out of the object.

    Source: Yao et al., CVPR 2025 (arXiv 2501.01423).
    """

    def __init__(self, vae: str | Path | ModelMixin, img_size: int = 256):
        self.model = MARVAE(vae)
        self.img_size = img_size

    def to(self, device: torch.device | str | int) -> "VA_VAE":
        self.model.to(device)
        return self

    def img_transform(self, p_hflip: float = 0, img_size: int | None = None) -> transforms.Compose:
        """PIL image -> (3, S, S) in [-1, 1]: ADM's center crop, mirrored with probability `p_hflip`."""
        crop = partial(center_crop, size=self.img_size if img_size is None else img_size)
        return transforms.Compose([to_channels, crop, transforms.RandomHorizontalFlip(p_hflip), to_tensor])

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], on any device -> a sample of the posterior (B, C, h, w), float32, not normalized."""
        latents = encode(self.model.vae, images.to(self.model.vae.device), posterior="sample")
        return latents.float().contiguous()  # safetensors, which the scripts write, refuse other layouts

    @torch.no_grad()
    def decode_to_images(self, z: Tensor) -> np.ndarray:
        """Latents (B, C, h, w) that are not normalized, on any device -> uint8 (B, H, W, 3)."""
        return to_uint8(self.model.decode(z.to(self.model.vae.device))).permute(0, 2, 3, 1).cpu().numpy()


class DeTokVAE(MARVAE):
    """The tokenizer of l-DeTok's generators: `tokenize` normalizes latents, `detokenize` undoes it and gives [0, 1].

    z -> (z - mean) * scale_factor / std, with mean 0 and std 1 until the scripts call `reset_stats` with what they have
    measured (`--collect_tokenizer_stats`).

    Args:
        vae: an autoencoder with a posterior.
        scale_factor: std of the normalized latents.

    Source: Yang et al., 2025 (arXiv 2507.15856).
    """

    def __init__(self, vae: str | Path | ModelMixin, scale_factor: float = 1.0):
        super().__init__(vae)
        self.scale_factor = scale_factor
        self.mean: Tensor
        self.std: Tensor
        self.reset_stats(torch.zeros(()), torch.ones(()))

    def reset_stats(self, mean: Tensor, std: Tensor) -> None:
        """Scalars, or one number per channel, (C,)."""
        like = next(self.parameters())
        for name, value in (("mean", mean), ("std", std)):
            value = torch.as_tensor(value, dtype=torch.float32, device=like.device)
            self.register_buffer(name, value.reshape(1, -1, 1, 1), persistent=False)

    def normalize_z(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> the same, normalized."""
        return (z - self.mean) * self.scale_factor / self.std

    def denormalize_z(self, z: Tensor) -> Tensor:
        """The inverse of `normalize_z`."""
        return z * self.std / self.scale_factor + self.mean

    def encode_into_posteriors(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> the posterior of the latents, not normalized."""
        return self.encode(x)

    def sample_from_moments(self, moments: Tensor) -> Tensor:
        """[mean | logvar] (B, 2C, h, w) -> normalized (B, C, h, w)."""
        return self.normalize_z(DiagonalGaussianDistribution(moments).sample())

    def tokenize(self, x: Tensor, sampling: bool = False) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalized (B, C, h, w), the mean unless `sampling`."""
        posterior = self.encode(x)
        return self.normalize_z(posterior.sample() if sampling else posterior.mode())

    def detokenize(self, z: Tensor) -> Tensor:
        """Normalized (B, C, h, w), or (B, h * h, C) -> (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: if the tokens of a sequence do not make a square.
        """
        if z.ndim == 3:
            side = isqrt(z.shape[1])
            if side * side != z.shape[1]:
                raise ValueError(f"{z.shape[1]} tokens do not make a square; give (B, C, h, w)")
            z = z.transpose(1, 2).unflatten(2, (side, side))
        return (self.decode(self.denormalize_z(z)) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> the same in [0, 1]."""
        return self.detokenize(self.tokenize(x))


class EDM2Encoder:
    """EDM2's encoder object, which REPA's preprocessing calls too: from 8-bit pixels to raw to final latents.

    Raw latents are [mean | std] of the posterior, as the data set stores them. Final latents, which the generator
    makes, are samples of them, scaled from raw_mean and raw_std to final_mean and final_std.

    Args:
        vae: an autoencoder with a posterior. If it is a path, pickling this object leaves the weights out.
        raw_mean, raw_std: of the latents, one number per channel or one for all. None takes them from the autoencoder's
            config: `latents_mean` and `latents_std / scaling_factor`, or `shift_factor` and `1 / scaling_factor` if
            there are no such statistics. FLUX.2's are not there, so that both must be given.
        final_mean, final_std: of the generator's latents; 0.5 is EDM2's `sigma_data`.
        batch_size: how many images go through the autoencoder at a time.

    Source: Karras et al., CVPR 2024 (arXiv 2312.02696).
    """

    def __init__(
        self,
        vae: str | Path | ModelMixin,
        raw_mean: float | list[float] | None = None,
        raw_std: float | list[float] | None = None,
        final_mean: float | list[float] = 0.0,
        final_std: float | list[float] = 0.5,
        batch_size: int = 8,
    ):
        self.path = str(vae) if isinstance(vae, str | Path) else None
        self.vae = _open(vae)
        if has_batch_norm(self.vae) and (raw_mean is None or raw_std is None):
            raise ValueError(f"the statistics of a {type(self.vae).__name__} are not in its config: give both")
        mean, std = latent_mean_and_std(self.vae)
        if raw_mean is not None:
            mean = _per_channel(raw_mean)
        if raw_std is not None:
            std = _per_channel(raw_std)
        if not bool((std > 0).all()):
            raise ValueError("raw_std must be above 0")
        self.scale = _per_channel(final_std) / std
        self.bias = _per_channel(final_mean) - mean * self.scale
        self.batch_size = batch_size

    def __getstate__(self) -> dict:
        return {**self.__dict__, "vae": None if self.path else self.vae}

    def init(self, device: torch.device | str) -> None:
        """Loads the autoencoder if it is not loaded, and moves it."""
        if self.vae is None and self.path is not None:
            self.vae = load_autoencoder(self.path)
        self.vae.to(device)

    def encode(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> final latents (B, C, h, w)."""
        return self.encode_latents(self.encode_pixels(x))

    @torch.no_grad()
    def encode_pixels(self, x: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> [mean | std] (B, 2C, h, w), float32.

        Raises:
            ValueError: for other dtypes, and for an autoencoder without a posterior.
        """
        if x.dtype != torch.uint8:
            raise ValueError(f"pixels must be uint8, 0 to 255, got {x.dtype}")
        self.init(x.device)
        batches = [_posterior(self.vae, batch.float() / 127.5 - 1) for batch in x.split(self.batch_size)]
        return torch.cat([torch.cat([batch.mean, batch.std], dim=1).float() for batch in batches])

    def encode_latents(self, x: Tensor) -> Tensor:
        """[mean | std] (B, 2C, h, w) -> final latents (B, C, h, w), float32."""
        mean, std = x.float().chunk(2, dim=1)
        return (mean + std * torch.randn_like(mean)) * self.scale.to(x.device) + self.bias.to(x.device)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Final latents (B, C, h, w) -> uint8 (B, 3, H, W)."""
        self.init(x.device)
        z = (x.float() - self.bias.to(x.device)) / self.scale.to(x.device)
        return torch.cat([to_uint8(decode(self.vae, part.to(self.vae.dtype))) for part in z.split(self.batch_size)])


class LlamaGenVQ(nn.Module):
    """LlamaGen's `VQModel`, for the extraction of codes, for reconstruction and for sampling, but not for training.

    Args:
        vq: a `VQModelFA` with one token per position. `vocab_size` is the number that the generator needs.

    Raises:
        ValueError: for another class, and for other quantizers: LlamaGen's sequences are h * w tokens long.

    Source: Sun et al., 2024 (arXiv 2406.06525).
    """

    def __init__(self, vq: str | Path | VQModelFA):
        super().__init__()
        self.vq = _open_codebook(vq)
        quantizer = self.vq.config.quantizer
        if quantizer not in ("vq", "fsq"):
            raise ValueError(f"LlamaGen has one token per position, unlike {quantizer=}")
        self.vocab_size = self.vq.num_tokens

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, tuple, tuple[None, None, Tensor]]:
        """(B, 3, H, W) in [-1, 1] -> codebook vectors (B, C, h, w), losses, and (None, None, indices (B * h * w,)).

        Of the four losses only the second, the commitment loss, is given; the others are None.
        """
        output = self.vq.quantize(self.vq.encode(x.to(self.vq.dtype)).latents)
        return output.latents, (None, output.loss, None, None), (None, None, output.indices.flatten())

    def decode(self, quant: Tensor) -> Tensor:
        """Codebook vectors (B, C, h, w) -> (B, 3, H, W), in [-1, 1] up to overshoot."""
        return self.vq.decode(quant, force_not_quantize=True).sample

    def decode_code(self, code_b: Tensor, shape: tuple[int, ...] | None = None, channel_first: bool = True) -> Tensor:
        """
        Args:
            code_b: indices, B * h * w of them in any shape; (B, h, w) if there is no `shape`.
            shape: (B, C, h, w), or (B, h, w, C) without `channel_first`. C is ignored, since scripts pass their own.
        Returns:
            (B, 3, H, W), in [-1, 1] up to overshoot.
        Raises:
            ValueError: if the indices do not fill the shape, or are outside the codebook.
        """
        size = tuple(code_b.shape)
        if shape is not None:
            size = (shape[0], *shape[2:]) if channel_first else tuple(shape[:3])
        if len(size) != 3 or code_b.numel() != size[0] * size[1] * size[2]:
            raise ValueError(f"{code_b.numel()} indices do not fill (B, h, w) = {size}")
        return self.vq.decode(code_b.long().reshape(size)).sample


class VARVQ(nn.Module):
    """VAR's `VQVAE`, for the training and sampling of its transformer.

    Args:
        vq: a `VQModelFA` with quantizer="next_scale"; its scales are VAR's `patch_nums`.

    Attributes:
        vocab_size: entries of the codebook.
        Cvae: channels of the latents.
        quantize: in place of VAR's `VectorQuantizer2`.

    Raises:
        ValueError: for another class or quantizer.

    Source: Tian et al., NeurIPS 2024 (arXiv 2404.02905).
    """

    def __init__(self, vq: str | Path | VQModelFA):
        super().__init__()
        self.vq = _open_codebook(vq)
        if not isinstance(self.vq.codebook, MultiScaleQuantizer):
            raise ValueError(f"VAR needs quantizer='next_scale', not {self.vq.config.quantizer!r}")
        self.quantize = VARQuantizer(self.vq.codebook)
        self.vocab_size, self.Cvae = self.quantize.vocab_size, self.quantize.Cvae

    @property
    def encoder(self) -> nn.Module:
        return self.vq.encoder

    @property
    def decoder(self) -> nn.Module:
        return self.vq.decoder

    @torch.no_grad()
    def img_to_idxBl(self, inp_img_no_grad: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> indices (B, side ** 2), one tensor per scale."""
        indices = self.vq.quantize(self.vq.encode(inp_img_no_grad.to(self.vq.dtype)).latents).indices
        return self.vq.codebook.split(indices)

    def idxBl_to_img(self, ms_idx_Bl: list[Tensor], same_shape: bool, last_one: bool = False) -> list[Tensor] | Tensor:
        """
        Args:
            ms_idx_Bl: indices (B, side ** 2), one tensor per scale; the first ones are enough.
            same_shape: must be True: no image is smaller than the others.
            last_one: return the image of all scales, rather than a list of the images of the first 1, 2, ... scales.
        Returns:
            (B, 3, H, W) in [-1, 1].
        Raises:
            ValueError: if there are not as many tokens as a scale has, if indices are outside the codebook, or without
                `same_shape`.
        """
        if not same_shape:
            raise ValueError("same_shape must be True: images of fewer scales are as large as those of all")
        counts = range(len(ms_idx_Bl) if last_one else 1, len(ms_idx_Bl) + 1)
        images = [self.fhat_to_img(self.vq.lookup(torch.cat(ms_idx_Bl[:count], dim=1))) for count in counts]
        return images[0] if last_one else images

    def fhat_to_img(self, f_hat: Tensor) -> Tensor:
        """The sum of the scales (B, Cvae, h, w) -> (B, 3, H, W) in [-1, 1]."""
        return self.vq.decode(f_hat.to(self.vq.dtype), force_not_quantize=True).sample.clamp(-1, 1)


class VARQuantizer(nn.Module):
    """VAR's `VectorQuantizer2`, around the quantizer of a `VQModelFA`, with a copy of its entries."""

    def __init__(self, quantizer: MultiScaleQuantizer):
        super().__init__()
        self.quantizer = quantizer
        self.embedding = nn.Embedding.from_pretrained(quantizer.codebook.codebook.float())
        self.vocab_size, self.Cvae = self.embedding.weight.shape
        self.prog_si = -1  # VAR's trainer sets this; VAR itself does not support progressive training either

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[Tensor]) -> Tensor:
        """Indices (B, side ** 2) of all scales -> what the transformer sees at the second and later, (B, L, Cvae)."""
        f_hat: Tensor | None = None
        inputs = []
        for number, indices in enumerate(gt_ms_idx_Bl[:-1]):
            f_hat, following = self._add(f_hat, self.embedding(indices), number)
            inputs.append(following.flatten(2).transpose(1, 2))
        return torch.cat(inputs, dim=1)

    def get_next_autoregressive_input(self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor) -> tuple[Tensor, Tensor]:
        """Adds vectors (B, Cvae, side, side) of scale `si` of `SN` to the sum (B, Cvae, h, w); gives the sum, and the
        same at the size of the next scale."""
        return self._add(f_hat, h_BChw.flatten(2).transpose(1, 2), si)

    def _add(self, f_hat: Tensor | None, entries: Tensor, number: int) -> tuple[Tensor, Tensor]:
        added = self.quantizer.spread(entries, number)
        f_hat = added if f_hat is None else f_hat + added
        sides = self.quantizer.scales
        return f_hat, F.interpolate(f_hat, size=sides[min(number + 1, len(sides) - 1)], mode="area")


def _open(vae: str | Path | ModelMixin) -> ModelMixin:
    return load_autoencoder(str(vae)) if isinstance(vae, str | Path) else vae


def _open_codebook(vq: str | Path | VQModelFA) -> VQModelFA:
    vq = _open(vq)
    if not isinstance(vq, VQModelFA):
        raise ValueError(f"tokens come from a VQModelFA, not from a {type(vq).__name__}")
    return vq


def _posterior(vae: ModelMixin, images: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of images in [-1, 1]; raises ValueError if the autoencoder does not have one."""
    has_frames, images = takes_frames(vae), images.to(vae.dtype)
    output = vae.encode(images.unsqueeze(2) if has_frames else images)
    if not hasattr(output, "latent_dist"):
        raise ValueError(f"these scripts need an autoencoder with a posterior, not a {type(vae).__name__}")
    posterior = output.latent_dist
    if has_frames:
        posterior = DiagonalGaussianDistribution(torch.cat([posterior.mean, posterior.logvar], dim=1).squeeze(2))
    return posterior


def _per_channel(values: float | list[float] | Tensor) -> Tensor:
    """One number, or one per channel, as (1, C, 1, 1)."""
    return torch.as_tensor(values, dtype=torch.float32).reshape(1, -1, 1, 1)
