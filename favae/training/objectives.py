"""What a class-conditional generator learns: velocities by flow matching, or noise by denoising diffusion."""

from dataclasses import dataclass, field

import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

from favae.losses.alignment import representation_alignment
from favae.losses.denoising import denoising_loss
from favae.losses.flow_matching import FlowMatchingConfig, flow_matching_loss, interpolate, sample_times
from favae.models.class_conditional import num_classes, time_scale

# The schedule of ADM and DiT; `DiTPipeline`'s schedulers have it too.
DIFFUSION = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


@dataclass
class RepresentationAlignmentConfig:
    """Hidden states pulled towards a frozen model's features (REPA), through a 3 x 3 convolution (iREPA)."""

    weight: float = 0.0  # 0.5 as published
    backbone: str = "vit_base_patch14_dinov2.lvd142m"  # any timm model, or "efficientnet-lite0"
    weights: str | None = None  # a local file for it
    layer: int = 8  # the block whose output is aligned: 8 of 28 as published, 4 of 12
    stop_step: int | None = None  # from which it is left out (HASTE, arXiv 2505.16792); None: never

    def __post_init__(self):
        for name in ("weight", "layer", "stop_step"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"loss.alignment.{name} must be at least 0, got {getattr(self, name)}")


@dataclass
class GeneratorLossConfig(FlowMatchingConfig):
    objective: str = (
        "flow_matching"  # or "ddpm", of a DiTTransformer2DModel: noise, and a variance with 2C channels out
    )
    alignment: RepresentationAlignmentConfig = field(default_factory=RepresentationAlignmentConfig)

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in ("flow_matching", "ddpm"):
            raise ValueError(f"loss.objective must be flow_matching or ddpm, got {self.objective}")


class AlignedTransformer(nn.Module):
    """A generator and the head that maps what one of its blocks gives to the features it is aligned to.

    One module, because DistributedDataParallel synchronises the gradients of what runs inside its own forward only.

    Args:
        transformer: a LightningDiT or DiT. layer: number of the block, from 1.
        channels: of the features.

    Attributes:
        active: whether the head is used.
    """

    def __init__(self, transformer: ModelMixin, layer: int, channels: int):
        super().__init__()
        config = transformer.config
        self.transformer, self.active = transformer, True
        self.grid = config.sample_size // config.patch_size
        self.head = nn.Conv2d(config.num_attention_heads * config.attention_head_dim, channels, 3, padding=1)
        blocks_of(transformer)[layer - 1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._hidden = output  # (B, N, D)

    def forward(self, *inputs, return_dict: bool = False, **named) -> tuple[Tensor, ...]:
        """The transformer's output, always as a tuple, and the mapped states (B, channels, h, w) while active."""
        (sample,) = self.transformer(*inputs, **named, return_dict=False)
        if not self.active:  # parameters without a use must have a gradient all the same
            return (sample + 0 * sum(parameter.sum() for parameter in self.head.parameters()),)
        hidden = self._hidden.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        return sample, self.head(hidden)


def blocks_of(transformer: ModelMixin) -> nn.ModuleList:
    return transformer.transformer_blocks if hasattr(transformer, "transformer_blocks") else transformer.blocks


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

    def __call__(
        self, model: nn.Module, latents: Tensor, labels: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Args:
            model: the transformer as it is trained, wrapped or not; an `AlignedTransformer` if there are features.
            latents: (B, C, h, w), normalised. labels: (B,), int64.
            features: (B, F, h', w') on the grid of the tokens, to align to.
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
            output, *projected = model(noisy, timestep=timesteps, class_labels=labels, return_dict=False)
            total, terms = denoising_loss(output, latents, noise, timesteps, self.scheduler)
        else:
            times = sample_times(len(labels), self.config.time_sampling, latents.device)
            noisy, velocity = interpolate(latents, noise, times)
            times = times * self.time_scale
            output, *projected = model(noisy, timestep=times, class_labels=labels, return_dict=False)
            total, terms = flow_matching_loss(output, velocity, cosine_weight=self.config.cosine_weight)
        if features is not None:
            alignment = representation_alignment(*projected, features)
            total, terms["alignment"] = total + self.config.alignment.weight * alignment, alignment.detach()
        return total, terms
