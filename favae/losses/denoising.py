"""The objective of DiT: noise by its mean squared error, and a learned variance by the variational bound."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor


def denoising_loss(
    output: Tensor, data: Tensor, noise: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of the predicted noise; with twice the channels, the variational bound of the variance too.

    Args:
        output: (B, C, h, w), or (B, 2C, h, w): predicted noise, and where the variance is between its bounds (-1, 1).
        data, noise: (B, C, h, w). timesteps: (B,), int64, 0 to T - 1, of the noisy point `scheduler.add_noise` gave.
    Returns:
        The total, and each term, detached.
    Source: Nichol and Dhariwal, ICML 2021; Peebles and Xie, ICCV 2023 (DiT, both terms with weight 1).
    """
    output, channels = output.float(), data.shape[1]
    predicted = output[:, :channels]
    terms = {"noise": F.mse_loss(predicted, noise)}
    if output.shape[1] == 2 * channels:
        terms["variance"] = variational_bound(
            predicted.detach(), output[:, channels:], data, noise, timesteps, scheduler
        )
    return sum(terms.values()), {name: value.detach() for name, value in terms.items()}


def variational_bound(
    predicted: Tensor, position: Tensor, data: Tensor, noise: Tensor, timesteps: Tensor, scheduler: DDPMScheduler
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per number, averaged; the negative log-likelihood at t = 0.

    p has the mean that the predicted noise gives and the variance exp(f log beta_t + (1 - f) log beta~_t), with
    f = (position + 1) / 2. At t = 0 the density is taken as it is: latents are not the 8-bit values that DiT's code
    takes them for.

    Args:
        predicted, position, data, noise: (B, C, h, w). timesteps: (B,).
    """

    def at(values: Tensor) -> Tensor:
        return values.to(data.device)[timesteps].float().view(-1, 1, 1, 1)

    betas = scheduler.betas.double()
    alphas = (1 - betas).cumprod(0)
    before = F.pad(alphas[:-1], (1, 0), value=1.0)
    smallest = betas * (1 - before) / (1 - alphas)
    smallest = torch.cat([smallest[1:2], smallest[1:]]).log()  # it is 0 at t = 0
    from_data = betas * before.sqrt() / (1 - alphas)
    ratio = at((1 - alphas).sqrt() / alphas.sqrt())

    share = (position + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(smallest)
    # mean - predicted mean = from_data (x_0 - predicted x_0), and x_t is the same for both
    error = (at(from_data) * ratio * (predicted - noise)).square()
    error = error / log_variance.exp()
    divergence = 0.5 * (log_variance - at(smallest) + (at(smallest) - log_variance).exp() - 1 + error)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + error)
    first = (timesteps == 0).view(-1, 1, 1, 1)
    return torch.where(first, likelihood, divergence).mean() / math.log(2)
