"""The `loss:` section of a tokenizer's recipe: a weight for each loss, and what each is built with."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from favae.errors import ConfigError
from favae.losses.frequency import DynamicSpectrumLoss, SpectrumLoss
from favae.losses.stft import STFTLoss
from favae.ranges import Count, Halvings, Positive, Probability, Step, Text, Weight
from favae.training.validation import STRICT
from favae.wavelets import WaveletTransform2D

SMALLEST_SCALE = 0.25  # of latents and images with loss.equivariance


@dataclass(config=STRICT)
class FocalFrequencyConfig:
    weight: Weight = 0.0
    alpha: Weight = 1.0


@dataclass(config=STRICT)
class SpectrumConfig:
    """Compares frequency complements, of a `VQModelFA` or a `HyperpriorModelFA`, with the encoder's features."""

    weight: Weight = 0.0
    type: Literal["dynamic", "fixed", "none"] = "dynamic"  # sigmas learned; fixed; or focal frequency loss, unblurred
    sigma: Positive = 3.0  # at the start, in cells of the feature map
    kernel_size: Count | None = None  # None: an exact Gaussian; an odd number: cut off, as published
    normalize: bool = True  # relative to the target's energy; published: false
    learning_rate: Weight = 1.0e-3  # of the sigmas; published: 2e-7, which cannot move them

    def __post_init__(self):
        if self.type == "none" and (self.sigma, self.kernel_size) != (3.0, None):
            raise ConfigError("loss.spectrum.type=none blurs nothing: it has neither sigma nor kernel_size")
        if self.type != "dynamic" and self.learning_rate != 1.0e-3:
            raise ConfigError(f"loss.spectrum.type={self.type} learns no sigma: it has no learning_rate")

    def build(self, levels: int) -> SpectrumLoss:
        """Raises ValueError for a kernel size or a sigma that the loss does not take."""
        if self.type == "dynamic":
            return DynamicSpectrumLoss(levels, self.sigma, kernel_size=self.kernel_size, normalize=self.normalize)
        if self.type == "fixed":
            return SpectrumLoss(levels, self.sigma, kernel_size=self.kernel_size, normalize=self.normalize)
        return SpectrumLoss(levels, sigma=0.0, normalize=self.normalize)


@dataclass(config=STRICT)
class BandConfig:
    weight: Weight = 0.0
    weights: Annotated[list[Weight], Field(min_length=4, max_length=4)] = field(
        default_factory=lambda: [1.0, 1.0, 1.0, 1.0]  # of LL, LH, HL, HH
    )
    levels: Halvings = 1
    wavelet: Text = "haar"

    def build(self) -> WaveletTransform2D:
        """Raises ValueError for a wavelet that there is not."""
        return WaveletTransform2D(self.wavelet)


@dataclass(config=STRICT)
class STFTConfig:
    weight: Weight = 0.0
    window: Count = 16  # pixels; 32 with stride 16 for 256 px
    stride: Count = 4
    phase_weight: Weight = 2.0
    phase: Literal["wrapped", "paper"] = "wrapped"  # "paper": as printed

    def build(self) -> STFTLoss:
        """Raises ValueError for a window or a stride that the loss does not take."""
        return STFTLoss(self.window, self.stride, phase_weight=self.phase_weight, phase=self.phase)


@dataclass(config=STRICT)
class AlignmentConfig:
    weight: Weight = 0.0
    backbone: Text = "vit_large_patch14_dinov2.lvd142m"  # any timm model, or efficientnet-lite0 (no network needed)
    weights: Text | None = None  # a local file for the backbone
    distmat_margin: Weight = 0.25
    cosine_margin: Weight = 0.5
    adaptive: bool = True  # scale to the gradient of the reconstruction at the encoder's last layer
    channels: Literal["low", "all"] | Count = "low"  # or the first so many
    target: Literal["features", "principal"] = "features"  # by a projector; or as many principal components, without


@dataclass(config=STRICT)
class AdversarialConfig:
    weight: Weight = 0.0
    start_step: Step = 5_000
    channels: Count = 64
    num_layers: Halvings = 3  # of stride 2; patches of 70 pixels
    adaptive: bool = True  # scale to the gradient of the reconstruction at the decoder's last layer
    max_weight: Weight = 10.0  # the most that the adaptive factor may be


@dataclass(config=STRICT)
class SpectrumMatchingConfig:
    """Brings the spectrum of the latents to that of the images; see `spectrum_matching_loss`. Published: 0.01, kl 0."""

    weight: Weight = 0.0
    delta: Weight = 1.0


@dataclass(config=STRICT)
class FrequencyMaskingConfig:
    """Cuts the high frequencies of latents and images; see `keep_low_frequencies`. Published: 0.75, blocks of 8."""

    probability: Probability = 0.0  # of a batch
    latent_block: Literal[4, 8] = 8  # side of the blocks of the latents, of which 4 loses more; of images it is 8


@dataclass(config=STRICT)
class PrefixConfig:
    """Decodes the first channels alone, so that the first hold the most (DC-AE 1.5, arXiv 2508.00413)."""

    probability: Probability = 0.0  # of an image
    widths: Annotated[list[Count], Field(min_length=1)] | None = None  # how many channels may be kept


