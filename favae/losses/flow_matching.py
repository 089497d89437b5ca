"""Flow matching on latents: the linear path, its velocity, and the losses of LightningDiT."""

from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor


def sample_times(
    batch_size: int,
    sampling: Literal["logit_normal", "uniform"],
    device: torch.device | str = "cpu",
    *,
    shift: float = 1.0,
) -> Tensor:
    """Random times from 0 (noise) to 1 (data).

    A shift a moves the share of noise, s = 1 - t, to a s / (1 + (a - 1) s): above 1, towards noise.

    Args:
        batch_size: number of times, B.
        sampling: "logit_normal" is the sigmoid of a standard normal.
        device: of the result.
        shift: a, above 0.
    Returns:
        (B,), float32.
    Source: Esser et al., ICML 2024, eq. 23 for the shift.
    """
    times = compute_density_for_timestep_sampling(sampling, batch_size, logit_mean=0.0, logit_std=1.0, device=device)
    return times / (times + shift * (1 - times))


def interpolate(data: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the linear path from noise to data, and its velocity.

    x_t = t data + (1 - t) noise,   v = data - noise

    Args:
        data, noise: (B, C, h, w).
        times: (B,), from 0 (noise) to 1 (data).
    Returns:
        x_t and v, both (B, C, h, w).
    Source: Lipman et al., ICLR 2023; Liu et al., ICLR 2023.
    """
    times = times.view(-1, 1, 1, 1)
    return times * data + (1 - times) * noise, data - noise


def flow_matching_loss(
    prediction: Tensor, velocity: Tensor, *, cosine_weight: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the velocity, plus the error of its direction.

    L = mean (v' - v)^2 + cosine_weight * mean (1 - cos(v', v)),   the cosine over the channels of each position.

    Args:
        prediction, velocity: v' and v, (B, C, h, w), any floating dtype; computed in float32.
        cosine_weight: 0 leaves the second term out.
    Returns:
        The total, and each term before weighting, detached.
    Source: Yao et al., CVPR 2025 (LightningDiT, arXiv 2501.01423).
    """
    prediction, velocity = prediction.float(), velocity.float()
    terms = {"velocity": F.mse_loss(prediction, velocity)}
    total = terms["velocity"]
    if cosine_weight:
        terms["cosine"] = (1 - F.cosine_similarity(prediction, velocity, dim=1)).mean()
        total = total + cosine_weight * terms["cosine"]
    return total, {name: value.detach() for name, value in terms.items()}
