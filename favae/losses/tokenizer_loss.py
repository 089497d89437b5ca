"""The weighted sum a tokenizer is trained on, every term by name."""

from dataclasses import dataclass, field

from diffusers.models.autoencoders.vae import Decoder, DiagonalGaussianDistribution, Encoder
from torch import Tensor, nn

from favae.foundation import FoundationModel
from favae.losses.adversarial import PatchDiscriminator, adaptive_weight, adversarial_loss
from favae.losses.alignment import vision_foundation_alignment
from favae.losses.perceptual import LPIPS


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
class TokenizerLossConfig:
    reconstruction: str = "l1"  # or "l2"
    kl: float = 1e-6
    perceptual: float = 0.0  # LPIPS on VGG16
    perceptual_weights: str | None = None  # a local file with torchvision's VGG16
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)

    def __post_init__(self):
        if self.reconstruction not in ("l1", "l2"):
            raise ValueError(f"loss.reconstruction must be l1 or l2, got {self.reconstruction}")
        weights = {"kl": self.kl, "perceptual": self.perceptual}
        weights |= {"alignment.weight": self.alignment.weight, "adversarial.weight": self.adversarial.weight}
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"loss.{name} must be at least 0, got {value}")


class TokenizerLoss(nn.Module):
    """L = reconstruction + w_p LPIPS + w_kl KL + w_a a alignment + w_g g adversarial.

    Terms of weight 0 are not computed; a and g are adaptive (see `adaptive_weight`) or 1. Everything is per element of
    the image: reconstruction is the mean of |x - x'| or (x - x')^2, and KL is the sum over the latent divided by 3HW.
    That is the published sum per image divided by 3HW throughout, so published weights keep their meaning.

    Args:
        config: weights and settings.
        vae: the model trained, for the layers that adaptive weights look at.
        foundation, lpips: frozen networks, needed if their weight is not 0.

    Source: VA-VAE (arXiv 2501.01423) after VQGAN and LDM.
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
        self._last_layers = [m.conv_out.weight for m in vae.modules() if isinstance(m, Decoder)]
        self._latent_layers = [m.conv_out.weight for m in vae.modules() if isinstance(m, Encoder)]

    def forward(
        self,
        images: Tensor,
        reconstruction: Tensor,
        moments: Tensor,
        projected: Tensor | None = None,
        discriminator: PatchDiscriminator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            images, reconstruction: (B, 3, H, W), images in [-1, 1].
            moments: (B, 2C, h, w), mean and logvar of the posterior.
            projected: (B, F, h, w), latents in the space of the foundation model's features.
            discriminator: judges the reconstruction; None before its start step.
        Returns:
            The total, and each term before weighting, detached, with the factors that adaptive weights came to.
        """
        config = self.config
        images, reconstruction = images.float(), reconstruction.float()
        error = reconstruction - images
        terms = {"reconstruction": error.abs().mean() if config.reconstruction == "l1" else error.square().mean()}
        total = terms["reconstruction"]
        if config.perceptual:
            terms["perceptual"] = self.lpips(reconstruction, images).mean()
            total = total + config.perceptual * terms["perceptual"]
        fidelity = total

        if config.kl:
            posterior = DiagonalGaussianDistribution(moments.float())
            terms["kl"] = posterior.kl().mean() / images[0].numel()
            total = total + config.kl * terms["kl"]

        alignment = config.alignment
        if alignment.weight:
            features = self.foundation(images, tuple(projected.shape[-2:]))
            value = vision_foundation_alignment(
                projected,
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
            value = adversarial_loss(discriminator(reconstruction))
            scale = adversarial.weight
            if adversarial.adaptive:
                terms["adversarial_scale"] = adaptive_weight(fidelity, value, self._last_layers, adversarial.max_weight)
                scale = scale * terms["adversarial_scale"]
            terms["adversarial"] = value
            total = total + scale * value

        return total, {name: value.detach() for name, value in terms.items()}


class TokenizerTrainee(nn.Module):
    """What one optimiser trains: the autoencoder and the projection that alignment needs, in one forward pass.

    One module, because DistributedDataParallel synchronises the gradients of what runs inside its own forward only.

    Args:
        vae: an `AutoencoderKL`, ours or stock.
        feature_channels: channels of the foundation model's features; None without alignment.
    """

    def __init__(self, vae: nn.Module, feature_channels: int | None = None):
        super().__init__()
        self.vae = vae
        self.aligned_channels = getattr(vae, "low_latent_channels", vae.config.latent_channels)
        self.projection = None
        if feature_channels is not None:
            self.projection = nn.Conv2d(self.aligned_channels, feature_channels, 1, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, 3, H, W) -> reconstruction of a posterior sample, moments (B, 2C, h, w), projected latents or None."""
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        projected = None if self.projection is None else self.projection(latents[:, : self.aligned_channels])
        return self.vae.decode(latents).sample, posterior.parameters, projected
