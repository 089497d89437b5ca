"""A loss on local spectra, and the structural similarity that it is combined with."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.losses.frequency import multiplicity
from favae.losses.shapes import check_same_shape
from favae.precision import no_autocast

SMALLEST_SSIM = 6  # pixels, of images that are padded by half a window of 11
SMALLEST_AMPLITUDE = 1e-6  # the phase of a smaller one is rounding noise, for images in [-1, 1]


class STFTLoss(nn.Module):
    """Distance of amplitudes and phases of a windowed Fourier transform, in which high frequencies count more.

    L = mean_j w_j (|A_p - A_t| + phase_weight * sg[min(A_p, A_t)] |wrap(P_p - P_t)|),   w_j = |f_j| / mean |f|

    over all windows and frequencies j, where F = A exp(iP) is the orthonormal transform of a Hann-windowed patch. The
    first part is the distance along the radius, the second along the arc, both in units of the image: without amplitude
    the phase costs nothing, and the gradient is bounded everywhere. Borders are mirrored, so that their pixels are seen
    in the middle of windows, too.

    `phase="paper"` is the formula as printed, |A_p - A_t| + phase_weight |P_p - P_t|, without padding. Its angles are
    neither wrapped nor weighted: phases of pi and -pi are 2 pi apart, and the noise of empty frequencies dominates.

    Args:
        window: side of the windows in pixels, even; 16 for images of up to 64 px, 32 for 256 px.
        stride: pixels between windows. The cost grows with (window / stride)^2.
        phase_weight: lambda, above 1 in the paper.
        phase: "wrapped" or "paper".

    Raises:
        ValueError: for an odd window, a stride longer than the window, or an unknown `phase`.
    Source: "Short-Time Fourier Transform for deblurring Variational Autoencoders", arXiv 2401.03166. Their code differs
        from the paper (rectangular window, one quadrant of the spectrum, weights that vanish on both axes) and is not
        followed.
    """

    taper: Tensor
    weights: Tensor

    def __init__(
        self,
        window: int = 16,
        stride: int = 4,
        *,
        phase_weight: float = 2.0,
        phase: Literal["wrapped", "paper"] = "wrapped",
    ):
        super().__init__()
        if window < 4 or window % 2 or not 1 <= stride <= window:
            raise ValueError(f"window must be even and at least 4, stride in 1 ... window, got {window} and {stride}")
        if phase not in ("wrapped", "paper"):
            raise ValueError(f"phase must be 'wrapped' or 'paper', got {phase!r}")
        self.window, self.stride, self.phase_weight, self.phase = window, stride, phase_weight, phase
        hann = torch.hann_window(window)
        self.register_buffer("taper", torch.outer(hann, hann), persistent=False)
        # w_j on the half-plane of `rfft2`.
        rows, columns = torch.fft.fftfreq(window), torch.fft.rfftfreq(window)
        radius = (rows.square()[:, None] + columns.square()[None, :]).sqrt()  # (L, L/2 + 1), cycles per pixel
        weights = radius * multiplicity(window)
        self.register_buffer("weights", weights / weights.sum(), persistent=False)

    def spectrogram(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> complex (B, C, rows, columns, L, L/2 + 1) for windows of L x L pixels."""
        if self.phase == "wrapped":
            images = F.pad(images, (self.window // 2,) * 4, mode="reflect")
        windows = images.unfold(2, self.window, self.stride).unfold(3, self.window, self.stride)
        return torch.fft.rfft2(windows * self.taper, norm="ortho")

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """
        Args:
            prediction, target: (B, C, H, W), any floating dtype, at least as large as a window; computed in float32.
        Returns:
            Scalar, in units of the images.
        Raises:
            ValueError: if the shapes differ.
        """
        check_same_shape(prediction, target)
        with no_autocast(prediction.device):
            predicted, wanted = self.spectrogram(prediction.float()), self.spectrogram(target.float())
            radial = (_amplitude(predicted) - _amplitude(wanted)).abs()
            if self.phase == "wrapped":
                phase = _arc_length(predicted, wanted)
            else:
                phase = (_angle(predicted) - _angle(wanted)).abs()
            cost = radial + self.phase_weight * phase
            return (cost * self.weights).sum((-2, -1)).mean()


def _amplitude(spectrum: Tensor) -> Tensor:
    """|F|, differentiable at 0."""
    return (spectrum.real.square() + spectrum.imag.square() + SMALLEST_AMPLITUDE**2).sqrt()


def _arc_length(predicted: Tensor, wanted: Tensor) -> Tensor:
    """The length of the shorter arc between two phases, at the smaller of the two amplitudes."""
    radius = torch.minimum(predicted.detach().abs(), wanted.abs())
    rotation = torch.where(radius > SMALLEST_AMPLITUDE, predicted * wanted.conj(), 1.0)  # no amplitude, no gradient
    return radius * torch.angle(rotation).abs()


def _angle(spectrum: Tensor) -> Tensor:
    """The phase; 0, without a gradient, where there is no amplitude."""
    return torch.angle(torch.where(spectrum.detach().abs() > SMALLEST_AMPLITUDE, spectrum, 1.0))


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM, with a Gaussian window of 11 x 11 pixels and a std of 1.5.

    The images are moved to [0, 1] first: SSIM compares means as intensities, which are not negative. The STFT paper
    prints "+ SSIM", which would make images dissimilar.

    Args:
        prediction, target: (B, C, H, W) in [-1, 1]; computed in float32.
    Returns:
        Scalar in [0, 2].
    Source: Wang et al., IEEE TIP 2004.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds to import

    # E[x^2] - E[x]^2 needs all digits, which GPUs' convolutions do not have by default.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    with no_autocast(prediction.device), exact:
        first, second = (prediction.float() + 1) / 2, (target.float() + 1) / 2
        return 1 - structural_similarity_index_measure(first, second, data_range=1.0)
