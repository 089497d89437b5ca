"""Large images in tiles of one size."""

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from torch import Tensor

from favae.models.hub import HubModelMixin
from favae.models.sizes import check_image_size, compression_ratio


class FullTilesAutoencoderKL(HubModelMixin, AutoencoderKL):
    """What our KL autoencoders share: an `AutoencoderKL` whose tiles all have the full size.

    The last tiles of diffusers' are slivers, which, with the statistics and the attention of a few pixels, do not look
    like their neighbors. Subclasses set the networks.
    """

    # Their branches meet outside of any module's forward: all of them are on one device.
    _no_split_modules = [
        *AutoencoderKL._no_split_modules,
        "WaveletEncoder",
        "WaveletDecoder",
        "TwoBranchEncoder",
        "TwoBranchDecoder",
    ]

    @property
    def spatial_compression_ratio(self) -> int:
        """Image pixels per latent along each side, f."""
        return compression_ratio(len(self.config.block_out_channels))

    def reset_tiling(self, sample_size: int | Sequence[int]) -> None:
        """Turns slicing and tiling off; tiles will have the size of `sample_size`, the larger side of two."""
        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = sample_size if isinstance(sample_size, int) else max(sample_size)
        self.tile_latent_min_size = max(1, self.tile_sample_min_size // self.spatial_compression_ratio)
        self.tile_overlap_factor = 0.25

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """As `encode`, in overlapping tiles of `tile_sample_min_size`, cross-faded."""
        posterior = DiagonalGaussianDistribution(self._tiled_encode(x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """(B, C, h, w) in overlapping tiles of `tile_latent_min_size`, cross-faded -> as `decode`."""
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        tile = self.tile_latent_min_size
        sample = map_tiles(self.decoder, z, tile, overlap=int(tile * self.tile_overlap_factor))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        ratio = self.spatial_compression_ratio
        check_image_size(x, ratio)
        tile = max(1, self.tile_sample_min_size // ratio)  # in latents
        overlap = int(tile * self.tile_overlap_factor)
        moments = map_tiles(self.encoder, x, ratio * tile, overlap=ratio * overlap, unit=ratio)
        return moments if self.quant_conv is None else self.quant_conv(moments)


def map_tiles(function: Callable[[Tensor], Tensor], sample: Tensor, tile: int, overlap: int, unit: int = 1) -> Tensor:
    """Applies a function to overlapping square tiles and cross-fades the results.

    All tiles have the full size; the last ones lie flush with the border.

    Args:
        function: (B, C, t, t) -> (B, C', r t, r t), with the same ratio r for all tiles.
        sample: (B, C, H, W), multiples of `unit`.
        tile, overlap: t, and what neighbors share at least; multiples of `unit`, 0 <= overlap < tile.
        unit: tiles begin at its multiples.
    Returns:
        (B, C', r H, r W).
    Raises:
        ValueError: if the overlap is negative or not below the tile.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}; the overlap must be from 0 to below the tile")
    size = [min(tile, length) for length in sample.shape[-2:]]
    tops, lefts = (_starts(length, t, max(t - overlap, unit)) for length, t in zip(sample.shape[-2:], size))

    # sums of the faded tiles, and of the weights they were faded with
    total, weights = torch.empty(0), torch.empty(0)
    for top in tops:
        for left in lefts:
            output = function(sample[..., top : top + size[0], left : left + size[1]])
            height, width = output.shape[-2:]
            if not total.numel():
                shape = [length * height // size[0] for length in sample.shape[-2:]]
                total = output.new_zeros([*output.shape[:-2], *shape], dtype=torch.float32)
                weights = output.new_zeros(shape, dtype=torch.float32)
            fade = overlap * height // size[0]
            faded = _ramp(height, fade, output.device)[:, None] * _ramp(width, fade, output.device)
            y, x = top * height // size[0], left * height // size[0]
            total[..., y : y + height, x : x + width] += faded * output
            weights[y : y + height, x : x + width] += faded
    return (total / weights).to(output.dtype)


def _starts(length: int, tile: int, step: int) -> list[int]:
    """Where tiles begin along one side."""
    return [*range(0, length - tile, step), length - tile]


def _ramp(length: int, overlap: int, device: torch.device) -> Tensor:
    """Weights that rise over the overlap at the beginning and fall over it at the end, float32."""
    distance = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
