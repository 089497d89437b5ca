"""Flow matching on latents: the linear path, its velocity, and the losses of LightningDiT."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class FlowMatchingConfig:
    time_sampling: str = "logit_normal"  # or "uniform"
    cosine_weight: float = 1.0

    def __post_init__(self):
        if self.time_sampling not in ("logit_normal", "uniform"):
            raise ValueError(f"loss.time_sampling must be logit_normal or uniform, got {self.time_sampling}")


def sample_times(batch_size: int, sampling: str, device: torch.device | str = "cpu") -> Tensor:
    """Times in (0, 1), 0 = noise, 1 = data; (B,) float32.

    Args:
        sampling: "logit_normal" (sigmoid of a standard normal; Esser et al., ICML 2024) or "uniform".
    """
    if sampling == "logit_normal":
        return torch.sigmoid(torch.randn(batch_size, device=device))
    return torch.rand(batch_size, device=device)


def interpolate(data: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t = t data + (1 - t) noise of the linear path, and its velocity data - noise.

    Args:
        data, noise: (B, C, h, w). times: (B,), 0 = noise.
    Source: Lipman et al., ICLR 2023; Liu et al., ICLR 2023.
    """
    times = times.view(-1, 1, 1, 1)
    return times * data + (1 - times) * noise, data - noise


def flow_matching_loss(
    prediction: Tensor, velocity: Tensor, *, cosine_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the velocity, and of its direction.

    L = mean (v' - v)^2 + cosine_weight * mean (1 - cos(v', v)), cosine over the channels of each position. In float32.

    Args:
        prediction, velocity: (B, C, h, w).
        cosine_weight: 0 leaves the second term out.
    Returns:
        The total, and each term before weighting, detached.
    Source: Yao et al., CVPR 2025 (LightningDiT).
    """
    prediction, velocity = prediction.float(), velocity.float()
    terms = {"velocity": F.mse_loss(prediction, velocity)}
    total = terms["velocity"]
    if cosine_weight:
        terms["cosine"] = (1 - F.cosine_similarity(prediction, velocity, dim=1)).mean()
        total = total + cosine_weight * terms["cosine"]
    return total, {name: value.detach() for name, value in terms.items()}
