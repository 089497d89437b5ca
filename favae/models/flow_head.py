"""The token head of continuous latents: each token is sampled by a small network given the transformer's state."""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

from favae.models.token_heads import TorchGenerators, guide, repeat_for_guidance
from favae.precision import no_autocast, parameter_dtype

DEFAULT_STEPS = 25  # Euler steps per token


class VelocityBlock(nn.Module):
    """A residual MLP that is modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class VelocityMLP(nn.Module):
    """The velocity data - noise of a token at time t (0 is noise), given a hidden state.

    Args:
        channels: of the token, C.
        dim: width of the hidden state.
        width, num_layers: of the network.

    Source: the denoising MLP of Li et al., NeurIPS 2024 (arXiv 2406.11838), with a velocity as its output.
    """

    def __init__(self, channels: int, dim: int, width: int, num_layers: int):
        super().__init__()
        self.proj_in = nn.Linear(channels, width)
        self.proj_condition = nn.Linear(dim, width)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embedding = TimestepEmbedding(256, width)
        self.blocks = nn.ModuleList(VelocityBlock(width) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, channels)

    def initialize_weights(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        modulations = [block.modulation for block in self.modules() if isinstance(block, VelocityBlock)]
        for layer in (*modulations, self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """
        Args:
            x: (..., C), a point between noise and data.
            times: (..., 1).
            condition: (..., width), the hidden state after `proj_condition`; its leading dimensions broadcast.
        Returns:
            (..., C), the velocity.
        """
        dtype = parameter_dtype(self.proj_in)
        with no_autocast(x.device):  # half precision could not tell neighboring times apart
            time = self.time_embedding(self.time_proj(times.flatten().float()).to(dtype))
        condition = F.silu(condition + time.view(*times.shape[:-1], -1))
        x = self.proj_in(x.to(dtype))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)
        return self.proj_out(self.norm_out(x) * (1 + scale) + shift)


class FlowHead(nn.Module):
    """Continuous tokens, each sampled by a small flow-matching network that sees the hidden state of its position.

    Args:
        channels: of the normalized latents, C.
        dim: width of the transformer, D.
        width, num_layers: of the network.
        low_channels: if given, the first so many channels of a token are sampled first, and the others by a second
            network that sees them.

    Source: Li et al., NeurIPS 2024 (arXiv 2406.11838), with the linear path of Lipman et al., ICLR 2023.
    """

    times_per_token = 4  # in training; the head is cheap compared to the transformer

    def __init__(self, channels: int, dim: int, width: int, num_layers: int, low_channels: int | None = None):
        super().__init__()
        if low_channels is not None and not 0 < low_channels < channels:
            raise ValueError(f"low_latent_channels must be in 1 ... {channels - 1}, got {low_channels}")
        self.channels = channels
        self.parts = [channels] if low_channels is None else [low_channels, channels - low_channels]
        self.proj_in = nn.Linear(channels, dim)
        self.velocities = nn.ModuleList(VelocityMLP(part, dim, width, num_layers) for part in self.parts)
        self.proj_low = None if low_channels is None else nn.Linear(low_channels, dim)

    def check(self, tokens: Tensor, size: int) -> None:
        """Raises ValueError for tokens that are not floating point, or of another shape."""
        shape = (self.channels, size, size)
        if not tokens.is_floating_point() or tuple(tokens.shape[1:]) != shape:
            raise ValueError(f"built for latents of shape {shape}, got {tokens.dtype} {tuple(tokens.shape[1:])}")

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C), row by row."""
        return tokens.flatten(2).transpose(1, 2)

    def to_grid(self, tokens: Tensor, size: int) -> Tensor:
        """The inverse of `to_sequence`."""
        return tokens.transpose(1, 2).unflatten(2, (size, size))

    def context(self, tokens: Tensor) -> Tensor:
        """What all positions but the first see of the tokens (B, N, C): the embedding before, (B, N - 1, D)."""
        return self.embed(tokens[:, :-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        return self.proj_in(tokens.to(parameter_dtype(self.proj_in)))

    def _condition(self, index: int, hidden: Tensor, low: Tensor | None) -> Tensor:
        """What the network of a part is given: the hidden state, and for the second part the low channels as well."""
        if low is not None and self.proj_low is not None:
            hidden = hidden + self.proj_low(low.to(parameter_dtype(self.proj_low)))
        velocity = self.velocities[index]
        assert isinstance(velocity, VelocityMLP)
        return velocity.proj_condition(hidden)

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        """Mean squared error of the velocity, at `times_per_token` logit-normal times per token.

        Args:
            hidden: (B, N, D).
            tokens: (B, N, C).
        Returns:
            Scalar float32, and None instead of logits.
        Source: the path x_t = t data + (1 - t) noise: Lipman et al., ICLR 2023; the times: Esser et al., ICML 2024.
        """
        data = tokens.float().split(self.parts, dim=-1)
        repeats = self.times_per_token
        error = torch.zeros((), device=hidden.device)
        for index, (velocity, target) in enumerate(zip(self.velocities, data)):
            condition = self._condition(index, hidden, data[0] if index > 0 else None)
            noise = torch.randn(repeats, *target.shape, device=target.device)
            times = torch.randn(repeats, *target.shape[:-1], 1, device=target.device).sigmoid()
            predicted = velocity(times * target + (1 - times) * noise, times, condition)
            with no_autocast(hidden.device):
                error = error + (predicted.float() - (target - noise)).square().sum()
        return error / (repeats * tokens.numel()), None

    def sample(
        self,
        hidden: Tensor,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        num_steps: int = DEFAULT_STEPS,
        generator: TorchGenerators = None,
    ) -> Tensor:
        """Samples the token (B, 1, C) of one position, float32.

        Args:
            hidden: (B, 1, D), or with guidance (2B, 1, D), the conditional half first. Velocities are guided.
            temperature: scales the noise.
            num_steps: Euler steps of equal length.
            generator: one, or one per row.
        """
        batch = len(hidden) // (1 if guidance_scale == 1 else 2)
        parts: list[Tensor] = []
        for index, (velocity, channels) in enumerate(zip(self.velocities, self.parts)):
            low = repeat_for_guidance(parts[0], guidance_scale) if parts else None
            condition = self._condition(index, hidden, low)
            x = temperature * randn_tensor((batch, 1, channels), generator, hidden.device, torch.float32)
            for step in range(num_steps):
                times = torch.full((1, 1, 1), step / num_steps, device=x.device)
                predicted = velocity(repeat_for_guidance(x, guidance_scale), times, condition).float()
                x = x + guide(predicted, guidance_scale) / num_steps
            parts.append(x)
        return torch.cat(parts, dim=-1)
