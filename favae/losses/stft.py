"""A loss on local spectra, and the structural similarity it is combined with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from favae.precision import no_autocast

NEGLIGIBLE = 1e-6  # an amplitude without a phase worth the name, for images in [-1, 1]


class STFTLoss(nn.Module):
    """Distance of amplitudes and phases of a windowed Fourier transform, high frequencies counting more.

    L = mean_j w_j (|A_p - A_t| + phase_weight * sg[min(A_p, A_t)] |wrap(P_p - P_t)|),   w_j = |f_j| / mean |f|

    over all windows and frequencies j, with F = A exp(iP) the orthonormal transform of a Hann-windowed patch. The first
    part is the distance along the radius, the second along the arc, both in units of the image: where there is no
    amplitude the phase costs nothing, and the gradient is bounded everywhere. Borders are mirrored, so that every
    pixel is seen by as many windows.

    `phase="paper"` is the formula as printed: |A_p - A_t| + phase_weight |P_p - P_t|, angles neither wrapped nor
    weighted (phases of pi and -pi are 2 pi apart, and the noise of empty frequencies dominates), no padding.

    Args:
        window: side of the windows, pixels, even; 16 for images of up to 64 px, 32 for 256 px.
        stride: pixels between windows. The cost grows with (window / stride)^2.
        phase_weight: lambda, above 1 in the paper.
        phase: "wrapped" or "paper".

    Raises:
        ValueError: for impossible settings, images that differ in shape, or images smaller than a window.
    Source: "Short-Time Fourier Transform for deblurring Variational Autoencoders", arXiv 2401.03166. Their code differs
        from the paper (rectangular window, one quadrant of the spectrum, weights that vanish on both axes): not kept.
    """

    def __init__(self, window: int = 16, stride: int = 4, *, phase_weight: float = 2.0, phase: str = "wrapped"):
        super().__init__()
        if window < 4 or window % 2:
            raise ValueError(f"window must be an even number of at least 4, got {window}")
        if not 1 <= stride <= window:
            raise ValueError(f"stride must be between 1 and window = {window}, got {stride}")
        if phase not in ("wrapped", "paper"):
            raise ValueError(f"phase must be 'wrapped' or 'paper', got {phase!r}")
        self.window, self.stride, self.phase_weight, self.phase = window, stride, phase_weight, phase
        hann = torch.hann_window(window)
        self.register_buffer("taper", torch.outer(hann, hann), persistent=False)
        rows, columns = torch.fft.fftfreq(window), torch.fft.rfftfreq(window)
        radius = (rows.square()[:, None] + columns.square()[None, :]).sqrt()  # (L, L/2 + 1), cycles per pixel
        twice = torch.full_like(columns, 2.0)  # bins that stand for their mirror image as well
        twice[0] = twice[-1] = 1
        self.register_buffer("weights", radius * twice / (radius * twice).sum(), persistent=False)

    def spectrogram(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> complex (B, C, rows, columns, L, L/2 + 1)."""
        if self.phase == "wrapped":
            images = F.pad(images, (self.window // 2,) * 4, mode="reflect")
        windows = images.unfold(2, self.window, self.stride).unfold(3, self.window, self.stride)
        return torch.fft.rfft2(windows * self.taper, norm="ortho")

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            prediction, target: (B, C, H, W), any floating dtype; computed in float32.
        Returns:
            Scalar, in units of the images.
        """
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        if min(prediction.shape[-2:]) < self.window:
            raise ValueError(f"images of {tuple(prediction.shape[-2:])} are smaller than the window, {self.window}")
        with no_autocast(prediction.device):
            predicted, wanted = self.spectrogram(prediction.float()), self.spectrogram(target.float())
            radial = (_amplitude(predicted) - _amplitude(wanted)).abs()
            phase = _angle_difference(predicted, wanted) if self.phase == "wrapped" else _printed(predicted, wanted)
            cost = radial + self.phase_weight * phase
            return (cost * self.weights).sum((-2, -1)).mean()


def _amplitude(spectrum: Tensor) -> Tensor:
    return (spectrum.real.square() + spectrum.imag.square() + NEGLIGIBLE**2).sqrt()  # differentiable at 0


def _angle_difference(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The length of the shorter arc between two phases, at the smaller of the two amplitudes."""
    radius = torch.minimum(predicted.detach().abs(), wanted.abs())
    turned = torch.where(radius > NEGLIGIBLE, predicted * wanted.conj(), 1.0)  # no phase, no gradient
    return radius * torch.angle(turned).abs()


def _printed(predicted: Tensor, wanted: Tensor) -> Tensor:
    angles = (torch.angle(torch.where(s.detach().abs() > NEGLIGIBLE, s, 1.0)) for s in (predicted, wanted))
    return (next(angles) - next(angles)).abs()


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM (11 x 11 Gaussian window of 1.5 px), for images in [-1, 1]; a scalar in [0, 2].

    The images are moved to [0, 1] first: SSIM compares means as intensities, which are not negative. The STFT paper
    prints "+ SSIM", which would make images dissimilar.
    """
    with no_autocast(prediction.device):
        first, second = (prediction.float() + 1) / 2, (target.float() + 1) / 2
        return 1 - structural_similarity_index_measure(first, second, data_range=1.0)
