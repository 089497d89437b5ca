"""One forward pass of the tokenizer in training, with everything in it that needs the model's own features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.losses.tokenizer_loss import TokenizerLossConfig, TokenizerOutput
from favae.models.frequency_complement import FeatureRecorder
from favae.models.vq_model_fa import VQModelFA

RECENT = 100  # batches that codebook statistics look back on


class TokenizerTrainee(nn.Module):
    """What one optimiser trains: the autoencoder, the projection that alignment needs, and the spectrum loss's sigmas.

    One module, because DistributedDataParallel synchronises the gradients of what runs inside its own forward only.
    Besides the spectrum loss it computes what changes the forward pass itself:

    - scale equivariance, |D(z/2) - x/2|, where /2 halves the size. Source: Skorokhodov et al., 2025 (arXiv 2502.14831);
    - latent noise of deviation |N(0, tau^2)|, one draw per image, on what is decoded. Source: Zheng et al., 2025 (RAE,
      arXiv 2510.11690);
    - high dropout: with this probability, per image, the high latents are zero and the target is the low-pass image.

    Args:
        vae: an `AutoencoderKL`, ours or stock, or a `VQModelFA`.
        losses: of each stage of the training, of which the first is used; `config` may be replaced by another one of
            them between steps.
        feature_channels: channels of the foundation model's features; None without alignment.
    """

    def __init__(
        self,
        vae: nn.Module,
        losses: Sequence[TokenizerLossConfig] = (TokenizerLossConfig(),),
        feature_channels: int | None = None,
    ):
        super().__init__()
        self.vae = vae
        self.config = losses[0]
        self.aligned_channels = getattr(vae, "low_latent_channels", vae.config.latent_channels)
        self.projection = self.spectrum = None
        if feature_channels is not None:
            self.projection = nn.Conv2d(self.aligned_channels, feature_channels, 1, bias=False)
        if any(loss.spectrum.weight for loss in losses):
            self.spectrum = self.config.spectrum.build(FeatureRecorder.LEVELS * len(vae.branches))
        if isinstance(vae, VQModelFA):
            self.codebook_statistics = CodebookStatistics(vae.num_tokens)

    def parameter_groups(self) -> list[dict]:
        """What wants gradients, for an optimiser: the sigmas on their own, with a rate of their own and no decay."""
        sigmas = [p for name, p in self.named_parameters() if name == "spectrum.rho"]
        others = [p for name, p in self.named_parameters() if name != "spectrum.rho" and p.requires_grad]
        groups = [{"params": others}]
        if sigmas:
            groups.append({"params": sigmas, "lr": self.config.spectrum.learning_rate, "weight_decay": 0.0})
        return groups

    def forward(self, images: Tensor) -> TokenizerOutput:
        """(B, 3, H, W) in [-1, 1], with gradients."""
        config, idle = self.config, []
        if self.spectrum is not None and config.spectrum.weight:
            with FeatureRecorder(self.vae.branches) as recorder:
                output, latents = self._reconstruct(images)
            complements, activations = recorder.pairs(latents)
            if config.spectrum.detach_encoder:
                activations = [activation.detach() for activation in activations]
            output.terms["spectrum"] = self.spectrum(complements, activations)
            if config.spectrum.kind == "dynamic":
                output.statistics |= {f"sigma_{i}": sigma for i, sigma in enumerate(self.spectrum.sigma)}
        else:
            output, latents = self._reconstruct(images)
            idle += [] if self.spectrum is None else self.spectrum.parameters()
        if self.projection is not None and config.alignment.weight:
            output.projected = self.projection(output.latents[:, : self.aligned_channels])
        else:
            idle += [] if self.projection is None else self.projection.parameters()
        if idle:  # what a stage does not use must have a gradient all the same, for DistributedDataParallel
            output.sample = output.sample + 0 * sum(parameter.sum() for parameter in idle)
        return output

    def _reconstruct(self, images: Tensor) -> tuple[TokenizerOutput, Tensor]:
        """The output without spectrum loss, and the latents before noise or quantisation."""
        output = TokenizerOutput(images, images)
        if isinstance(self.vae, VQModelFA):
            exact = self.vae.encode(images).latents
            quantized = self.vae.quantize(exact)
            latents = quantized.latents
            output.terms["commitment"] = quantized.loss
            output.statistics |= self.codebook_statistics(quantized.indices)
        else:
            posterior = self.vae.encode(images).latent_dist
            exact, latents = posterior.mean, posterior.sample()
            output.moments = posterior.parameters
        output.latents = decoded = latents
        if self.config.latent_noise:
            deviation = self.config.latent_noise * torch.randn(len(latents), 1, 1, 1, device=latents.device).abs()
            decoded = decoded + deviation * torch.randn_like(decoded)
        if self.config.high_dropout:
            dropped = torch.rand(len(images), 1, 1, 1, device=images.device) < self.config.high_dropout
            is_high = torch.arange(decoded.shape[1], device=images.device).view(1, -1, 1, 1) >= self.aligned_channels
            decoded = torch.where(dropped & is_high, 0, decoded)
            output.target = torch.where(dropped, self.vae.decoder.bands.low_pass(images), images)
        output.sample = self._decode(decoded)
        if self.config.scale_equivariance:
            half = self._decode(F.interpolate(latents, scale_factor=0.5, mode="area"))
            wanted = F.interpolate(images, size=half.shape[-2:], mode="area")
            output.terms["scale_equivariance"] = (half.float() - wanted).abs().mean()
        return output, exact

    def _decode(self, latents: Tensor) -> Tensor:
        quantized = {"force_not_quantize": True} if isinstance(self.vae, VQModelFA) else {}
        return self.vae.decode(latents, **quantized).sample


class CodebookStatistics(nn.Module):
    """How the entries of a codebook are used; of the first, for a residual quantiser; of this process's images."""

    def __init__(self, num_tokens: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_tokens))  # a moving sum
        self.register_buffer("unused", torch.full((num_tokens,), RECENT))  # batches since the last use

    @torch.no_grad()
    def forward(self, indices: Tensor) -> dict[str, Tensor]:
        """
        Args:
            indices: (B, h, w) or (B, h, w, Q), of one more batch.
        Returns:
            "codebook_usage", the share of entries used in the last hundred batches, and "codebook_perplexity", the
            exponential of the entropy of how often, of about as many batches.
        """
        first = indices if indices.ndim == 3 else indices[..., 0]
        batch = torch.bincount(first.flatten(), minlength=len(self.counts))
        self.counts.mul_(1 - 1 / RECENT).add_(batch)
        self.unused.add_(1).masked_fill_(batch > 0, 0)
        return {
            "codebook_usage": (self.unused < RECENT).float().mean(),
            "codebook_perplexity": torch.special.entr(self.counts / self.counts.sum()).sum().exp(),
        }
