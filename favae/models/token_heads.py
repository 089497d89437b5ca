"""Token heads of an autoregressive transformer: how tokens enter it, how they are trained and how they are sampled.

A head has the methods `check`, `to_sequence` and `to_grid` (tokens as a tokenizer gives them, and in a row), `context`
(what later positions see of them), `loss` and `sample`. `CategoricalHead` is for indices of a codebook, `FlowHead` for
continuous latents, `StageHead` for indices from coarse to fine, of which a whole stage is sampled at once.
"""

from collections.abc import Callable

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from favae.models.scales import Stage
from favae.precision import no_autocast

DEFAULT_STEPS = 25  # Euler steps per token of the flow head
TorchGenerators = torch.Generator | list[torch.Generator] | None


def guide(prediction: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: null + scale (conditional - null).

    Args:
        prediction: (2B, ...), the conditional half first; with scale 1 the conditional half alone, (B, ...).
    Returns:
        (B, ...).
    Source: Ho and Salimans, 2022 (arXiv 2207.12598).
    """
    if scale == 1:
        return prediction
    conditional, null = prediction.chunk(2)
    return null + scale * (conditional - null)


def repeat_for_guidance(samples: Tensor, scale: float) -> Tensor:
    """(B, ...) -> (2B, ...): both halves of a guided batch go on from the same samples. Unchanged with scale 1."""
    return samples if scale == 1 else torch.cat([samples, samples])


def sample_categories(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: TorchGenerators = None,
) -> Tensor:
    """Samples one category per position by the Gumbel-max trick, which never waits for the accelerator.

    Args:
        logits: (B, ..., K).
        temperature: divides the logits, before anything is cut off; 0 takes the likeliest category.
        top_k: if given, only the k likeliest categories can be sampled.
        top_p: if given, only the likeliest categories that together have this probability.
        generator: one, or one per row; with one per row a sample does not depend on the other rows.
    Returns:
        (B, ...), int64.
    Raises:
        ValueError: by transformers, for values out of range.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    shape, logits = logits.shape, logits.flatten(0, -2)

    warpers: list[Callable] = [TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    for warper in warpers:
        logits = warper(None, logits)  # None: these warpers do not look at the earlier tokens

    uniform = _uniform(shape, generator, logits.device).clamp_min(torch.finfo().tiny)
    return (logits.view(shape) - (-uniform.log()).log()).argmax(-1)


def _uniform(shape: torch.Size, generator: TorchGenerators, device: torch.device) -> Tensor:
    """Numbers in [0, 1), in the manner of diffusers' `randn_tensor`: sampled on the device of their generator."""
    if isinstance(generator, list):
        rows = [torch.rand(shape[1:], generator=one, device=one.device) for one in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=source).to(device)


def check_indices(tokens: Tensor, shape: tuple[int, ...], codebook_size: int) -> None:
    """Raises ValueError for tokens that are not int64, of another shape than (B, *shape), or outside the codebook."""
    if tokens.dtype != torch.int64 or tuple(tokens.shape[1:]) != shape:
        raise ValueError(f"built for int64 tokens of shape {shape}, got {tokens.dtype} {tuple(tokens.shape[1:])}")
    # Values cannot be seen in compiled code and on the meta device.
    if torch.compiler.is_compiling() or tokens.is_meta or tokens.numel() == 0:
        return
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < codebook_size:
        raise ValueError(f"tokens must be in 0 ... {codebook_size - 1}, got {tokens.min()} ... {tokens.max()}")


class CategoricalHead(nn.Module):
    """Indices of a codebook, or of several codebooks in a row (residual codes).

    The embeddings of a position's codes are summed; they are also the weights of the logits. The logits of a later code
    see the sum of the earlier ones through a small network.

    Args:
        codebook_size: entries per codebook, K.
        dim: width of the transformer, D.
        num_quantizers: number of codebooks, Q.
    """

    def __init__(self, codebook_size: int, dim: int, num_quantizers: int = 1):
        super().__init__()
        self.codebook_size, self.num_quantizers = codebook_size, num_quantizers
        self.embedding = nn.Embedding(num_quantizers * codebook_size, dim)
        self.refinements = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            for _ in range(num_quantizers - 1)
        )

    def check(self, tokens: Tensor, size: int) -> None:
        """Raises ValueError for tokens that are not int64, of another shape, or outside the codebook."""
        shape = (size, size) + ((self.num_quantizers,) if self.num_quantizers > 1 else ())
        check_indices(tokens, shape, self.codebook_size)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """(B, h, w) or (B, h, w, Q) -> (B, N, Q), row by row."""
        return tokens.reshape(len(tokens), -1, self.num_quantizers)

    def to_grid(self, tokens: Tensor, size: int) -> Tensor:
        """The inverse of `to_sequence`."""
        tokens = tokens.unflatten(1, (size, size))
        return tokens if self.num_quantizers > 1 else tokens.squeeze(-1)

    def context(self, tokens: Tensor) -> Tensor:
        """What all positions but the first see of the tokens (B, N, Q): the embedding before, (B, N - 1, D)."""
        return self.embed(tokens[:, :-1])

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N, q) -> (B, N, D); the first q <= Q codes are enough."""
        offsets = self.codebook_size * torch.arange(tokens.shape[-1], device=tokens.device)
        return self.embedding(tokens + offsets).sum(-2)

    def _logits(self, hidden: Tensor, earlier: Tensor) -> Tensor:
        """Hidden states (B, N, D) and the first q codes of the same positions (B, N, q) -> logits (B, N, K) of the next
        code."""
        index = earlier.shape[-1]
        if index > 0:
            hidden = hidden + self.refinements[index - 1](hidden + self.embed(earlier))
        return F.linear(hidden, self.embedding.weight[index * self.codebook_size : (index + 1) * self.codebook_size])

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats.

        Args:
            hidden: (B, N, D).
            tokens: (B, N, Q).
        Returns:
            Scalar float32, and the logits: (B, N, K), or (B, N, Q, K) of several codebooks.
        """
        logits = torch.stack([self._logits(hidden, tokens[..., :q]) for q in range(self.num_quantizers)], dim=2)
        with no_autocast(hidden.device):
            loss = F.cross_entropy(logits.flatten(0, 2).float(), tokens.flatten())
        return loss, logits if self.num_quantizers > 1 else logits.squeeze(2)

    def sample(
        self,
        hidden: Tensor,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: TorchGenerators = None,
    ) -> Tensor:
        """Samples the codes (B, 1, Q) of one position.

        Args:
            hidden: (B, 1, D), or with guidance (2B, 1, D), the conditional half first. Logits are guided.
            temperature, top_k, top_p, generator: see `sample_categories`.
        """
        batch = len(hidden) // (1 if guidance_scale == 1 else 2)
        tokens = torch.zeros(batch, 1, 0, dtype=torch.long, device=hidden.device)
        for _ in range(self.num_quantizers):
            logits = self._logits(hidden, repeat_for_guidance(tokens, guidance_scale)).float()
            codes = sample_categories(
                guide(logits, guidance_scale), temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            tokens = torch.cat([tokens, codes.unsqueeze(2)], dim=2)
        return tokens


class StageHead(nn.Module):
    """Indices from coarse to fine, a whole stage at once, each given the stages before.

    A stage has embeddings of its own for each token of a cell; they are also the weights of the logits. Stages differ
    in their numbers of tokens, by which they are told apart.

    Args:
        codebook_size: entries per codebook, K.
        dim: width of the transformer, D.
        stages: by `make_stages`.

    Source: Tian et al., NeurIPS 2024 (arXiv 2404.02905), where later stages see the sum of the entries so far; here
    they see the embeddings of the stage before, and attend to all.
    """

    def __init__(self, codebook_size: int, dim: int, stages: list[Stage]):
        super().__init__()
        self.codebook_size, self.stages = codebook_size, stages
        self.counts = [stage.tokens for stage in stages]
        self.embedding = nn.Embedding(sum(stage.per_cell for stage in stages) * codebook_size, dim)

    def check(self, tokens: Tensor, size: int) -> None:
        """Raises ValueError for tokens that are not int64, of another number, or outside the codebook."""
        check_indices(tokens, (sum(self.counts),), self.codebook_size)

    def to_sequence(self, tokens: Tensor) -> Tensor:
        """(B, N), as they are."""
        return tokens

    def to_grid(self, tokens: Tensor, size: int) -> Tensor:
        """(B, N), as they are."""
        return tokens

    def context(self, tokens: Tensor) -> Tensor:
        """What all positions but those of the first stage see of the tokens (B, N): (B, N - n, D)."""
        return torch.cat([self.embed(part) for part in tokens.split(self.counts, dim=1)[:-1]], dim=1)

    def embed(self, tokens: Tensor) -> Tensor:
        """What a stage sees of the tokens (B, n) of the one before: their embeddings, resized, (B, n', D)."""
        number = self.counts.index(tokens.shape[1])
        stage, following = self.stages[number], self.stages[number + 1]
        offsets = self.codebook_size * (self._first_table(number) + torch.arange(stage.per_cell, device=tokens.device))
        cells = self.embedding(tokens.unflatten(1, (-1, stage.per_cell)) + offsets).sum(2)  # (B, cells, D)
        grid = cells.transpose(1, 2).unflatten(2, (stage.side, stage.side))
        grid = F.interpolate(grid, size=following.side, mode="bilinear")
        return grid.flatten(2).transpose(1, 2).repeat_interleave(following.per_cell, dim=1)

    def _first_table(self, number: int) -> int:
        return sum(stage.per_cell for stage in self.stages[:number])

    def _logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, n, D) of a stage -> (B, n, K)."""
        number = self.counts.index(hidden.shape[1])
        first, count = self._first_table(number), self.stages[number].per_cell
        tables = self.embedding.weight.unflatten(0, (-1, self.codebook_size))[first : first + count]
        return torch.einsum("bcqd,qkd->bcqk", hidden.unflatten(1, (-1, count)), tables).flatten(1, 2)

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats over all tokens (B, N), float32, and the logits (B, N, K)."""
        logits = torch.cat([self._logits(part) for part in hidden.split(self.counts, dim=1)], dim=1)
        with no_autocast(hidden.device):
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        return loss, logits

    def sample(
        self,
        hidden: Tensor,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: TorchGenerators = None,
    ) -> Tensor:
        """Samples the tokens (B, n) of a stage.

        Args:
            hidden: (B, n, D), or with guidance (2B, n, D), the conditional half first. Logits are guided.
            temperature, top_k, top_p, generator: see `sample_categories`.
        """
        logits = guide(self._logits(hidden).float(), guidance_scale)
        return sample_categories(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)


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
        dtype = self.proj_in.weight.dtype
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
        return self.proj_in(tokens.to(self.proj_in.weight.dtype))

    def _condition(self, index: int, hidden: Tensor, low: Tensor | None) -> Tensor:
        """What the network of a part is given: the hidden state, and for the second part the low channels as well."""
        if low is not None and self.proj_low is not None:
            hidden = hidden + self.proj_low(low.to(self.proj_low.weight.dtype))
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
