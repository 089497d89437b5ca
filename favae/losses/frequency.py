"""Losses on spectra: focal frequency, fixed and learned Gaussian spectra, and the bands of a wavelet transform."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.precision import no_autocast
from favae.wavelets import WaveletTransform2D

SMALLEST_SIGMA = 0.3  # pixels; below, a Gaussian passes every frequency there is


def focal_frequency_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    patch_factor: int = 1,
    average_spectrum: bool = False,
    log_weights: bool = False,
    batch_weights: bool = False,
) -> Tensor:
    """Mean squared spectral error in which each frequency is weighted by its own error.

    L = mean_{u,v} w(u,v) |F_p(u,v) - F_t(u,v)|^2,   w = |F_p - F_t|^alpha / max w, not differentiated.

    Args:
        prediction, target: (B, C, H, W), any floating dtype; computed in float32, orthonormal FFT.
        alpha: how strongly hard frequencies are preferred; 0 gives the MSE (Parseval).
        patch_factor: the image is cut into patch_factor x patch_factor patches, each with a spectrum of its own.
        average_spectrum: compare the spectra's means over the batch rather than each pair.
        log_weights: w = log(1 + |F_p - F_t|^alpha), before it is divided by its maximum.
        batch_weights: one maximum for the whole batch rather than one per image, patch and channel.
    Returns:
        Scalar, in squared units of the input.
    Raises:
        ValueError: if the shapes differ, or `patch_factor` does not divide height and width.
    Source: Jiang et al., ICCV 2021, eq. 8-9 (options and normalisation as in their package); Lin et al., CVPR 2023
        (arXiv 2305.02541), whose formula omits the division and the stop of the gradient that their code has.
    """
    _same_shape(prediction, target)
    height, width = prediction.shape[-2:]
    if height % patch_factor or width % patch_factor:
        raise ValueError(f"patch_factor {patch_factor} must divide height and width, got {height}x{width}")
    with no_autocast(prediction.device):
        error = prediction.float() - target.float()
        error = error.unflatten(-1, (patch_factor, -1)).unflatten(-3, (patch_factor, -1))  # (B, C, p, H/p, p, W/p)
        spectrum = torch.fft.fft2(error, dim=(-3, -1), norm="ortho")
        if average_spectrum:
            spectrum = spectrum.mean(dim=0, keepdim=True)
        return _focal_mean(spectrum, (-3, -1), alpha, log_weights, batch_weights)


def _focal_mean(spectrum: Tensor, dims: tuple[int, int], alpha: float, log=False, batch=False) -> Tensor:
    """mean w |E|^2 of an error's complex spectrum E, the frequencies along `dims`."""
    squared = _energy(spectrum)
    weights = squared.detach().sqrt() ** alpha
    if log:
        weights = weights.log1p()
    largest = weights.max() if batch else weights.amax(dim=dims, keepdim=True)
    return (weights / largest.clamp_min(torch.finfo(weights.dtype).tiny) * squared).mean()


def _energy(spectrum: Tensor) -> Tensor:
    return spectrum.real.square() + spectrum.imag.square()  # its gradient is finite at 0, that of abs() is not


