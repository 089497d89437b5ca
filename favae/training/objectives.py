"""What a class-conditional generator learns: velocities by flow matching, or noise by denoising diffusion."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from favae.losses.denoising import denoising_loss
from favae.losses.flow_matching import FlowMatchingConfig, flow_matching_loss, interpolate, sample_times
from favae.pipelines.pipeline_lightningdit import num_classes, time_scale

# The schedule of ADM and DiT; `DiTPipeline`'s schedulers have it too.
DIFFUSION = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@dataclass
class GeneratorLossConfig(FlowMatchingConfig):
    objective: str = (
        "flow_matching"  # or "ddpm", of a DiTTransformer2DModel: noise, and a variance with 2C channels out
    )

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in ("flow_matching", "ddpm"):
            raise ValueError(f"loss.objective must be flow_matching or ddpm, got {self.objective}")


class Objective:
    """The loss of a batch of latents.

    diffusers' DiT embeds the class anew in each block, and would drop it in each for itself: labels are dropped here,
    once, with its probability.

    Args:
        config: of the loss.
        transformer: unwrapped; its own dropping of labels is switched off if it is a DiT.
    """

    def __init__(self, config: GeneratorLossConfig, transformer: ModelMixin):
        self.config = config
        self.null_class, self.time_scale = num_classes(transformer), time_scale(transformer)
        self.scheduler = DDPMScheduler(**DIFFUSION)
        self.class_dropout = 0.0
        if self.time_scale != 1:
            for module in transformer.modules():
                if isinstance(module, LabelEmbedding):
                    self.class_dropout, module.dropout_prob = max(self.class_dropout, module.dropout_prob), 0.0

    def __call__(self, model: nn.Module, latents: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            model: the transformer as it is trained, wrapped or not.
            latents: (B, C, h, w), normalised. labels: (B,), int64.
        Returns:
            The total, and each term, detached.
        """
        if self.class_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.class_dropout
            labels = torch.where(dropped, self.null_class, labels)
        noise = torch.randn_like(latents)
        if self.config.objective == "ddpm":
            timesteps = torch.randint(len(self.scheduler), (len(latents),), device=latents.device)
            noisy = self.scheduler.add_noise(latents, noise, timesteps)
            output = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)[0]
            return denoising_loss(output, latents, noise, timesteps, self.scheduler)
        times = sample_times(len(labels), self.config.time_sampling, latents.device)
        noisy, velocity = interpolate(latents, noise, times)
        times = times * self.time_scale
        prediction = model(noisy, timestep=times, class_labels=labels, return_dict=False)[0]
        return flow_matching_loss(prediction, velocity, cosine_weight=self.config.cosine_weight)
