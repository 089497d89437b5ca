"""The two-dimensional discrete wavelet transform, one level or several, with periodic borders.

The filtering is done by the package `pytorch_wavelets`; the filters come from pywt.
"""

import warnings

import numpy as np
import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.precision import no_autocast

with warnings.catch_warnings():
    # The package imports setuptools' pkg_resources, which announces its own removal to everybody who imports it.
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message="Deprecated call to `pkg_resources")
    from pytorch_wavelets.dwt.lowlevel import afb2d_nonsep, sfb2d_nonsep

BANDS = ("LL", "LH", "HL", "HH")  # the order of pywt's (cA, cH, cV, cD)


class _FilterBank(nn.Module):
    """What both directions share: the four 2-D filters of a wavelet, kept in float32 whatever the module is cast to."""

    def __init__(self, wavelet: str, low_pass: str, high_pass: str, flip: bool):
        super().__init__()
        try:
            bank = pywt.Wavelet(wavelet)
        except ValueError:
            raise ValueError(f"wavelet '{wavelet}' is not a discrete pywt bank; see pywt.wavelist(kind='discrete')")
        low, high = getattr(bank, low_pass), getattr(bank, high_pass)
        filters = np.stack([np.outer(low, low), np.outer(high, low), np.outer(low, high), np.outer(high, high)])
        # convolutions of torch are correlations: they need the mirror images of analysis filters
        filters = filters[:, ::-1, ::-1] if flip else filters
        self.wavelet = wavelet
        self.length = bank.dec_len
        self._exact = filters[:, None].tolist()
        self.filters: Tensor  # (4, 1, length, length)
        self.register_buffer("filters", self._make_filters(), persistent=False)

    def _make_filters(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self._exact, dtype=dtype, device=device)

    def _filters_in(self, dtype: torch.dtype) -> Tensor:
        """In float32 or float64."""
        return self.filters if dtype == torch.float32 else self._make_filters(self.filters.device, dtype)

    def _apply(self, fn, recurse: bool = True) -> "_FilterBank":
        """Follows moves to other devices. Casts would round the filters, and `to_empty` lose them: on the same device,
        they stay the same tensor, which hooks of offloading know."""
        filters = self.filters
        super()._apply(fn, recurse)
        moved = self.filters.device
        self.filters = filters if filters.device == moved else self._make_filters(moved)
        return self

    def _check_size(self, height: int, width: int) -> None:
        if height % 2 or width % 2 or min(height, width) < self.length:
            raise ValueError(
                f"the wavelet transform needs an even height and width of at least {self.length} ({self.wavelet}), "
                f"got {height}x{width}"
            )

    def _group(self, images: Tensor) -> Tensor:
        """Two-tap filters are fastest as one grouped convolution, longer ones with the channels as batch entries."""
        return images if self.length == 2 else images.flatten(0, 1).unsqueeze(1)

    def extra_repr(self) -> str:
        return f"wavelet={self.wavelet!r}"


