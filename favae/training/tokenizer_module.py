"""The module that trains a tokenizer: the autoencoder, all of its losses, and the frozen networks they look at."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import reduce
from diffusers import ModelMixin
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny, DiagonalGaussianDistribution, Encoder
from torch import Tensor, nn

from favae.autoencoders import decode, encode, encode_moments
from favae.errors import ConfigError
from favae.foundation import FoundationModel
from favae.losses.adversarial import adaptive_weight, adversarial_loss
from favae.losses.alignment import PrincipalComponents, vision_foundation_alignment
from favae.losses.frequency import SpectrumLoss, band_loss, detail_mask, focal_frequency_loss
from favae.losses.latent_spectra import spectrum_matching_loss
from favae.losses.perceptual import LPIPS
from favae.losses.stft import ssim_loss
from favae.models.autoencoder_tiny_fa import TinyDecoder
from favae.models.frequency_complement import FeatureRecorder
from favae.models.hyperprior_model_fa import HiFiCEncoder, HiFiCGenerator, HyperpriorModelFA
from favae.models.vq_model_fa import VQModelFA
from favae.normalization import MIN_LOGVAR, normalize_latents
from favae.precision import no_autocast
from favae.training.latent_regularization import add_noise, regularize
from favae.training.tokenizer_losses import TokenizerLossConfig

STATISTICS_WINDOW = 100  # batches that the codebook statistics look back on
NETWORKS = (Encoder, Decoder, HiFiCEncoder, HiFiCGenerator)  # whose last layer is `conv_out`
MAX_ALIGNMENT_FACTOR = 10.0  # the most that the adaptive factor of the alignment may be

Discriminator = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, 1, h, w)
Terms = dict[str, tuple[Tensor | float, Tensor]]  # by name, the weight and the value of a loss


class Autoencoding(NamedTuple):
    """What one pass through the autoencoder gives the losses.

    Attributes:
        reconstruction: (B, C, H, W), or smaller with the equivariance.
        target: what it should be, of the same shape: the images, or what `regularize` made of them.
        latents: (B, C', h, w), a sample of the posterior, codebook vectors, or rounded.
        moments: (B, 2C', h, w), mean and log-variance of the posterior; None without one.
        terms: losses that need the inside of the model.
        statistics: scalars to log besides the losses.
    """

    reconstruction: Tensor
    target: Tensor
    latents: Tensor
    moments: Tensor | None
    terms: Terms
    statistics: dict[str, Tensor]


class TokenizerTrainingModule(nn.Module):
    """An autoencoder with everything that its training computes. This is what DistributedDataParallel wraps.

    L = reconstruction + w_s (1 - SSIM) + w_p LPIPS + frequency losses + w_kl KL + w_a a alignment + w_g g adversarial

    Losses of weight 0 are not computed; a and g are adaptive (see `adaptive_weight`) or 1. Everything is per element of
    the image: reconstruction is the mean of |x - x'| or (x - x')^2, and KL is the sum over the latent divided by CHW.
    That is the published sum per image divided by CHW throughout, so published weights keep their meaning. In place of
    KL, a codebook has the commitment loss, and a compression model its bits per pixel (see `RateConfig`). Images are
    gray, RGB or RGBA: LPIPS, alignment and the discriminator see them `in_color`, the other losses have all channels.

    Scale equivariance, |D(z/2) - x/2|, where /2 halves the size, decodes a second time (Skorokhodov et al., 2025, arXiv
    2502.14831). Other losses change what is decoded, and perhaps the target (see `regularize`): latent noise of std
    |N(0, tau^2)|, one draw per image (RAE, arXiv 2510.11690), dropout and noise of the high latents, prefixes of the
    channels, smaller and turned latents, latents without high frequencies.

    With a latent teacher, its latents are decoded, so that the model becomes another decoder for them; an encoder that
    learns is trained by the distance of its latents to them, separately.

    Args:
        vae: an `AutoencoderKL`, ours or stock, a `VQModelFA` or a `HyperpriorModelFA`; with a latent teacher, any
            autoencoder.
        stages: the losses of every stage of the training, which say what has to be built.
        teacher: whose features latents are aligned to; needed if a stage has an alignment weight.
        lpips: needed if a stage has a perceptual weight.
        latent_teacher: any autoencoder whose latents have the shape of the model's; it stays as it is.
        posterior: which latents of it are decoded.
        normalize: whether they are as generators see them.

    Source: VA-VAE (arXiv 2501.01423) after VQGAN and LDM; frequency losses: Lin et al., CVPR 2023.
    """

    def __init__(
        self,
        vae: ModelMixin,
        stages: Sequence[TokenizerLossConfig],
        teacher: FoundationModel | None = None,
        lpips: LPIPS | None = None,
        latent_teacher: ModelMixin | None = None,
        posterior: Literal["sample", "mode"] = "sample",
        normalize: bool = False,
    ):
        super().__init__()
        first = stages[0]
        self.latent_teacher, self.posterior, self.normalize = latent_teacher, posterior, normalize
        if latent_teacher is not None:
            latent_teacher.requires_grad_(False).eval()
        self.trains_encoder = any(parameter.requires_grad for parameter in vae.encoder.parameters())
        self.vae: ModelMixin = vae
        self.teacher, self.lpips = teacher, lpips
        self.stft = first.stft.build()
        channels = vae.config.latent_channels
        self.low_channels: int = getattr(vae, "low_latent_channels", channels)
        self.has_posterior = vae.config.get("latent_norm") is None
        aligned = first.alignment.channels
        self.aligned_channels = (
            {"low": self.low_channels, "all": channels}[aligned] if isinstance(aligned, str) else aligned
        )
        self.projector: nn.Conv2d | None = None
        self.principal: PrincipalComponents | None = None
        self.spectrum: SpectrumLoss | None = None
        self.codebook_statistics: CodebookStatistics | None = None
        if teacher is not None and first.alignment.target == "principal":
            if self.aligned_channels > teacher.channels:
                raise ConfigError(
                    f"loss.alignment.target=principal has {teacher.channels} components with this backbone, fewer than "
                    f"the {self.aligned_channels} channels; loss.alignment.channels takes fewer"
                )
            self.principal = PrincipalComponents(teacher.channels, self.aligned_channels)
        elif teacher is not None:
            self.projector = nn.Conv2d(self.aligned_channels, teacher.channels, 1, bias=False)
        if any(losses.spectrum.weight for losses in stages):
            if not vae.compared_modules:
                raise ConfigError("loss.spectrum.weight needs model.frequency_complement, which this model has not")
            self.spectrum = first.spectrum.build(len(vae.compared_modules))
            self.sigma_learning_rate = first.spectrum.learning_rate
        if isinstance(vae, VQModelFA):
            self.codebook_statistics = CodebookStatistics(vae.num_tokens)

    def train(self, mode: bool = True):
        """The teacher and parts that learn nothing stay in eval mode."""
        super().train(mode)
        for part in self.vae.children():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
        if self.latent_teacher is not None:
            self.latent_teacher.eval()
        return self

    def parameter_groups(self) -> list[dict]:
        """What an optimizer trains: learned sigmas have a learning rate of their own and no weight decay."""
        sigmas = [] if self.spectrum is None else list(self.spectrum.parameters())
        is_sigma = {id(sigma) for sigma in sigmas}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in is_sigma]
        groups: list[dict] = [{"params": others}]
        if sigmas:
            groups.append({"params": sigmas, "lr": self.sigma_learning_rate, "weight_decay": 0.0})
        return groups

    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name: all that have a state, but for the frozen networks."""
        parts = {
            "tokenizer": self.vae,
            "projector": self.projector,
            "principal": self.principal,
            "spectrum": self.spectrum,
            "codebook_statistics": self.codebook_statistics,
        }
        return {name: part for name, part in parts.items() if part is not None and part.state_dict()}

    def forward(
        self,
        images: Tensor,
        losses: TokenizerLossConfig,
        discriminator: Discriminator | None = None,
        teacher_moments: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
        """One pass through the autoencoder and all losses of this step.

        Args:
            images: (B, C, H, W) in [-1, 1].
            losses: of the stage that this step belongs to.
            discriminator: judges the reconstruction, and is not trained by it; None before it takes part.
            teacher_moments: (B, 2C', h, w), of the latent teacher's posteriors; None lets it encode the images.
        Returns:
            The total loss; each loss before weighting, with the adaptive factors and statistics, detached; the
            reconstruction and what it should be, (B, C, H, W) float32.
        """
        # 1. Through the autoencoder, in mixed precision if autocast is on.
        passed = self._autoencode(images, losses, teacher_moments)

        # 2. The losses, in float32, but for what the discriminator computes. The adaptive weights refer to `fidelity`:
        # as published, without frequency losses.
        with no_autocast(images.device):
            images, reconstruction, target = images.float(), passed.reconstruction.float(), passed.target.float()
            terms = self._fidelity_terms(reconstruction, target, losses)
            fidelity = _total(terms, like=reconstruction)
            terms |= self._frequency_terms(reconstruction, target, losses)
            terms |= passed.terms
            if losses.kl and passed.moments is not None and self.has_posterior:
                divergence = DiagonalGaussianDistribution(passed.moments.float()).kl()
                terms["kl"] = losses.kl, divergence.mean() / images[0].numel()
            factors = {}
            if self.teacher is not None and losses.alignment.weight:
                aligned = passed.latents[:, : self.aligned_channels].float()
                features = self.teacher(images, tuple(aligned.shape[-2:]))
                if self.projector is not None:
                    aligned = self.projector(aligned)
                if self.principal is not None:
                    features = self.principal(features)
                factor, value = self._alignment(aligned, features, fidelity, losses)
                terms["alignment"], factors["alignment_scale"] = (losses.alignment.weight * factor, value), factor
            if discriminator is not None:
                factor, value = self._adversarial(reconstruction, discriminator, fidelity, losses)
                terms["adversarial"], factors["adversarial_scale"] = (losses.adversarial.weight * factor, value), factor
            loss = _total(terms, like=reconstruction) + self._idle(losses)

        # 3. What the log shows.
        logs = {name: value.detach() for name, (_, value) in terms.items()}
        logs |= {name: factor for name, factor in factors.items() if isinstance(factor, Tensor)}
        return loss, logs | passed.statistics, reconstruction, target

    # The autoencoder --------------------------------------------------------------------------------------------------

    def _autoencode(self, images: Tensor, losses: TokenizerLossConfig, teacher_moments: Tensor | None) -> Autoencoding:
        if self.latent_teacher is not None:
            return self._decode_teacher_latents(self.latent_teacher, images, losses, teacher_moments)
        terms: Terms = {}
        statistics: dict[str, Tensor] = {}
        recorder = None
        if self.spectrum is not None and losses.spectrum.weight:
            recorder = FeatureRecorder(self.vae.compared_modules)
        with recorder or contextlib.nullcontext():
            # 1. Encode.
            if isinstance(self.vae, HyperpriorModelFA):
                rated = self.vae.quantize(self.vae.encode(images).latents)
                latents, moments, pixels = rated.latents, None, images[0, 0].numel()
                statistics["bits_per_pixel"] = rated.rounded_bits.mean() / pixels
                above = statistics["bits_per_pixel"] > losses.rate.target
                weight = torch.where(above, losses.rate.weight, losses.rate.weight_below)
                terms["rate"] = weight, rated.bits.mean() / pixels
            elif self.codebook_statistics is not None:
                quantized = self.vae.quantize(self.vae.encode(images).latents)
                latents, moments = quantized.latents, None
                terms["commitment"] = losses.commitment, quantized.loss
                statistics |= self.codebook_statistics(quantized.indices)
            else:
                posterior = getattr(self.vae.encode(images), "latent_dist", None)
                if posterior is None:
                    raise ConfigError(f"model.name: a {type(self.vae).__name__} gives no distribution of latents")
                latents, moments = posterior.sample(), posterior.parameters

            # 2. Regularize what is decoded.
            low_pass = getattr(self.vae, "low_pass", None)
            decoded, target = regularize(latents, images, losses, low_channels=self.low_channels, low_pass=low_pass)

            # 3. Decode.
            reconstruction = self._decode(decoded)

        # 4. The losses that need the inside of the model.
        if self.spectrum is not None and recorder is not None:
            terms["spectrum"] = losses.spectrum.weight, self.spectrum(*recorder.pairs())
            if losses.spectrum.type == "dynamic":
                statistics |= {f"sigma_{i}": sigma.detach() for i, sigma in enumerate(self.spectrum.sigma)}
        if losses.spectrum_matching.weight:
            value = spectrum_matching_loss(latents, images, delta=losses.spectrum_matching.delta)
            terms["spectrum_matching"] = losses.spectrum_matching.weight, value
        if losses.scale_equivariance:
            half = self._decode(F.interpolate(latents, scale_factor=0.5, mode="area"))
            half_target = F.interpolate(images, size=half.shape[-2:], mode="area")
            terms["scale_equivariance"] = losses.scale_equivariance, (half.float() - half_target).abs().mean()
        return Autoencoding(reconstruction, target, latents, moments, terms, statistics)

    def _decode_teacher_latents(
        self, teacher: ModelMixin, images: Tensor, losses: TokenizerLossConfig, moments: Tensor | None
    ) -> Autoencoding:
        terms: Terms = {}
        with torch.no_grad():
            moments = encode_moments(teacher, images) if moments is None else moments
            posterior = DiagonalGaussianDistribution(moments.float())
            raw = posterior.sample() if self.posterior == "sample" else posterior.mode()
            latents = self._normalized(teacher, raw)
        if self.trains_encoder:
            own = DiagonalGaussianDistribution(encode_moments(self.vae, images).float())
            mean = self._normalized(teacher, posterior.mean)
            distance = (own.mean - mean).square().mean()
            if all((each.logvar > MIN_LOGVAR).any() for each in (own, posterior)):  # both have a posterior
                std = self._normalized(teacher, posterior.mean + posterior.std) - mean
                distance = distance + (own.std - std).square().mean()
            terms["latents"] = losses.latents, distance
        reconstruction = self._decode(add_noise(latents, losses.latent_noise))
        if losses.distillation:
            with torch.no_grad():
                taught = decode(teacher, raw)
            terms["distillation"] = losses.distillation, _distance(reconstruction.float(), taught, losses)
        if losses.reencoding:
            again = self._normalized(teacher, encode(teacher, reconstruction)).float()
            distance = (again - self._normalized(teacher, posterior.mean)).abs().mean()
            terms["reencoding"] = losses.reencoding, distance
        return Autoencoding(reconstruction, images, latents, None, terms, {})

    def _normalized(self, teacher: ModelMixin, latents: Tensor) -> Tensor:
        return normalize_latents(teacher, latents) if self.normalize else latents

    @torch.no_grad()
    def latents_of(self, vae: ModelMixin, images: Tensor) -> Tensor:
        """What the model decodes: the latent teacher's latents of images (B, C, H, W) in [-1, 1], or those of `vae`."""
        if self.latent_teacher is None:
            return encode(vae, images)
        return self._normalized(self.latent_teacher, encode(self.latent_teacher, images))

    def _decode(self, latents: Tensor) -> Tensor:
        options = {"force_not_quantize": True} if hasattr(self.vae, "quantize") else {}
        return self.vae.decode(latents, **options).sample

    # The losses -------------------------------------------------------------------------------------------------------

    def _fidelity_terms(self, reconstruction: Tensor, target: Tensor, losses: TokenizerLossConfig) -> Terms:
        terms: Terms = {}
        if losses.reconstruction != "none":
            terms["reconstruction"] = 1.0, _distance(reconstruction, target, losses)
        if losses.mask:
            terms["mask"] = losses.mask, (_error(reconstruction, target, losses) * detail_mask(target)).mean()
        if losses.ssim:
            terms["ssim"] = losses.ssim, ssim_loss(reconstruction, target)
        if self.lpips is not None and losses.perceptual:
            terms["perceptual"] = losses.perceptual, self.lpips(reconstruction, target).mean()
        return terms

    def _frequency_terms(self, reconstruction: Tensor, target: Tensor, losses: TokenizerLossConfig) -> Terms:
        focal, band, stft = losses.focal_frequency, losses.band, losses.stft
        terms: Terms = {}
        if focal.weight:
            terms["focal_frequency"] = focal.weight, focal_frequency_loss(reconstruction, target, alpha=focal.alpha)
        if band.weight:
            value = band_loss(reconstruction, target, weights=band.weights, levels=band.levels, wavelet=band.wavelet)
            terms["band"] = band.weight, value
        if stft.weight:
            terms["stft"] = stft.weight, self.stft(reconstruction, target)
        return terms

    def _alignment(
        self, projected: Tensor, features: Tensor, fidelity: Tensor, losses: TokenizerLossConfig
    ) -> tuple[Tensor | float, Tensor]:
        """The adaptive factor and the loss."""
        settings = losses.alignment
        value = vision_foundation_alignment(
            projected, features, distmat_margin=settings.distmat_margin, cosine_margin=settings.cosine_margin
        )
        if not settings.adaptive:
            return 1.0, value
        return adaptive_weight(fidelity, value, last_layers(self.vae.encoder), MAX_ALIGNMENT_FACTOR), value

    def _adversarial(
        self, reconstruction: Tensor, discriminator: Discriminator, fidelity: Tensor, losses: TokenizerLossConfig
    ) -> tuple[Tensor | float, Tensor]:
        """The adaptive factor and the loss."""
        settings = losses.adversarial
        value = adversarial_loss(discriminator(reconstruction))
        if not settings.adaptive:
            return 1.0, value
        return adaptive_weight(fidelity, value, last_layers(self.vae.decoder), settings.max_weight), value

    def _idle(self, losses: TokenizerLossConfig) -> Tensor | float:
        """Zero, with a gradient to every parameter this stage does not use: DistributedDataParallel waits for each."""
        idle: list[Tensor] = []
        if self.projector is not None and not losses.alignment.weight:
            idle += self.projector.parameters()
        if self.spectrum is not None and not losses.spectrum.weight:
            idle += self.spectrum.parameters()
        return 0 * torch.stack([parameter.sum() for parameter in idle]).sum() if idle else 0.0


def _error(reconstruction: Tensor, target: Tensor, losses: TokenizerLossConfig) -> Tensor:
    error = reconstruction - target
    return error.square() if losses.reconstruction == "l2" else error.abs()


def _distance(reconstruction: Tensor, target: Tensor, losses: TokenizerLossConfig) -> Tensor:
    return _error(reconstruction, target, losses).mean()


def last_layers(network: nn.Module) -> list[Tensor]:
    """The weights that give latents, an image or its bands, which adaptive loss weights look at.

    Raises:
        ConfigError: for a network whose last layer is not known.
    """
    named = [module.conv_out.weight for module in network.modules() if isinstance(module, NETWORKS)]
    branches = [network.layers, network.high_layers] if isinstance(network, TinyDecoder) else []
    branches += [network.layers] if isinstance(network, DecoderTiny) else []
    weights = named + [layers[-1].weight for layers in branches if layers]
    if not weights:
        raise ConfigError(f"the last layer of a {type(network).__name__} is not known: set adaptive=false in loss")
    return weights


def _total(terms: Terms, like: Tensor) -> Tensor:
    return sum((weight * value for weight, value in terms.values()), start=like.new_zeros(()))


class CodebookStatistics(nn.Module):
    """How the entries of a codebook are used, by the images of all processes: of the first one, for a residual
    quantizer; of those of all bands together."""

    counts: Tensor  # a moving sum of the uses of each entry
    unused: Tensor  # batches since the last use of each entry

    def __init__(self, num_tokens: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_tokens))
        self.register_buffer("unused", torch.full((num_tokens,), STATISTICS_WINDOW))

    @torch.no_grad()
    def forward(self, indices: Tensor) -> dict[str, Tensor]:
        """
        Args:
            indices: (B, h, w), (B, h, w, Q) or (B, N), of one more batch.
        Returns:
            "codebook_usage", the share of entries used in the last hundred batches, and "codebook_perplexity", the
            exponential of the entropy of how often each entry was used in about as many batches.
        """
        first = indices[..., 0] if indices.ndim == 4 else indices
        batch = reduce(torch.bincount(first.flatten(), minlength=len(self.counts)), "sum")
        self.counts.mul_(1 - 1 / STATISTICS_WINDOW).add_(batch)
        self.unused.add_(1).masked_fill_(batch > 0, 0)
        return {
            "codebook_usage": self.unused.lt(STATISTICS_WINDOW).float().mean(),
            "codebook_perplexity": torch.special.entr(self.counts / self.counts.sum()).sum().exp(),
        }
