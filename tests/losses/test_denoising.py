"""DiT's objective against the definition of its Gaussians."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from favae.losses.denoising import denoising_loss, variational_bound
from favae.training.diffusion import DIFFUSION_SCHEDULE


@pytest.fixture
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(**DIFFUSION_SCHEDULE)


def posterior(scheduler, t: int, data: torch.Tensor, noisy: torch.Tensor) -> tuple[torch.Tensor, float, float]:
    """Mean and variance of q(x_{t-1} | x_t, x_0), from Bayes' rule, and beta_t."""
    alpha, beta = float(scheduler.alphas_cumprod.double()[t]), float(scheduler.betas.double()[t])
    before = float(scheduler.alphas_cumprod.double()[t - 1]) if t else 1.0
    # precision: of x_t given x_{t-1}, and of x_{t-1} given x_0
    precision = (1 - beta) / beta + (1 / (1 - before) if t else math.inf)
    mean = data if not t else ((1 - beta) ** 0.5 / beta * noisy + before**0.5 / (1 - before) * data) / precision
    assert alpha == pytest.approx(before * (1 - beta))
    return mean, 1 / precision, beta


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_bound_is_the_divergence_of_two_gaussians(scheduler, t):
    data, noise, predicted = (torch.randn(1, 2, 3, 3, dtype=torch.float64) for _ in range(3))
    position = torch.rand(1, 2, 3, 3) * 2 - 1
    alpha = float(scheduler.alphas_cumprod[t])
    noisy = alpha**0.5 * data + (1 - alpha) ** 0.5 * noise
    mean, variance, beta = posterior(scheduler, t, data, noisy)
    guess = (noisy - (1 - alpha) ** 0.5 * predicted) / alpha**0.5
    own, _, _ = posterior(scheduler, t, guess, noisy)
    share = (position + 1) / 2
    deviation = (0.5 * (share * math.log(beta) + (1 - share) * math.log(variance))).exp()
    expected = kl_divergence(Normal(mean, variance**0.5), Normal(own, deviation)).mean() / math.log(2)
    found = variational_bound(predicted, position, data, noise, torch.tensor([t]), scheduler)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_the_last_step_is_a_likelihood(scheduler):
    data, noise, predicted = (torch.randn(1, 2, 3, 3) for _ in range(3))
    alpha = scheduler.alphas_cumprod[0]
    guess = data + ((1 - alpha) / alpha).sqrt() * (noise - predicted)
    expected = -Normal(guess, scheduler.betas[0].sqrt()).log_prob(data).mean() / math.log(2)
    found = variational_bound(predicted, torch.ones_like(data), data, noise, torch.tensor([0]), scheduler)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_the_variance_learns_from_the_bound_and_the_mean_from_the_noise(scheduler):
    data, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    timesteps = torch.tensor([0, 1, 500, 999])
    output = torch.randn(4, 4, 3, 3, requires_grad=True)
    total, terms = denoising_loss(output, data, noise, timesteps, scheduler)
    assert total.item() == pytest.approx(float(terms["noise"] + terms["variance"]))
    total.backward()
    mean, variance = output.grad.chunk(2, dim=1)
    assert torch.allclose(mean, 2 * (output[:, :2] - noise).detach() / noise.numel(), atol=1e-7)
    assert variance.abs().sum() > 0
    plain, terms = denoising_loss(noise.clone(), data, noise, timesteps, scheduler)
    assert plain == 0 and set(terms) == {"noise"}
