"""The loss of DiT: mean squared error of the noise, and for a learned variance the variational bound."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor


def denoising_loss(
    output: Tensor, data: Tensor, noise: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the predicted noise; with twice the channels, plus the variational bound of the variance.

    Args:
        output: (B, C, h, w), the predicted noise; or (B, 2C, h, w), followed by the predicted place of the log variance
            between its bounds, -1 for the smallest and 1 for the largest.
        data, noise: (B, C, h, w).
        timesteps: (B,), int64, 0 to T - 1, at which `scheduler.add_noise` made the model's input.
        scheduler: the noise schedule.
    Returns:
        The total, and each term, detached.
    Source: Nichol and Dhariwal, ICML 2021; Peebles and Xie, ICCV 2023 (DiT, both terms with weight 1).
    """
    output, channels = output.float(), data.shape[1]
    predicted = output[:, :channels]
    total = F.mse_loss(predicted, noise)
    terms = {"noise": total.detach()}
    if output.shape[1] == 2 * channels:
        # The bound trains the variance alone; the noise has its own loss.
        bound = variational_bound(predicted.detach(), output[:, channels:], data, noise, timesteps, scheduler)
        terms["variance"] = bound.detach()
        total = total + bound
    return total, terms


def variational_bound(
    predicted: Tensor, position: Tensor, data: Tensor, noise: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per number, averaged; at t = 0 the negative log-likelihood.

    p has the mean that the predicted noise gives, and the variance exp(f log beta_t + (1 - f) log beta~_t) with
    f = (position + 1) / 2. At t = 0 the density of the latent is taken as it is; DiT's code takes latents for 8-bit
    values there.

    Args:
        predicted: (B, C, h, w), the predicted noise.
        position: (B, C, h, w), the predicted place of the log variance between its bounds, in [-1, 1].
        data, noise: (B, C, h, w).
        timesteps: (B,), int64.
        scheduler: the noise schedule.
    Returns:
        Scalar, float32.
    Source: Nichol and Dhariwal, ICML 2021, eq. 4-7 and 15.
    """
    # 1. The schedule, at the timesteps of the batch
    betas = scheduler.betas.double()
    alphas = (1 - betas).cumprod(0)
    earlier_alphas = F.pad(alphas[:-1], (1, 0), value=1.0)
    smallest_variance = betas * (1 - earlier_alphas) / (1 - alphas)
    smallest_variance = torch.cat([smallest_variance[1:2], smallest_variance[1:]])  # the first is 0, without a log
    largest_log = _at(betas.log(), timesteps, data)
    smallest_log = _at(smallest_variance.log(), timesteps, data)
    from_data = _at(betas * earlier_alphas.sqrt() / (1 - alphas), timesteps, data)
    noise_ratio = _at((1 - alphas).sqrt() / alphas.sqrt(), timesteps, data)

    # 2. The two Gaussians: as x_t is given, their means differ by from_data (x_0 - predicted x_0)
    share = (position + 1) / 2
    log_variance = share * largest_log + (1 - share) * smallest_log
    error = (from_data * noise_ratio * (predicted - noise)).square() / log_variance.exp()

    # 3. Their divergence, or the likelihood of the data at the last step
    divergence = 0.5 * (log_variance - smallest_log + (smallest_log - log_variance).exp() - 1 + error)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error)
    is_last_step = (timesteps == 0).view(-1, 1, 1, 1)
    return torch.where(is_last_step, likelihood, divergence).mean() / math.log(2)


def _at(schedule: Tensor, timesteps: Tensor, data: Tensor) -> Tensor:
    """Values of a schedule (T,) at timesteps (B,) -> (B, 1, 1, 1), float32, on the device of the data."""
    return schedule.to(data.device)[timesteps].float().view(-1, 1, 1, 1)
