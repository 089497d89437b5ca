"""Token heads of an autoregressive transformer: how tokens enter it, how they are trained and how they are sampled.

A head has the methods `check`, `to_sequence` and `to_grid` (tokens as a tokenizer gives them, and in a row), `context`
(what later positions see of them), `loss` and `sample`. `CategoricalHead` is for indices of a codebook, `StageHead` for
indices from coarse to fine, of which a whole stage is sampled at once; `FlowHead`, for continuous latents, is in
flow_head.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from favae.models.scales import Stage
from favae.precision import no_autocast

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
    if has_values_outside(tokens, codebook_size):
        raise ValueError(f"tokens must be in 0 ... {codebook_size - 1}, got {tokens.min()} ... {tokens.max()}")


def has_values_outside(indices: Tensor, count: int) -> bool:
    """Whether some are not in 0 ... count - 1; False in compiled code and on the meta device, where nobody can see."""
    if torch.compiler.is_compiling() or indices.is_meta:
        return False
    return bool(((indices < 0) | (indices >= count)).any())


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
