"""The discrete wavelet transform of images, one level, periodic at the border, for any pywt bank."""

import pywt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.precision import no_autocast

BANDS = ("LL", "LH", "HL", "HH")  # the order of pywt's (cA, cH, cV, cD)


def _filter_bank(low: list[float], high: list[float]) -> Tensor:
    """The four 2-D filters of a separable bank: (4, 1, L, L), in the order of `BANDS`, rows first."""
    low, high = torch.tensor(low), torch.tensor(high)
    pairs = [(low, low), (high, low), (low, high), (high, high)]  # (along the rows, along the columns)
    return torch.stack([torch.outer(rows, columns) for rows, columns in pairs]).unsqueeze(1)


class _Bank(nn.Module):
    """What both directions share: the filters of one pywt bank, applied in float32 whatever autocast says."""

    def __init__(self, wavelet: str, low: str, high: str, reverse: bool):
        super().__init__()
        try:
            bank = pywt.Wavelet(wavelet)
        except ValueError:
            raise ValueError(f"wavelet '{wavelet}' is not a discrete pywt bank; see pywt.wavelist(kind='discrete')")
        low, high = getattr(bank, low), getattr(bank, high)
        filters = _filter_bank(low[::-1], high[::-1]) if reverse else _filter_bank(low, high)
        self.wavelet = wavelet
        self.length = bank.dec_len
        # Not saved: the name in the config says it all.
        self.register_buffer("filters", filters, persistent=False)

    def extra_repr(self) -> str:
        return f"wavelet={self.wavelet!r}"


class WaveletTransform2D(_Bank):
    """Splits an image into one low and three high bands of half its size.

    Orthonormal for orthogonal banks (haar, db*, sym*, coif*): the squared sums of input and output agree. Border
    handling is pywt's "periodization", so the bands have exactly half the size, whatever the filter's length.

    Args:
        wavelet: a discrete bank of pywt, such as "haar", "db2" or "bior4.4".

    Source: Mallat, 1989; conventions of `pywt.dwt2`.
    """

    def __init__(self, wavelet: str = "haar"):
        super().__init__(wavelet, "dec_lo", "dec_hi", reverse=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            images: (B, C, H, W), any floating dtype, H and W even.
        Returns:
            low (B, C, H/2, W/2) and high (B, C, 3, H/2, W/2) in the order LH, HL, HH (pywt's cH, cV, cD);
            in the dtype of the input, computed in float32. Haar's low band is twice the 2x2 mean.
        Raises:
            ValueError: if H or W is odd.
        """
        batch, channels, height, width = images.shape
        if height % 2 or width % 2:
            raise ValueError(f"the wavelet transform needs an even height and width, got {height}x{width}")
        padding = self.length // 2 - 1
        with no_autocast(images.device):
            x = images.float().reshape(batch * channels, 1, height, width)
            if padding:
                x = F.pad(x, (padding,) * 4, mode="circular")
            bands = F.conv2d(x, self.filters.float(), stride=2)  # (B*C, 4, H/2, W/2)
        bands = bands.reshape(batch, channels, 4, height // 2, width // 2).to(images.dtype)
        return bands[:, :, 0], bands[:, :, 1:]


class InverseWaveletTransform2D(_Bank):
    """Joins what `WaveletTransform2D` with the same bank split; see there."""

    def __init__(self, wavelet: str = "haar"):
        super().__init__(wavelet, "rec_lo", "rec_hi", reverse=False)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """
        Args:
            low: (B, C, h, w). high: (B, C, 3, h, w), in the order LH, HL, HH.
        Returns:
            (B, C, 2h, 2w), in the dtype of `low`, computed in float32.
        """
        batch, channels, height, width = low.shape
        wrap = self.length // 4  # coefficients that reach over the border
        with no_autocast(low.device):
            bands = torch.cat([low.unsqueeze(2), high], dim=2).float().reshape(batch * channels, 4, height, width)
            if wrap:
                bands = F.pad(bands, (wrap,) * 4, mode="circular")
            x = F.conv_transpose2d(bands, self.filters.float(), stride=2)
            start = self.length // 2 - 1 + 2 * wrap
            x = x[:, :, start : start + 2 * height, start : start + 2 * width]
        return x.reshape(batch, channels, 2 * height, 2 * width).to(low.dtype)


class WaveletBands(nn.Module):
    """Several levels of the transform as two stacks of channels of one size, and back.

    One level gives LL and LH, HL, HH. Each further level splits LL again and, so that all bands keep one size, the high
    bands as well (a wavelet packet): an orthonormal rearrangement of the image into (4^levels) bands per colour, the
    lowest on its own.

    Args:
        wavelet: a bank of pywt.
        levels: how often to split.
        low_scale, high_scale: what each level's low and high bands are divided by; the next level splits the low band
            so divided.

    Raises:
        ValueError: if `levels` is below 1.
    """

    def __init__(self, wavelet: str, levels: int, low_scale: float, high_scale: float):
        super().__init__()
        if levels < 1:
            raise ValueError(f"wavelet_levels must be at least 1, got {levels}")
        self.levels, self.low_scale, self.high_scale = levels, low_scale, high_scale
        self.transform = WaveletTransform2D(wavelet)
        self.inverse = InverseWaveletTransform2D(wavelet)

    @property
    def high_bands(self) -> int:
        """Bands per colour in the high stack."""
        return 4**self.levels - 1

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> low (B, C, H/2^l, W/2^l), high (B, C (4^l - 1), H/2^l, W/2^l)."""
        low, bands = images, None
        for _ in range(self.levels):
            if bands is not None:
                first, rest = self.transform(bands)
                bands = torch.cat([first.unsqueeze(2), rest], dim=2).flatten(1, 2)
            low, high = self.transform(low)
            low, high = low / self.low_scale, high.flatten(1, 2) / self.high_scale
            bands = high if bands is None else torch.cat([high, bands], dim=1)
        return low, bands

    def join(self, low: Tensor, high: Tensor) -> Tensor:
        """The inverse of `split`."""
        colours = low.shape[1]
        for _ in range(self.levels):
            current, high = high[:, : 3 * colours], high[:, 3 * colours :]
            low = self.inverse(low * self.low_scale, current.unflatten(1, (colours, 3)) * self.high_scale)
            if high.shape[1]:
                packets = high.unflatten(1, (-1, 4))
                high = self.inverse(packets[:, :, 0], packets[:, :, 1:])
        return low

    def low_pass(self, images: Tensor) -> Tensor:
        """The images with their high bands removed."""
        low, high = self.split(images)
        return self.join(low, torch.zeros_like(high))