class WaveletTransform2D(_FilterBank):
    """Splits an image into one low and three high bands of half its size.

    The transform is orthonormal for orthogonal wavelets (haar, db*, sym*, coif*): the squared sums of input and output
    agree. Borders are periodic (pywt's "periodization"), so all bands have exactly half the size.

    Args:
        wavelet: a discrete wavelet of pywt, such as "haar", "db2" or "bior4.4".

    Source: Mallat, 1989; conventions of `pywt.dwt2`.
    """

    def __init__(self, wavelet: str = "haar"):
        super().__init__(wavelet, "dec_lo", "dec_hi", flip=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (B, C, H, W), any floating dtype; H and W even and not below the length of the filters.
        Returns:
            low (B, C, H/2, W/2) and high (B, C, 3, H/2, W/2) in the order LH, HL, HH (pywt's cH, cV, cD), in the dtype
            of the input. They are computed in float32 (on GPUs as torch's settings of TF32 say), or in float64 for
            float64 images. Haar's low band is twice the mean of 2x2 pixels.
        Raises:
            ValueError: if H or W is odd or below the length of the filters.
        """
        batch, channels, height, width = images.shape
        self._check_size(height, width)
        dtype = torch.promote_types(images.dtype, torch.float32)
        with no_autocast(images.device):
            if self.length == 2:  # never reaches over the border, whose code is slow and cannot be exported to ONNX
                filters = self._filters_in(dtype).repeat(channels, 1, 1, 1)
                bands = F.conv2d(images.to(dtype), filters, stride=2, groups=channels)
            else:
                bands = afb2d_nonsep(self._group(images.to(dtype)), self._filters_in(dtype), mode="periodization")
        bands = bands.reshape(batch, channels, 4, height // 2, width // 2).to(images.dtype)
        return bands[:, :, 0], bands[:, :, 1:]


class InverseWaveletTransform2D(_FilterBank):
    """Joins what `WaveletTransform2D` with the same wavelet has split; see there."""

    def __init__(self, wavelet: str = "haar"):
        super().__init__(wavelet, "rec_lo", "rec_hi", flip=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """
        Args:
            low: (B, C, h, w). high: (B, C, 3, h, w), in the order LH, HL, HH.
        Returns:
            (B, C, 2h, 2w), in the dtype of `low`, computed in float32, or in float64 for float64 bands.
        Raises:
            ValueError: if 2h or 2w is below the length of the filters.
        """
        batch, channels, height, width = low.shape
        self._check_size(2 * height, 2 * width)
        dtype = torch.promote_types(low.dtype, torch.float32)
        with no_autocast(low.device):
            bands = self._group(torch.cat([low.unsqueeze(2), high], dim=2).to(dtype))
            # The package's own periodic mode adds the borders up in place, which costs twice the time in training:
            # here the coefficients that reach over the border are repeated before, and what is beyond it is cut off.
            wrap = self.length // 4
            if wrap:
                bands = F.pad(bands.flatten(1, 2), (wrap,) * 4, mode="circular").unflatten(1, (-1, 4))
            images = sfb2d_nonsep(bands, self._filters_in(dtype), mode="zero")
            start = 2 * wrap - self.length // 2 + 1
            images = images[..., start : start + 2 * height, start : start + 2 * width]
        return images.reshape(batch, channels, 2 * height, 2 * width).to(low.dtype)


class WaveletBands(nn.Module):
    """Several levels of the transform, with all high bands as one stack of channels, and the way back.

    One level gives LL and LH, HL, HH. Each further level splits LL again and, so that all bands keep one size, the high
    bands as well (a wavelet packet). The result is an orthonormal rearrangement of the image into 4^levels bands per
    color, of which the lowest stands apart.

    Args:
        wavelet: a discrete wavelet of pywt.
        levels: how often the image is split, at least once.
        low_scale, high_scale: what each level's low and high bands are divided by. The next level splits the low band
            after this division. The defaults bring the bands of photographs in [-1, 1] near unit size.
    """

    def __init__(self, wavelet: str = "haar", levels: int = 1, low_scale: float = 2.0, high_scale: float = 0.5):
        super().__init__()
        self.levels, self.low_scale, self.high_scale = levels, low_scale, high_scale
        self.transform = WaveletTransform2D(wavelet)
        self.inverse_transform = InverseWaveletTransform2D(wavelet)

    @property
    def num_high_bands(self) -> int:
        """Bands per color in the high stack."""
        return 4**self.levels - 1

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> low (B, C, H/2^l, W/2^l), high (B, C (4^l - 1), H/2^l, W/2^l)."""
        low, bands = images, images[:, :0]  # no high bands yet
        for level in range(self.levels):
            # split the high bands of the levels before
            if level > 0:
                first, rest = self.transform(bands)
                bands = torch.cat([first.unsqueeze(2), rest], dim=2).flatten(1, 2)
            # split the low band
            low, high = self.transform(low)
            low, high = low / self.low_scale, high.flatten(1, 2) / self.high_scale
            bands = high if level == 0 else torch.cat([high, bands], dim=1)
        return low, bands

    def inverse(self, low: Tensor, high: Tensor) -> Tensor:
        """The inverse of `forward`: low (B, C, h, w) and high (B, C (4^l - 1), h, w) -> (B, C, 2^l h, 2^l w)."""
        colors = low.shape[1]
        for _ in range(self.levels):
            current, high = high[:, : 3 * colors], high[:, 3 * colors :]
            low = self.inverse_transform(low * self.low_scale, current.unflatten(1, (colors, 3)) * self.high_scale)
            if high.shape[1]:
                packets = high.unflatten(1, (-1, 4))
                high = self.inverse_transform(packets[:, :, 0], packets[:, :, 1:])
        return low

    def low_pass(self, images: Tensor) -> Tensor:
        """The images without their high bands, (B, C, H, W)."""
        low, high = self(images)
        return self.inverse(low, torch.zeros_like(high))
