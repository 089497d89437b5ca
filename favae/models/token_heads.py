"""Token heads of an autoregressive transformer: how tokens enter it, how they are trained and how they are drawn.

A head has the methods `check`, `sequence` and `grid` (tokens as a tokenizer gives them, and one by one), `embed`,
`loss` and `sample`. `CategoricalHead` is for indices of a codebook, `FlowHead` for continuous latents.
"""

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from favae.precision import no_autocast

DEFAULT_STEPS = 25  # of the flow head's samples
Generators = torch.Generator | list[torch.Generator] | None


def draw(distribution, shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Random numbers, drawn where the generator lives; with a list, each row by its own, whatever the other rows are.

    Args:
        distribution: `torch.rand` or `torch.randn`.
    """
    if isinstance(generator, (list, tuple)):
        rows = [distribution(shape[1:], generator=one, device=one.device) for one in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return distribution(shape, generator=generator, device=source).to(device)


def guide(prediction: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, null + scale (cond - null), of a batch (cond, null); at scale 1 a batch without null.

    Source: Ho and Salimans, 2022 (arXiv 2207.12598).
    """
    if scale == 1:
        return prediction
    conditional, null = prediction.chunk(2)
    return null + scale * (conditional - null)


def guided_rows(states: Tensor, scale: float) -> Tensor:
    """What was drawn, for both halves of a guided batch."""
    return states if scale == 1 else torch.cat([states, states])


def draw_categories(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: Generators
) -> Tensor:
    """One category per row.

    Args:
        logits: (B, K). They are divided by the temperature before anything is cut off.
        temperature: 0 takes the likeliest.
        top_k: only the k likeliest can be drawn. top_p: only the likeliest that together have this probability.
    Returns:
        (B,) int64.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        unlikely = probability.cumsum(-1) - probability >= top_p  # what comes before has enough; never the first
        logits = logits.masked_fill(torch.zeros_like(unlikely).scatter(1, order, unlikely), -torch.inf)
    uniform = draw(torch.rand, tuple(logits.shape), generator, logits.device).clamp_min(torch.finfo().tiny)
    return (logits - (-uniform.log()).log()).argmax(-1)  # the Gumbel-max trick: no synchronisation


class CategoricalHead(nn.Module):
    """Indices of a codebook, or of several codebooks in a row (residual codes).

    The embeddings of a position's codes are summed; they are also the logits' weights. The logits of a later code see
    the sum of the earlier ones through a small network.

    Args:
        codebook_size: entries per codebook, K. dim: width of the transformer, D. num_quantizers: codebooks, Q.
    """

    def __init__(self, codebook_size: int, dim: int, num_quantizers: int = 1):
        super().__init__()
        if codebook_size < 1 or num_quantizers < 1:
            raise ValueError(
                f"codebook_size and num_quantizers must be at least 1, got {codebook_size} and {num_quantizers}"
            )
        self.codebook_size, self.num_quantizers = codebook_size, num_quantizers
        self.embedding = nn.Embedding(num_quantizers * codebook_size, dim)
        self.refinements = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            for _ in range(num_quantizers - 1)
        )

    def check(self, tokens: Tensor, size: int) -> None:
        """Raises ValueError for tokens that are not int64, of another shape or outside the codebook."""
        shape = (size, size) + ((self.num_quantizers,) if self.num_quantizers > 1 else ())
        if tokens.dtype != torch.int64 or tuple(tokens.shape[1:]) != shape:
            raise ValueError(f"built for int64 tokens of shape {shape}, got {tokens.dtype} {tuple(tokens.shape[1:])}")
        known = torch.compiler.is_compiling() or tokens.numel() == 0 or tokens.is_meta  # compiled code cannot look
        if not known and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.codebook_size:
            raise ValueError(f"tokens must be in 0 ... {self.codebook_size - 1}, got {tokens.min()} ... {tokens.max()}")

    def sequence(self, tokens: Tensor) -> Tensor:
        """(B, h, w) or (B, h, w, Q) -> (B, N, Q), row by row."""
        return tokens.reshape(len(tokens), -1, self.num_quantizers)

    def grid(self, tokens: Tensor, size: int) -> Tensor:
        """The inverse of `sequence`."""
        tokens = tokens.unflatten(1, (size, size))
        return tokens if self.num_quantizers > 1 else tokens.squeeze(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N, Q) -> (B, N, D); also the first codes alone, (B, N, fewer than Q)."""
        offsets = self.codebook_size * torch.arange(tokens.shape[-1], device=tokens.device)
        return self.embedding(tokens + offsets).sum(-2)

    def _logits(self, hidden: Tensor, earlier: Tensor) -> Tensor:
        """Hidden states (B, N, D) and the codes (B, N, q) of the same position -> logits (B, N, K) of the next code."""
        index = earlier.shape[-1]
        if index > 0:
            hidden = hidden + self.refinements[index - 1](hidden + self.embed(earlier))
        return F.linear(hidden, self.embedding.weight[index * self.codebook_size : (index + 1) * self.codebook_size])

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats.

        Args:
            hidden: (B, N, D). tokens: (B, N, Q).
        Returns:
            Scalar float32, and the logits (B, N, K), or (B, N, Q, K) of several codebooks.
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
        num_steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Tokens (B, Q) of one position.

        Args:
            hidden: (B, D), or with guidance (2B, D), the conditional half first.
            temperature, top_k, top_p: see `draw_categories`. num_steps: for `FlowHead`, not used.
        """
        hidden = hidden.unsqueeze(1)  # (B or 2B, 1, D)
        tokens = torch.zeros(
            len(hidden) // (1 if guidance_scale == 1 else 2), 0, dtype=torch.long, device=hidden.device
        )
        for _ in range(self.num_quantizers):
            logits = self._logits(hidden, guided_rows(tokens, guidance_scale).unsqueeze(1)).squeeze(1).float()
            codes = draw_categories(guide(logits, guidance_scale), temperature, top_k, top_p, generator)
            tokens = torch.cat([tokens, codes.unsqueeze(1)], dim=1)
        return tokens


class VelocityBlock(nn.Module):
    """A residual MLP, modulated and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)


