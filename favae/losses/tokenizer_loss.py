"""The weighted sum a tokenizer is trained on, every term by name."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from torch import Tensor, nn

from favae.foundation import FoundationModel
from favae.losses.adversarial import PatchDiscriminator, adaptive_weight, adversarial_loss
from favae.losses.alignment import vision_foundation_alignment
from favae.losses.frequency import DynamicSpectrumLoss, SpectrumLoss, band_loss, focal_frequency_loss
from favae.losses.perceptual import LPIPS
from favae.losses.stft import STFTLoss, ssim_loss

# Terms that the trainee computes, and where their weights are.
WEIGHTS = {
    "spectrum": "spectrum.weight",
    "commitment": "commitment",
    "scale_equivariance": "scale_equivariance",
}


@dataclass
class AlignmentConfig:
    weight: float = 0.0
    backbone: str = "vit_large_patch14_dinov2.lvd142m"  # any timm model, or efficientnet-lite0 (no network needed)
    weights: str | None = None  # a local file for it
    distmat_margin: float = 0.25
    cosine_margin: float = 0.5
    adaptive: bool = True  # scale to the gradient of the reconstruction at the encoder's last layer
    max_weight: float = 10.0  # the most that may come out of it


@dataclass
class AdversarialConfig:
    weight: float = 0.0
    start_step: int = 5_000  # in generator steps
    channels: int = 64
    num_layers: int = 3  # of stride 2; patches of 70 pixels
    adaptive: bool = True  # scale to the gradient of the reconstruction at the decoder's last layer
    max_weight: float = 10.0  # the most that may come out of it


@dataclass
class FocalFrequencyConfig:
    weight: float = 0.0
    alpha: float = 1.0


@dataclass
class SpectrumConfig:
    """Of the decoder's frequency complements; needs `model.frequency_complement`."""

    weight: float = 0.0
    kind: str = "dynamic"  # sigmas learned; "fixed"; or "none": focal frequency loss at all levels, no kernel
    sigma: float = 3.0  # at the start, cells
    kernel_size: int | None = None  # None: an exact Gaussian; an odd number: cut off, as published
    normalize: bool = True  # relative to the target's energy; published: false
    detach_encoder: bool = False  # whether the encoder is spared the gradient
    learning_rate: float = 1.0e-3  # of the sigmas; published: 2e-7, which cannot move them

    def build(self, levels: int) -> SpectrumLoss:
        kind = DynamicSpectrumLoss if self.kind == "dynamic" else SpectrumLoss
        if self.kind == "none":
            return kind(levels, 0.0, normalize=self.normalize)
        return kind(levels, self.sigma, kernel_size=self.kernel_size, normalize=self.normalize)


@dataclass
class BandConfig:
    weight: float = 0.0
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0, 1.0])  # of LL, LH, HL, HH
    levels: int = 1
    wavelet: str = "haar"


@dataclass
class STFTConfig:
    weight: float = 0.0
    window: int = 16  # pixels; 32 with stride 16 for 256 px
    stride: int = 4
    phase_weight: float = 2.0
    phase: str = "wrapped"  # or "paper": as printed

    def build(self) -> STFTLoss:
        return STFTLoss(self.window, self.stride, phase_weight=self.phase_weight, phase=self.phase)