@dataclass(config=STRICT)
class RateConfig:
    """The weight of the bits per pixel of a `HyperpriorModelFA`, which keeps them near a target (HiFiC, 2020)."""

    target: Weight = 0.14  # bits per pixel, of rounded latents
    weight: Weight = 5e-2  # while there are more; published 2, relative to a squared error 38 times as large as ours
    weight_below: Weight = 1.6e-3  # while there are fewer; published 1/16


@dataclass(config=STRICT)
class TokenizerLossConfig:
    reconstruction: Literal["l1", "l2", "none"] = "l1"  # "none": the other losses alone
    mask: Weight = 0.0  # of the same distance where there is fine detail; see `detail_mask`
    ssim: Weight = 0.0  # of 1 - SSIM
    distillation: Weight = 0.0  # of the distance to the teacher's reconstruction
    latents: Weight = 1.0  # of the distance of the model's latents to the teacher's, if the encoder learns
    reencoding: Weight = 0.0  # of the distance of the latents to those that the teacher gives for what is decoded
    kl: Weight = 1e-6  # for models with a posterior
    commitment: Weight = 1.0  # for models with a codebook
    rate: RateConfig = field(default_factory=RateConfig)  # for models that are written to files
    perceptual: Weight = 0.0  # LPIPS on VGG16
    perceptual_weights: Text | None = None  # a local file with torchvision's VGG16
    focal_frequency: FocalFrequencyConfig = field(default_factory=FocalFrequencyConfig)
    spectrum: SpectrumConfig = field(default_factory=SpectrumConfig)
    band: BandConfig = field(default_factory=BandConfig)
    stft: STFTConfig = field(default_factory=STFTConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    scale_equivariance: Weight = 0.0  # of the reconstruction error of the half-size latent
    latent_noise: Weight = 0.0  # tau: each image's latents get noise of std |N(0, tau^2)| before they are decoded
    high_dropout: Probability = 0.0  # how often the high latents of an image are zero
    high_dropout_target: Literal["low_pass", "image"] = "low_pass"  # "image": arXiv 2609.39222, there 0.4
    high_noise: Weight = 0.0  # s: the high latents of an image get noise of std U(0, s); arXiv 2609.39222, there 0.8
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    equivariance: Probability = 0.0  # how often latents and target are smaller and turned (EQ-VAE, there 0.5)
    spectrum_matching: SpectrumMatchingConfig = field(default_factory=SpectrumMatchingConfig)
    frequency_masking: FrequencyMaskingConfig = field(default_factory=FrequencyMaskingConfig)

    def __post_init__(self):
        if self.prefix.probability and self.prefix.widths is None:
            raise ConfigError("loss.prefix.probability needs loss.prefix.widths: numbers of channels that may be kept")
        others = self.ssim or self.perceptual or self.mask
        if self.reconstruction == "none" and self.has_adaptive_weights and not others:
            raise ConfigError(
                "loss.reconstruction=none without loss.ssim, loss.perceptual and loss.mask leaves nothing that the "
                "adaptive weights of loss.alignment and loss.adversarial can refer to"
            )

    @property
    def trains_decoder(self) -> bool:
        """Whether a loss compares what is decoded, from the first step that these losses hold for."""
        weights = [self.mask, self.ssim, self.distillation, self.reencoding, self.perceptual, self.scale_equivariance]
        weights += [section.weight for section in (self.focal_frequency, self.spectrum, self.band, self.stft)]
        judged = self.adversarial.weight > 0 and self.adversarial.start_step == 0
        return self.reconstruction != "none" or judged or any(weights)

    @property
    def has_adaptive_weights(self) -> bool:
        """Whether a weight follows the gradients of two losses, which are then computed before the backward pass."""
        return any(section.weight and section.adaptive for section in (self.alignment, self.adversarial))

    @property
    def shaping_latents(self) -> dict[str, float]:
        """The settings that shape continuous latents as the model learns them, by their keys."""
        return {
            "prefix.probability": self.prefix.probability,
            "equivariance": self.equivariance,
            "scale_equivariance": self.scale_equivariance,
            "spectrum_matching.weight": self.spectrum_matching.weight,
            "frequency_masking.probability": self.frequency_masking.probability,
        }

    @property
    def smallest_scale(self) -> float:
        """How small an image is, relative to train.resolution, that the losses compare."""
        return SMALLEST_SCALE if self.equivariance else 1.0

    @property
    def fixed_settings(self) -> dict[str, Any]:
        """The settings that networks are built with, which therefore hold for the whole run, by their keys."""
        fixed = {
            "perceptual_weights": self.perceptual_weights,
            "alignment.backbone": self.alignment.backbone,
            "alignment.weights": self.alignment.weights,
            "alignment.channels": self.alignment.channels,
            "alignment.target": self.alignment.target,
            "adversarial.channels": self.adversarial.channels,
            "adversarial.num_layers": self.adversarial.num_layers,
        }
        for name, section in (("spectrum", self.spectrum), ("stft", self.stft)):
            fixed |= {f"{name}.{key}": value for key, value in vars(section).items() if key != "weight"}
        return fixed
