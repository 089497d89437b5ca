"""Losses on spectra: focal frequency, fixed and learned Gaussian spectra, and the bands of a wavelet transform."""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.losses.shapes import check_same_shape
from favae.precision import no_autocast
from favae.wavelets import WaveletTransform2D

SMALLEST_SIGMA = 0.3  # cells; a Gaussian below this passes every frequency


def focal_frequency_loss(prediction: Tensor, target: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Mean squared spectral error in which each frequency is weighted by its own error.

    L = mean_{u,v} w(u,v) |F_p(u,v) - F_t(u,v)|^2,   w = |F_p - F_t|^alpha / max w, not differentiated.

    Args:
        prediction, target: (B, C, H, W), any floating dtype; computed in float32, orthonormal FFT.
        alpha: how strongly hard frequencies are preferred; 0 gives the MSE (Parseval).
    Returns:
        Scalar, in squared units of the input.
    Raises:
        ValueError: if the shapes differ.
    Source: Jiang et al., ICCV 2021, eq. 8-9; Lin et al., CVPR 2023 (arXiv 2305.02541), whose formula omits the division
        and the stop of the gradient that the code of both has.
    """
    check_same_shape(prediction, target)
    with no_autocast(prediction.device):
        error = prediction.float() - target.float()
        return _focal_mean(torch.fft.rfft2(error, norm="ortho"), error.shape[-1], alpha)


def _focal_mean(half_spectrum: Tensor, width: int, alpha: float = 1.0) -> Tensor:
    """mean w |E|^2 over all frequencies of the spectrum E of an error."""
    energy = _energy(half_spectrum)
    weights = energy.detach().sqrt() ** alpha
    largest = weights.amax(dim=(-2, -1), keepdim=True)
    return _mean(weights / largest.clamp_min(torch.finfo(weights.dtype).tiny) * energy, width)


def _energy(half_spectrum: Tensor) -> Tensor:
    """|E|^2, whose gradient is finite at 0, unlike that of abs()."""
    return half_spectrum.real.square() + half_spectrum.imag.square()


def _mean(half: Tensor, width: int) -> Tensor:
    """The mean over all frequencies of what is alike at opposite ones, (..., H, W // 2 + 1)."""
    return (half.mean(dim=tuple(range(half.ndim - 1))) * multiplicity(width, half.device)).sum() / width


def multiplicity(width: int, device: torch.device | None = None) -> Tensor:
    """How many frequencies each column of `rfft2` stands for, (width // 2 + 1,).

    A real signal's spectrum has conjugates at opposite frequencies, so a column stands for two, but for those of the
    frequencies 0 and, if the width is even, 1/2.
    """
    counts = torch.full((width // 2 + 1,), 2.0, device=device)
    counts[0] = 1
    if width % 2 == 0:
        counts[-1] = 1
    return counts


def gaussian_spectrum(size: tuple[int, int], sigma: Tensor) -> Tensor:
    """The share of each frequency that a Gaussian blur leaves: exp(-2 pi^2 sigma^2 |f|^2), in the order of `fft2`.

    Args:
        size: (H, W).
        sigma: scalar, in cells of the grid.
    Returns:
        (H, W), float32, 1 at frequency zero; differentiable in `sigma`.
    """
    rows, columns = (torch.fft.fftfreq(n, device=sigma.device) for n in size)  # cycles per cell
    squared = rows.square()[:, None] + columns.square()[None, :]
    return torch.exp(-2 * math.pi**2 * sigma.float().square() * squared)


def _truncated_blur(features: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Convolves with a Gaussian that is cut off to kernel_size x kernel_size cells and normalized; mirrored borders."""
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=features.device, dtype=torch.float32)
    kernel = torch.softmax(-0.5 * (offsets / sigma).square(), dim=0)
    kernel = torch.outer(kernel, kernel).expand(features.shape[1], 1, -1, -1)
    mode = "reflect" if min(features.shape[-2:]) > radius else "replicate"  # a mirror image must fit
    return F.conv2d(F.pad(features, (radius,) * 4, mode=mode), kernel, groups=features.shape[1])


class SpectrumLoss(nn.Module):
    """Focal frequency loss of features that a Gaussian has blurred: low frequencies count, high ones fade.

    L = mean_i FFL(K_i * C_i, K_i * A_i), with the same kernel K_i for both features of a pair.

    Args:
        levels: number of pairs (A_i, C_i).
        sigma: std of the Gaussians, in cells of the feature map. The response at frequency f (cycles per cell) is
            exp(-2 pi^2 sigma^2 f^2): with the published 3.0, half is left at f = 0.06. With 0 nothing is blurred, and
            the loss is the focal frequency loss of the features themselves.
        kernel_size: None applies the exact Gaussian, on the spectrum (periodic borders). An odd number of cells cuts it
            off, as published: 3, 5 or 9 cells at sigma = 3, which is nearly a box and blind at the zeros of a box's
            response. Needs a sigma above 0.
        normalize: whether to divide by the mean energy of the blurred target, without a gradient to the target. The
            loss then has no unit, and does not fall when features shrink or a wider kernel takes energy from both.

    Raises:
        ValueError: for an even kernel size.
    Source: Lin et al., CVPR 2023 (arXiv 2305.02541).
    """

    start: Tensor

    def __init__(
        self,
        levels: int,
        sigma: float = 3.0,
        *,
        kernel_size: int | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        if kernel_size is not None and (kernel_size < 3 or kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be an odd number of at least 3, or None, got {kernel_size}")
        self.kernel_size = kernel_size
        self.normalize = normalize
        self.register_buffer("start", torch.full((levels,), float(sigma)), persistent=False)

    @property
    def sigma(self) -> Tensor:
        """(levels,), in cells of the feature map."""
        return self.start

    def forward(self, complements: Sequence[Tensor], activations: Sequence[Tensor]) -> Tensor:
        """
        Args:
            complements: C_i, one decoder feature (B, C, H, W) per level, any sizes and floating dtypes.
            activations: A_i, the encoder features that they are to match, of the same shapes.
        Returns:
            Scalar, float32.
        Raises:
            ValueError: for another number of pairs than levels, or shapes that differ.
        """
        pairs = zip(complements, activations, self.sigma, strict=True)
        return torch.stack([self._level_loss(*pair) for pair in pairs]).mean()

    def _level_loss(self, complement: Tensor, activation: Tensor, sigma: Tensor) -> Tensor:
        check_same_shape(complement, activation)
        with no_autocast(complement.device):
            width = complement.shape[-1]
            error = self._blurred_spectrum(complement.float() - activation.float(), sigma)
            loss = _focal_mean(error, width)
            if self.normalize:
                target = self._blurred_spectrum(activation.detach().float(), sigma)
                loss = loss / _mean(_energy(target), width).clamp_min(1e-8)
            return loss

    def _blurred_spectrum(self, features: Tensor, sigma: Tensor) -> Tensor:
        if self.kernel_size is not None:
            return torch.fft.rfft2(_truncated_blur(features, sigma, self.kernel_size), norm="ortho")
        half = torch.fft.rfft2(features, norm="ortho")
        return half * gaussian_spectrum((features.shape[-2], features.shape[-1]), sigma)[:, : half.shape[-1]]


class DynamicSpectrumLoss(SpectrumLoss):
    """`SpectrumLoss` with learned sigmas, one per pair, each between 0.3 and 2 sigma - 0.3 of the sigma it starts at:

    sigma_i = sigma + (sigma - 0.3) tanh(rho_i),   rho_i = 0 at the start.

    The loss has no minimum of its own in sigma. Blurring removes error: the loss falls towards wide kernels where low
    frequencies are right already, and towards narrow ones where the features are unrelated. `normalize` weakens the
    first effect without ending it, hence the bounds. The published code learns sigma itself with Adam at 2e-7, which
    cannot move it: its results are those of `SpectrumLoss`.

    `rho` needs a learning rate of its own (1e-3 to 1e-2).

    Args, source: as `SpectrumLoss`.
    Raises:
        ValueError: for an even kernel size, or a sigma of at most 0.3.
    """

    def __init__(
        self,
        levels: int,
        sigma: float = 3.0,
        *,
        kernel_size: int | None = None,
        normalize: bool = True,
    ):
        super().__init__(levels, sigma, kernel_size=kernel_size, normalize=normalize)
        if sigma <= SMALLEST_SIGMA:
            raise ValueError(f"a learned sigma must start above {SMALLEST_SIGMA}, got {sigma}")
        self.rho = nn.Parameter(torch.zeros(levels))

    @property
    def sigma(self) -> Tensor:
        """(levels,), in cells of the feature map."""
        return self.start + (self.start - SMALLEST_SIGMA) * torch.tanh(self.rho)


def band_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    levels: int = 1,
    wavelet: str = "haar",
) -> Tensor:
    """Mean absolute error of each band of a wavelet transform, weighted by band.

    L = (1 / levels) sum_{l=1..levels} sum_b w_b mean |W_b^l(p) - W_b^l(t)| / 4,   b = LL, LH, HL, HH

    where level l splits the LL band of level l - 1.

    Args:
        prediction, target: (B, C, H, W), any floating dtype, H and W divisible by 2^levels; computed in float32.
        weights: of LL, LH, HL and HH, the same at every level.
        levels: number of levels, at least 1.
        wavelet: a discrete wavelet of pywt.
    Returns:
        Scalar, in units of the bands (Haar's LL is twice the 2x2 mean, the next level's four times the 4x4 mean).
    Raises:
        ValueError: if the shapes differ, there are not four weights, or the transform refuses a size.
    """
    check_same_shape(prediction, target)
    transform = _wavelet_transform(wavelet, prediction.device)
    low = prediction.float() - target.float()
    total = low.new_zeros(())
    for _ in range(levels):
        low, high = transform(low)
        errors = [low.abs().mean(), *high.abs().mean(dim=(0, 1, 3, 4))]
        total = total + sum(weight * error for weight, error in zip(weights, errors, strict=True)) / 4
    return total / levels


def detail_mask(images: Tensor) -> Tensor:
    """How much fine detail an image has at each pixel, relative to the mean of the whole image.

    m = (e + 0.01) / (mean e + 0.01), where e is the root mean square of Haar's three high bands of 2 x 2 pixels, over
    all colors. A flat image has 1 everywhere.

    Args:
        images: (B, C, H, W) in [-1, 1], H and W even; computed in float32.
    Returns:
        (B, 1, H, W), of mean 1 for each image, not differentiated.
    """
    _, high = _wavelet_transform("haar", images.device)(images.detach().float())
    energy = high.square().mean(dim=(1, 2)).sqrt().unsqueeze(1) + 0.01  # (B, 1, H/2, W/2)
    mask = energy / energy.mean(dim=(2, 3), keepdim=True)
    return mask.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


@functools.cache
def _wavelet_transform(wavelet: str, device: torch.device) -> WaveletTransform2D:
    """Filters are made once, not at every step."""
    return WaveletTransform2D(wavelet).to(device)