def _same_shape(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")


def gaussian_spectrum(size: tuple[int, int], sigma: Tensor) -> Tensor:
    """What a Gaussian blur of `sigma` pixels leaves of each frequency: exp(-2 pi^2 sigma^2 |f|^2), in `fft2`'s order.

    Returns:
        (H, W), float32, 1 at the zero frequency; differentiable in `sigma`.
    """
    rows, columns = (torch.fft.fftfreq(n, device=sigma.device) for n in size)  # cycles per pixel
    squared = rows.square()[:, None] + columns.square()[None, :]
    return torch.exp(-2 * math.pi**2 * sigma.float().square() * squared)


def _truncated_blur(x: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """A Gaussian cut off to kernel_size x kernel_size and normalised, mirrored borders."""
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=torch.float32)
    kernel = torch.softmax(-0.5 * (offsets / sigma).square(), dim=0)
    kernel = torch.outer(kernel, kernel).expand(x.shape[1], 1, -1, -1)
    mode = "reflect" if min(x.shape[-2:]) > radius else "replicate"  # a mirror image must fit
    return F.conv2d(F.pad(x, (radius,) * 4, mode=mode), kernel, groups=x.shape[1])


class SpectrumLoss(nn.Module):
    """Focal frequency loss of features that a Gaussian has blurred: low frequencies count, high ones fade.

    SL = mean_i FFL(K_i * C_i, K_i * A_i), the same kernel K_i for both of a pair.

    Args:
        levels: how many pairs (A_i, C_i) there are.
        sigma: of the Gaussians, in cells of the feature map. The response at frequency f (cycles per cell) is
            exp(-2 pi^2 sigma^2 f^2): with the published 3.0 half is left at f = 0.06. 0: no blur, the focal frequency
            loss of the features themselves.
        kernel_size: None applies the Gaussian exactly, on the spectrum (periodic borders). An odd number cuts it off
            to that many cells, as published (3, 5 or 9 cells at sigma = 3: nearly a box, blind at the zeros of a
            box's response).
        normalise: divide by the mean energy of the blurred target, of which no gradient reaches the target; the loss
            then has no unit, and does not fall when the features shrink or a wider kernel takes energy from both alike.

    Raises:
        ValueError: for impossible settings, or pairs that do not fit.
    Source: Lin et al., CVPR 2023 (arXiv 2305.02541).
    """

    def __init__(
        self,
        levels: int,
        sigma: float = 3.0,
        *,
        kernel_size: int | None = None,
        alpha: float = 1.0,
        normalise: bool = False,
    ):
        super().__init__()
        if sigma < 0 or (sigma == 0 and kernel_size is not None):
            raise ValueError(f"sigma must be above 0, or 0 with kernel_size=None for no blur at all, got {sigma}")
        if kernel_size is not None and (kernel_size < 3 or kernel_size % 2 == 0):
            raise ValueError(f"kernel_size must be an odd number of at least 3, or None, got {kernel_size}")
        self.levels = levels
        self.kernel_size = kernel_size
        self.alpha = alpha
        self.normalise = normalise
        self._set_sigma(torch.full((levels,), float(sigma)))

    def _set_sigma(self, sigma: Tensor) -> None:
        self.register_buffer("sigma", sigma)

    def forward(self, complements: Sequence[Tensor], activations: Sequence[Tensor]) -> Tensor:
        """
        Args:
            complements: C_i, `levels` decoder features (B, C, H, W), any sizes and floating dtypes.
            activations: A_i, the encoder features of the same shapes that they are to match.
        Returns:
            Scalar; float32.
        """
        if not len(complements) == len(activations) == self.levels:
            raise ValueError(f"expected {self.levels} pairs, got {len(complements)} and {len(activations)} features")
        return torch.stack([self._level(*pair) for pair in zip(complements, activations, self.sigma)]).mean()

    def _level(self, complement: Tensor, activation: Tensor, sigma: Tensor) -> Tensor:
        _same_shape(complement, activation)
        with no_autocast(complement.device):
            error = self._blurred_spectrum(complement.float() - activation.float(), sigma)
            loss = _focal_mean(error, (-2, -1), self.alpha)
            if self.normalise:
                target = self._blurred_spectrum(activation.detach().float(), sigma)
                loss = loss / _energy(target).mean().clamp_min(1e-8)
            return loss

    def _blurred_spectrum(self, features: Tensor, sigma: Tensor) -> Tensor:
        if self.kernel_size is not None:
            return torch.fft.fft2(_truncated_blur(features, sigma, self.kernel_size), norm="ortho")
        return torch.fft.fft2(features, norm="ortho") * gaussian_spectrum(tuple(features.shape[-2:]), sigma)


class DynamicSpectrumLoss(SpectrumLoss):
    """`SpectrumLoss` whose sigmas are learned, one per pair, between 0.3 and 2 sigma - 0.3 of the sigma they start at:

    sigma_i = sigma + (sigma - 0.3) tanh(rho_i),   rho_i = 0 at the start.

    The loss has no minimum of its own in sigma: blurring removes error, so it falls towards wide kernels where low
    frequencies are right already, and towards narrow ones where the features are unrelated; `normalise` weakens the
    first and does not end it. Hence the bounds. The published code learns sigma itself with Adam at 2e-7, which cannot
    move it: its results are those of `SpectrumLoss`.

    `rho` needs a learning rate of its own (1e-3 to 1e-2).

    Args, raises and source: as `SpectrumLoss`.
    """

    def __init__(
        self,
        levels: int,
        sigma: float = 3.0,
        *,
        kernel_size: int | None = None,
        alpha: float = 1.0,
        normalise: bool = True,
    ):
        super().__init__(levels, sigma, kernel_size=kernel_size, alpha=alpha, normalise=normalise)

    def _set_sigma(self, sigma: Tensor) -> None:
        if sigma.min() <= SMALLEST_SIGMA:
            raise ValueError(f"a learned sigma must start above {SMALLEST_SIGMA}, got {float(sigma.min())}")
        self.register_buffer("start", sigma)
        self.rho = nn.Parameter(torch.zeros_like(sigma))

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

    L = (1 / levels) sum_{l=1..levels} sum_b w_b |W_b^l(p) - W_b^l(t)|_mean / 4,   b = LL, LH, HL, HH

    where level l splits the LL band of level l - 1.

    Args:
        prediction, target: (B, C, H, W), any floating dtype, H and W divisible by 2^levels; computed in float32.
        weights: of LL, LH, HL and HH, at every level.
        levels: how often the low band is split again.
        wavelet: a bank of pywt.
    Returns:
        Scalar, in units of the bands (Haar's LL is twice the 2x2 mean, the next level's four times the 4x4 mean).
    Raises:
        ValueError: if the shapes differ, there are not four weights, or a size is odd at some level.
    """
    _same_shape(prediction, target)
    if len(weights) != 4 or levels < 1:
        raise ValueError(f"band_loss takes four weights and at least one level, got {tuple(weights)} and {levels}")
    transform = WaveletTransform2D(wavelet).to(prediction.device)
    low = prediction.float() - target.float()
    total = low.new_zeros(())
    for _ in range(levels):
        low, high = transform(low)
        errors = [low.abs().mean(), *high.abs().mean(dim=(0, 1, 3, 4))]
        total = total + sum(w * error for w, error in zip(weights, errors)) / 4
    return total / levels