@dataclass
class TokenizerLossConfig:
    reconstruction: str = "l1"  # "l2", or "none": the other terms alone
    ssim: float = 0.0  # of 1 - SSIM
    kl: float = 1e-6  # of models with a posterior
    commitment: float = 1.0  # of models with a codebook, on top of their own commitment_weight
    perceptual: float = 0.0  # LPIPS on VGG16
    perceptual_weights: str | None = None  # a local file with torchvision's VGG16
    focal_frequency: FocalFrequencyConfig = field(default_factory=FocalFrequencyConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    band: BandConfig = field(default_factory=BandConfig)
    stft: STFTConfig = field(default_factory=STFTConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    scale_equivariance: float = 0.0  # of the half-size latent's reconstruction error
    latent_noise: float = 0.0  # deviation of the deviation of noise on the latents that are decoded
    high_dropout: float = 0.0  # how often the high latents are zero and the target is the low-pass image

    def __post_init__(self):
        for name, allowed in {
            "reconstruction": ("l1", "l2", "none"),
            "spectrum.kind": ("dynamic", "fixed", "none"),
            "stft.phase": ("wrapped", "paper"),
        }.items():
            if self._value(name) not in allowed:
                raise ValueError(f"loss.{name} must be one of {', '.join(allowed)}, got {self._value(name)}")
        weights = ("ssim", "kl", "commitment", "perceptual", "scale_equivariance", "latent_noise", "high_dropout")
        sections = ("focal_frequency", "spectrum", "band", "stft", "alignment", "adversarial")
        others = ("focal_frequency.alpha", "spectrum.learning_rate", "stft.phase_weight", "adversarial.start_step")
        ceilings = ("alignment.max_weight", "adversarial.max_weight")
        for name in (*weights, *(f"{section}.weight" for section in sections), *others, *ceilings):
            if self._value(name) < 0:
                raise ValueError(f"loss.{name} must be at least 0, got {self._value(name)}")
        if len(self.band.weights) != 4 or min(self.band.weights) < 0 or self.band.levels < 1:
            raise ValueError("loss.band takes four weights of at least 0 and at least one level")
        adaptive = [s for s in (self.alignment, self.adversarial) if s.weight and s.adaptive]
        if self.reconstruction == "none" and not (self.ssim or self.perceptual):
            if adaptive:
                raise ValueError(
                    "loss.reconstruction=none without loss.ssim and loss.perceptual leaves nothing that the adaptive "
                    "weights of loss.alignment and loss.adversarial could refer to"
                )
            if not (self.focal_frequency.weight or self.band.weight or self.stft.weight):
                raise ValueError(
                    "loss.reconstruction=none leaves nothing to train on: set loss.ssim, loss.stft or another"
                )
        if self.high_dropout > 1:
            raise ValueError(f"loss.high_dropout is a probability, got {self.high_dropout}")

    def _value(self, name: str):
        return functools.reduce(getattr, name.split("."), self)


@dataclass
class TokenizerOutput:
    """What one forward pass gives the loss.

    Attributes:
        sample: (B, 3, H, W), the reconstruction.
        target: (B, 3, H, W), what it should be: the images, or low-pass images where the high latents were dropped.
        latents: (B, C, h, w), a posterior sample or codebook vectors.
        moments: (B, 2C, h, w), mean and logvar of the posterior; None for a codebook.
        projected: (B, F, h, w), latents in the space of the foundation model's features, or None.
        terms: losses that need the model's inside: "spectrum", "commitment", "scale_equivariance".
        statistics: what to log besides: "sigma_i", "codebook_usage", "codebook_perplexity".
    """

    sample: Tensor
    target: Tensor
    latents: Tensor | None = None
    moments: Tensor | None = None
    projected: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


class TokenizerLoss(nn.Module):
    """L = reconstruction + w_s (1 - SSIM) + w_p LPIPS + frequency losses + w_kl KL + w_a a align + w_g g adversarial.

    Terms of weight 0 are not computed; a and g are adaptive (see `adaptive_weight`) or 1. Everything is per element of
    the image: reconstruction is the mean of |x - x'| or (x - x')^2, and KL is the sum over the latent divided by 3HW.
    That is the published sum per image divided by 3HW throughout, so published weights keep their meaning.

    Args:
        config: weights and settings; may be replaced between steps.
        vae: the model trained, for the layers that adaptive weights look at.
        foundation, lpips: frozen networks, needed if their weight is not 0.

    Source: VA-VAE (arXiv 2501.01423) after VQGAN and LDM; frequency losses: Lin et al., CVPR 2023.
    """

    def __init__(
        self,
        config: TokenizerLossConfig,
        vae: nn.Module,
        foundation: FoundationModel | None = None,
        lpips: LPIPS | None = None,
    ):
        super().__init__()
        self.config = config
        self.foundation = foundation
        self.lpips = lpips
        self.stft = config.stft.build()
        self._last_layers = [m.conv_out.weight for m in vae.modules() if isinstance(m, Decoder)]
        self._latent_layers = [m.conv_out.weight for m in vae.modules() if isinstance(m, Encoder)]

    def forward(
        self, images: Tensor, output: TokenizerOutput, discriminator: PatchDiscriminator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            images: (B, 3, H, W), what the model was given, in [-1, 1].
            output: what it made of them.
            discriminator: judges the reconstruction; None before its start step.
        Returns:
            The total, and each term before weighting, detached, with the factors that adaptive weights came to and the
            output's statistics.
        """
        config = self.config
        images, target, sample = images.float(), output.target.float(), output.sample.float()
        terms, total = {}, sample.new_zeros(())
        if config.reconstruction != "none":
            error = sample - target
            terms["reconstruction"] = error.abs().mean() if config.reconstruction == "l1" else error.square().mean()
            total = terms["reconstruction"]
        if config.ssim:
            terms["ssim"] = ssim_loss(sample, target)
            total = total + config.ssim * terms["ssim"]
        if config.perceptual:
            terms["perceptual"] = self.lpips(sample, target).mean()
            total = total + config.perceptual * terms["perceptual"]
        fidelity = total  # what adaptive weights refer to, as published: without frequency losses

        for name, weight, value in self._frequency_terms(sample, target):
            terms[name] = value
            total = total + weight * value
        for name, value in output.terms.items():
            weight = config._value(WEIGHTS[name])
            terms[name] = value
            total = total + weight * value
        if config.kl and output.moments is not None:
            posterior = DiagonalGaussianDistribution(output.moments.float())
            terms["kl"] = posterior.kl().mean() / images[0].numel()
            total = total + config.kl * terms["kl"]

        alignment = config.alignment
        if alignment.weight:
            features = self.foundation(images, tuple(output.projected.shape[-2:]))
            value = vision_foundation_alignment(
                output.projected,
                features,
                distmat_margin=alignment.distmat_margin,
                cosine_margin=alignment.cosine_margin,
            )
            scale = alignment.weight
            if alignment.adaptive:
                terms["alignment_scale"] = adaptive_weight(fidelity, value, self._latent_layers, alignment.max_weight)
                scale = scale * terms["alignment_scale"]
            terms["alignment"] = value
            total = total + scale * value

        adversarial = config.adversarial
        if discriminator is not None:
            value = adversarial_loss(discriminator(sample))
            scale = adversarial.weight
            if adversarial.adaptive:
                terms["adversarial_scale"] = adaptive_weight(fidelity, value, self._last_layers, adversarial.max_weight)
                scale = scale * terms["adversarial_scale"]
            terms["adversarial"] = value
            total = total + scale * value

        return total, {name: value.detach() for name, value in (terms | output.statistics).items()}

    def _frequency_terms(self, sample: Tensor, target: Tensor) -> Iterator[tuple[str, float, Tensor]]:
        """(name, weight, value) of the frequency losses on images."""
        focal, band, stft = self.config.focal_frequency, self.config.band, self.config.stft
        if focal.weight:
            yield "focal_frequency", focal.weight, focal_frequency_loss(sample, target, alpha=focal.alpha)
        if band.weight:
            value = band_loss(sample, target, weights=band.weights, levels=band.levels, wavelet=band.wavelet)
            yield "band", band.weight, value
        if stft.weight:
            yield "stft", stft.weight, self.stft(sample, target)
