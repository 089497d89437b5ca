"""Quantizers that describe latents from coarse to fine: any number of first stages is a picture already."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import VectorQuantize

from favae.models.scales import TokenOrder, make_stages
from favae.wavelets import WaveletBands


class ScaleQuantizer(nn.Module):
    """What both quantizers share: the order of their tokens.

    Args:
        order, scales: see `make_stages`.
        codebook_size: entries per codebook.
    Raises:
        ValueError: for scales that do not fit the order.
    """

    def __init__(self, order: TokenOrder, scales: tuple[int, ...], codebook_size: int):
        super().__init__()
        self.scales, self.stages, self.codebook_size = scales, make_stages(order, scales), codebook_size

    def split(self, indices: Tensor) -> list[Tensor]:
        """Indices (B, n) of the first stages -> those of each of them.

        Raises:
            ValueError: if n is not the number of tokens of some first stages.
        """
        counts: list[int] = []
        for stage in self.stages:
            if sum(counts) < indices.shape[1]:
                counts.append(stage.tokens)
        if indices.ndim != 2 or not counts or sum(counts) != indices.shape[1]:
            raise ValueError(
                f"tokens must be (B, n), n the sum of the first of {[stage.tokens for stage in self.stages]}, "
                f"got {tuple(indices.shape)}"
            )
        return list(indices.split(counts, dim=1))

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, n) of the first stages -> what they say of the latents, (B, C, h, w)."""
        raise NotImplementedError

    def straight_through(self, latents: Tensor, quantized: Tensor) -> Tensor:
        """What is quantized; in training with the gradient of the latents, and their rounding."""
        return latents + (quantized - latents).detach() if self.training else quantized


class MultiScaleQuantizer(ScaleQuantizer):
    """A residual quantizer over scales: each takes what is left of the latents at its size, from one codebook.

    The entries of a scale are resized to the latents and refined by a convolution, half of whose input passes by; up to
    four convolutions serve all scales. Every sum of the first scales is pulled towards the latents.

    Args:
        dim: channels of the latents, C.
        scales: cells along each side; those of the latents are the last.
        codebook_size: entries of the codebook. settings: of `VectorQuantize`.

    Source: Tian et al., NeurIPS 2024 (arXiv 2404.02905); the codebook learns by moving averages here.
    """

    max_refinements = 4

    def __init__(self, dim: int, scales: tuple[int, ...], codebook_size: int, **settings: Any):
        super().__init__("next_scale", scales, codebook_size)
        self.codebook = VectorQuantize(dim=dim, codebook_size=codebook_size, **settings)
        count = min(self.max_refinements, len(scales))
        self.refinements = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count))

    def forward(self, latents: Tensor, freeze_codebook: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) -> the same shape with the latents' gradient, indices (B, N), and the loss: twice the mean over
        scales of the squared error of the latents, once with the gradient of each side."""
        total, found, loss = torch.zeros_like(latents), [], latents.new_zeros(())
        for number, stage in enumerate(self.stages):
            residual = latents.detach() - total.detach()
            tokens = F.interpolate(residual, size=stage.side, mode="area").flatten(2).transpose(1, 2)
            entries, indices, _ = self.codebook(tokens, freeze_codebook=freeze_codebook)
            total = total + self.spread(entries, number)
            found.append(indices)
            loss = loss + F.mse_loss(total.detach(), latents) + F.mse_loss(total, latents.detach())
        return self.straight_through(latents, total), torch.cat(found, dim=1), loss / len(self.stages)

    def spread(self, entries: Tensor, number: int) -> Tensor:
        """Entries (B, n, C) of a stage -> what they add to the latents, (B, C, h, w)."""
        side, size = self.stages[number].side, self.scales[-1]
        grid = entries.transpose(1, 2).unflatten(2, (side, side))
        if side != size:
            grid = F.interpolate(grid, size=size, mode="bicubic")
        place = number / max(1, len(self.stages) - 1)  # which convolution is the nearest
        refinement = self.refinements[round(place * (len(self.refinements) - 1))]
        return (grid + refinement(grid.to(refinement.weight.dtype)).to(grid.dtype)) / 2

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, n) of the first stages -> their sum, (B, C, h, w)."""
        parts = enumerate(self.split(indices))
        return torch.stack([self.spread(self.codebook.get_codes_from_indices(part), k) for k, part in parts]).sum(0)


class WaveletQuantizer(ScaleQuantizer):
    """Haar bands of the latents, the low one first, with one codebook for each stage.

    The low band is the mean of 2 x 2 latents, so that any number of first stages is a smaller latent of the same range.

    Args:
        dim: channels of the latents, C.
        scales: cells along each side, each twice the one before; those of the latents are the last.
        codebook_size: entries of each codebook.
        threshold_ema_dead_code: below how many uses per call an entry of the last stage is replaced; those of stages of
            fewer tokens, below as many times fewer.
        settings: of `VectorQuantize`.

    Source: the order from coarse to fine bands, Esteves et al. (Spectral Image Tokenizer, arXiv 2412.09607), who
    transform the image.
    """

    def __init__(
        self, dim: int, scales: tuple[int, ...], codebook_size: int, threshold_ema_dead_code: float, **settings: Any
    ):
        super().__init__("next_band", scales, codebook_size)
        self.bands = WaveletBands("haar", low_scale=2.0, high_scale=1.0)
        self.codebooks: Any = nn.ModuleList(
            VectorQuantize(
                dim=dim,
                codebook_size=codebook_size,
                threshold_ema_dead_code=threshold_ema_dead_code * stage.tokens / self.stages[-1].tokens,
                **settings,
            )
            for stage in self.stages
        )

    def forward(self, latents: Tensor, freeze_codebook: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, h, w) -> the same shape with the latents' gradient, indices (B, N), and the squared error."""
        low, high = latents.detach(), []
        for _ in self.stages[1:]:
            low, details = self.bands(low)
            high.append(details.unflatten(1, (-1, 3)))  # (B, C, 3, side, side)
        entries, indices = [], []
        for codebook, values in zip(self.codebooks, [low.unsqueeze(2), *reversed(high)]):
            tokens = values.permute(0, 3, 4, 2, 1).flatten(1, 3)  # (B, tokens, C), the bands of a cell together
            nearest, index, _ = codebook(tokens, freeze_codebook=freeze_codebook)
            entries.append(nearest)
            indices.append(index)
        quantized = self._join(entries)
        loss = F.mse_loss(latents, quantized.detach())
        return self.straight_through(latents, quantized), torch.cat(indices, dim=1), loss

    def _join(self, entries: list[Tensor]) -> Tensor:
        """The entries (B, tokens, C) of the first stages -> latents at the scale that they lead to."""
        bands = [
            part.unflatten(1, (stage.side, stage.side, stage.per_cell)).permute(0, 4, 3, 1, 2)
            for stage, part in zip(self.stages, entries)
        ]
        low = bands[0][:, :, 0]
        for high in bands[1:]:
            low = self.bands.inverse(low, high.flatten(1, 2))
        return low

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, n) of the first k stages -> the latents at the k-th scale, (B, C, scales[k-1], scales[k-1])."""
        return self._join(
            [self.codebooks[k].get_codes_from_indices(part) for k, part in enumerate(self.split(indices))]
        )
