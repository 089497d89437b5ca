"""One forward pass of the tokenizer in training, with everything in it that needs the model's own features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.losses.tokenizer_loss import TokenizerLossConfig, TokenizerOutput
from favae.models.frequency_complement import FeatureRecorder
from favae.models.vq_model_fa import VQModelFA

USAGE_DECAY = 0.99  # codebook statistics are over the last hundred batches or so


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
            self.register_buffer("code_counts", torch.zeros(vae.num_tokens), persistent=False)

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
        if self.spectrum is None:
            return self._reconstruct(images)[0]
        with FeatureRecorder(self.vae.branches) as recorder:
            output, latents = self._reconstruct(images)
        complements, activations = recorder.pairs(latents)
        if self.config.spectrum.detach_encoder:
            activations = [activation.detach() for activation in activations]
        output.terms["spectrum"] = self.spectrum(complements, activations)
        for i, sigma in enumerate(self.spectrum.sigma):
            output.statistics[f"sigma_{i}"] = sigma
        return output

    def _reconstruct(self, images: Tensor) -> tuple[TokenizerOutput, Tensor]:
        """The output without spectrum loss, and the latents before noise or quantisation."""
        output = TokenizerOutput(images, images)
        if isinstance(self.vae, VQModelFA):
            exact = self.vae.encode(images).latents
            quantized = self.vae.quantize(exact)
            latents = quantized.latents
            output.terms["commitment"] = quantized.loss
            output.statistics |= self._codebook_statistics(quantized.indices)
        else:
            posterior = self.vae.encode(images).latent_dist
            exact, latents = posterior.mean, posterior.sample()
            output.moments = posterior.parameters
        if self.projection is not None:
            output.projected = self.projection(latents[:, : self.aligned_channels])
        decoded = latents
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

    @torch.no_grad()
    def _codebook_statistics(self, indices: Tensor) -> dict[str, Tensor]:
        """How much of the codebook the last batches used, and with what perplexity (of its size, at most).

        Of the first codebook, for a residual quantiser; of this process's images, for several.
        """
        first = indices if indices.ndim == 3 else indices[..., 0]
        self.code_counts.mul_(USAGE_DECAY).add_(torch.bincount(first.flatten(), minlength=len(self.code_counts)))
        share = self.code_counts / self.code_counts.sum()
        return {
            "codebook_usage": (self.code_counts > USAGE_DECAY**100).float().mean(),
            "codebook_perplexity": torch.special.entr(share).sum().exp(),
        }