class VelocityMLP(nn.Module):
    """The velocity data - noise of a token at time t, 0 = noise, given a hidden state.

    Source: the denoising MLP of Li et al., NeurIPS 2024 (arXiv 2406.11838), with a velocity as its output.
    """

    def __init__(self, channels: int, dim: int, width: int, layers: int):
        super().__init__()
        self.proj_in = nn.Linear(channels, width)
        self.proj_condition = nn.Linear(dim, width)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.time_embedding = TimestepEmbedding(256, width)
        self.blocks = nn.ModuleList(VelocityBlock(width) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, channels)

    def initialise(self) -> None:
        """adaLN-Zero: every block starts as the identity and the output as zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(self.time_embedding.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear_2.weight, std=0.02)
        for layer in (*(block.modulation for block in self.blocks), self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """x (..., C), times (..., 1) and (..., width) of `proj_condition`, which broadcast -> velocity (..., C)."""
        dtype = self.proj_in.weight.dtype
        with no_autocast(x.device):  # in half precision neighbouring times would be one
            time = self.time_embedding(self.time_proj(times.flatten().float()).to(dtype))
        condition = F.silu(condition + time.view(*times.shape[:-1], -1))
        x = self.proj_in(x.to(dtype))
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation_out(condition).chunk(2, dim=-1)
        return self.proj_out(self.norm_out(x) * (1 + scale) + shift)


class FlowHead(nn.Module):
    """Continuous tokens, each drawn by a small flow-matching network that sees the hidden state of its position.

    Args:
        channels: of the normalised latents, C. dim: width of the transformer, D. width, layers: of the network.
        low_channels: if given, a token's first so many channels are drawn first, and the others by a second network
            that sees them.

    Source: Li et al., NeurIPS 2024 (arXiv 2406.11838), with the linear path of Lipman et al., ICLR 2023.
    """

    repeats = 4  # times per token and training step: cheap beside the transformer

    def __init__(self, channels: int, dim: int, width: int, layers: int, low_channels: int | None = None):
        super().__init__()
        if low_channels is not None and not 0 < low_channels < channels:
            raise ValueError(f"low_latent_channels must be in 1 ... {channels - 1}, got {low_channels}")
        self.channels = channels
        self.parts = [channels] if low_channels is None else [low_channels, channels - low_channels]
        self.proj_in = nn.Linear(channels, dim)
        self.velocities = nn.ModuleList(VelocityMLP(part, dim, width, layers) for part in self.parts)
        self.proj_low = None if low_channels is None else nn.Linear(low_channels, dim)

    def check(self, tokens: Tensor, size: int) -> None:
        """Raises ValueError for tokens that are not floating, or of another shape."""
        shape = (self.channels, size, size)
        if not tokens.is_floating_point() or tuple(tokens.shape[1:]) != shape:
            raise ValueError(f"built for latents of shape {shape}, got {tokens.dtype} {tuple(tokens.shape[1:])}")

    def sequence(self, tokens: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, C), row by row."""
        return tokens.flatten(2).transpose(1, 2)

    def grid(self, tokens: Tensor, size: int) -> Tensor:
        """The inverse of `sequence`."""
        return tokens.transpose(1, 2).unflatten(2, (size, size))

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        return self.proj_in(tokens.to(self.proj_in.weight.dtype))

    def _condition(self, index: int, hidden: Tensor, low: Tensor | None) -> Tensor:
        """What the velocities of a part are given: the hidden state, and for the second part the low channels."""
        if index > 0:
            hidden = hidden + self.proj_low(low.to(self.proj_low.weight.dtype))
        return self.velocities[index].proj_condition(hidden)

    def loss(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        """Mean squared error of the velocity, at `repeats` logit-normal times per token.

        Args:
            hidden: (B, N, D). tokens: (B, N, C).
        Returns:
            Scalar float32, and None in the place of logits.
        Source: the path x_t = t data + (1 - t) noise: Lipman et al., ICLR 2023; the times: Esser et al., ICML 2024.
        """
        data = tokens.float().split(self.parts, dim=-1)
        error = 0.0
        for index, (velocity, target) in enumerate(zip(self.velocities, data)):
            condition = self._condition(index, hidden, data[0])
            noise = torch.randn(self.repeats, *target.shape, device=target.device)
            times = torch.randn(self.repeats, *target.shape[:-1], 1, device=target.device).sigmoid()
            predicted = velocity(times * target + (1 - times) * noise, times, condition)
            with no_autocast(hidden.device):
                error = error + (predicted.float() - (target - noise)).square().sum()
        return error / (self.repeats * tokens.numel()), None

    def sample(
        self,
        hidden: Tensor,
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_steps: int | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """Tokens (B, C) of one position, float32.

        Args:
            hidden: (B, D), or with guidance (2B, D), the conditional half first. Velocities are guided.
            temperature: scales the noise. top_k, top_p: for `CategoricalHead`, must be None.
            num_steps: Euler steps, at equal distances; None takes 25.
        Raises:
            ValueError: for top_k or top_p.
        """
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p are for head='categorical', not for continuous tokens")
        steps = DEFAULT_STEPS if num_steps is None else num_steps
        batch = len(hidden) // (1 if guidance_scale == 1 else 2)
        drawn = []
        for index, (velocity, channels) in enumerate(zip(self.velocities, self.parts)):
            condition = self._condition(index, hidden, guided_rows(drawn[0], guidance_scale) if drawn else None)
            x = temperature * draw(torch.randn, (batch, channels), generator, hidden.device)
            for step in range(steps):
                times = torch.full((1, 1), step / steps, device=x.device)
                predicted = velocity(guided_rows(x, guidance_scale), times, condition).float()
                x = x + guide(predicted, guidance_scale) / steps
            drawn.append(x)
        return torch.cat(drawn, dim=1)
