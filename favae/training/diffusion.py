"""What a LightningDiT, DiT or UNet learns: velocities by flow matching, or noise by denoising diffusion."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from typing import Literal

import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from favae.foundation import FoundationModel
from favae.losses.alignment import representation_alignment
from favae.losses.denoising import denoising_loss
from favae.losses.flow_matching import flow_matching_loss, interpolate, sample_times
from favae.models.class_conditional import num_classes, time_scale
from favae.precision import no_autocast
from favae.ranges import Count, Probability, Shift, Step, Text, Weight
from favae.training.sharding import blocks_of
from favae.training.validation import STRICT

# The noise schedule of ADM and DiT; `DiTPipeline`'s schedulers have it too.
DIFFUSION_SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

Condition = dict[str, Tensor]  # of a transformer: its arguments for classes and texts


@dataclass(config=STRICT)
class RepresentationAlignmentConfig:
    """Hidden states pulled towards a teacher's features (REPA), through a 3 x 3 convolution (iREPA)."""

    weight: Weight = 0.0  # 0.5 as published
    backbone: Text = "vit_base_patch14_dinov2.lvd142m"  # any timm model, or "efficientnet-lite0"
    weights: Text | None = None  # a local file for the backbone
    layer: Count = 8  # the block whose output is aligned: 8 of 28 as published, 4 of 12
    stop_step: Step | None = None  # from which it is left out (HASTE, arXiv 2505.16792); None: never


@dataclass(config=STRICT)
class GeneratorLossConfig:
    objective: Literal["flow_matching", "ddpm"] = "flow_matching"  # "ddpm": noise; with 2C channels out a variance
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    time_shift: Shift = 1.0  # above 1, more noise in training; as sampling.shift
    cosine_weight: Weight = 1.0  # of the velocity's direction
    class_dropout_prob: Probability = 0.1  # of DiT and UNet2DModel; LightningDiT's is in `model`
    alignment: RepresentationAlignmentConfig = field(default_factory=RepresentationAlignmentConfig)


class DiffusionModule(nn.Module):
    """A LightningDiT, DiT or UNet with all that its training computes. This is what DistributedDataParallel wraps.

    diffusers' DiT embeds the class anew in each block, and would drop it in each for itself: labels are dropped here,
    once, and its own dropping is switched off.

    Args:
        transformer: a LightningDiT, a DiT, or a UNet2DModel, which is called so here.
        config: of the loss.
        teacher: whose features hidden states are aligned to; None without alignment.
    """

    def __init__(self, transformer: ModelMixin, config: GeneratorLossConfig, teacher: FoundationModel | None = None):
        super().__init__()
        self.transformer, self.config, self.teacher = transformer, config, teacher
        self.null_class, self.time_scale = num_classes(transformer), time_scale(transformer)
        self.scheduler = DDPMScheduler(**DIFFUSION_SCHEDULE)
        is_of_diffusers = isinstance(transformer, DiTTransformer2DModel | UNet2DModel)
        self.class_dropout = config.class_dropout_prob if is_of_diffusers else 0.0
        for module in transformer.modules() if is_of_diffusers else ():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        self.projector: nn.Conv2d | None = None
        if teacher is not None:
            shape = transformer.config
            self.grid = shape.sample_size // shape.patch_size
            dim = shape.num_attention_heads * shape.attention_head_dim
            self.projector = nn.Conv2d(dim, teacher.channels, 3, padding=1)

    def trained_parts(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name: all but the frozen network."""
        parts = {"transformer": self.transformer, "projector": self.projector}
        return {name: part for name, part in parts.items() if part is not None}

    def forward(self, latents: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            latents: (B, C, h, w), normalized.
            batch: "label" (B,), int64; for texts "text_embeddings" (B, L, D) and "text_mask" (B, L); and, if hidden
                states are to be aligned, "image" (B, 3, H, W) in [-1, 1].
        Returns:
            The total loss, and each loss before weighting, detached.
        """
        # 1. The condition. Some labels are dropped for classifier-free guidance; texts, by the transformer itself.
        condition, teacher, projector = self._condition(batch), self.teacher, self.projector

        # 2. Noise, the transformer, and its own loss.
        with self._recorded_hidden_states("image" in batch) as hidden_states:
            noise = torch.randn_like(latents)
            if self.config.objective == "ddpm":
                loss, logs = self._denoising(latents, noise, condition)
            else:
                loss, logs = self._flow_matching(latents, noise, condition)

        # 3. Alignment of the hidden states.
        if teacher is not None and projector is not None and "image" in batch:
            (hidden,) = hidden_states  # (B, N, D)
            projected = projector(hidden.transpose(1, 2).unflatten(2, (self.grid, self.grid)))
            with no_autocast(latents.device):
                features = teacher(batch["image"], (self.grid, self.grid))
            alignment = representation_alignment(projected, features)
            loss, logs["alignment"] = loss + self.config.alignment.weight * alignment, alignment.detach()
        elif projector is not None:  # DistributedDataParallel waits for a gradient of every parameter
            loss = loss + 0 * sum(parameter.sum() for parameter in projector.parameters())
        return loss, logs

    def _condition(self, batch: dict[str, Tensor]) -> Condition:
        """The transformer's arguments for classes and texts, as far as it has them."""
        condition: Condition = {}
        if self.null_class:
            labels = batch["label"]
            if self.class_dropout:
                dropped = torch.rand(len(labels), device=labels.device) < self.class_dropout
                labels = torch.where(dropped, self.null_class, labels)
            condition["class_labels"] = labels
        if self.transformer.config.get("text_dim") is not None:
            condition["encoder_hidden_states"] = batch["text_embeddings"]
            condition["encoder_attention_mask"] = batch["text_mask"]
        return condition

    def _flow_matching(self, latents: Tensor, noise: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        times = sample_times(len(latents), self.config.time_sampling, latents.device, shift=self.config.time_shift)
        noisy, velocity = interpolate(latents, noise, times)
        times = times * self.time_scale
        (output,) = self.transformer(noisy, timestep=times, return_dict=False, **condition)
        return flow_matching_loss(output, velocity, cosine_weight=self.config.cosine_weight)

    def _denoising(self, latents: Tensor, noise: Tensor, condition: Condition) -> tuple[Tensor, dict[str, Tensor]]:
        timesteps = torch.randint(len(self.scheduler), (len(latents),), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        (output,) = self.transformer(noisy, timestep=timesteps, return_dict=False, **condition)
        return denoising_loss(output, latents, noise, timesteps, self.scheduler)

    @contextmanager
    def _recorded_hidden_states(self, enabled: bool) -> Iterator[list[Tensor]]:
        """Collects the output of the block whose hidden states are aligned."""
        found: list[Tensor] = []
        if not enabled:
            yield found
            return
        block = blocks_of(self.transformer)[self.config.alignment.layer - 1]
        handle = block.register_forward_hook(lambda module, inputs, output: found.append(output))
        try:
            yield found
        finally:
            handle.remove()
