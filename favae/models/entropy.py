"""Entropy models: how many bits quantized latents cost, and the numbers that a coder writes them with."""

import math
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from favae.precision import no_autocast

MIN_LIKELIHOOD = 1e-9
MIN_SCALE, MAX_SCALE, NUM_SCALES = 0.11, 256.0, 64  # of the grid that coded scales are on
WIDTHS, INIT_SCALE = (3, 3, 3), 10.0  # of the factorized density: its layers, and about how wide it is at the start
LARGEST_SYMBOL = 63  # of the factorized density; rounded latents are clamped to it


class LowerBound(torch.autograd.Function):
    """max(x, bound), whose gradient also passes where it moves x up towards the bound."""

    @staticmethod
    def forward(context, x: Tensor, bound: float) -> Tensor:
        context.save_for_backward(x)
        context.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = context.saved_tensors
        passes = (x >= context.bound) | (gradient < 0)
        return gradient * passes, None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    return LowerBound.apply(x, bound)


def round_straight_through(x: Tensor) -> Tensor:
    """round(x), with the gradient of x."""
    return x + (x.round() - x).detach()


def with_uniform_noise(x: Tensor) -> Tensor:
    """x + U(-1/2, 1/2): what stands in for rounding where a rate is learned."""
    return x + torch.rand_like(x) - 0.5


def bits(likelihood: Tensor) -> Tensor:
    """-log2 p summed over all but the first axis: (B, ...) -> (B,)."""
    return -likelihood.log2().flatten(1).sum(dim=1)


def gaussian_likelihood(x: Tensor, scales: Tensor) -> Tensor:
    """The mass of a Gaussian of mean 0 on [x - 1/2, x + 1/2], at least 1e-9; computed in float32.

    P = Phi((1/2 - |x|) / s) - Phi((-1/2 - |x|) / s)

    Args:
        x, scales: (B, C, h, w); scales at least `MIN_SCALE`.
    Source: Minnen et al., NeurIPS 2018 (arXiv 1809.02736).
    """
    with no_autocast(x.device):
        distance, scales = x.float().abs(), scales.float()
        upper, lower = (torch.special.ndtr((half - distance) / scales) for half in (0.5, -0.5))
        return lower_bound(upper - lower, MIN_LIKELIHOOD)


def scale_indices(scales: Tensor) -> Tensor:
    """The nearest entries of `scale_table`, for scales of any shape; int64. Computed in float64."""
    step = math.log(MAX_SCALE / MIN_SCALE) / (NUM_SCALES - 1)
    positions = (scales.double().clamp(MIN_SCALE, MAX_SCALE) / MIN_SCALE).log() / step
    return positions.round().long()


def scale_table() -> Tensor:
    """(64,), float64: from 0.11 to 256, in equal ratios. Source: Balle et al. (arXiv 1802.01436).

    Rounded to what float32 holds, so that machines whose logarithms differ in the last bits have the same numbers.
    """
    scales = torch.logspace(math.log10(MIN_SCALE), math.log10(MAX_SCALE), NUM_SCALES, dtype=torch.float64)
    return scales.float().double()


class FactorizedDensity(nn.Module):
    """A density of its own for each channel, as the derivative of a learned cumulative function.

    c(x) = sigmoid(f_K ... f_1(x)),   f_k(x) = g_k(softplus(M_k) x + b_k),   g_k(x) = x + tanh(a_k) tanh(x), g_K(x) = x
    p(z) = c(z + 1/2) - c(z - 1/2), at least 1e-9

    A coder needs the same numbers in every process and on every device, so it takes them from `table`, which is part of
    the state: `update_table` computes it, and so does whatever saves the weights.

    Args:
        channels: C.

    Source: Balle et al., ICLR 2018 (arXiv 1802.01436), appendix 6.1.
    """

    table: Tensor
    table_checksum: Tensor

    def __init__(self, channels: int):
        super().__init__()
        sizes = (1, *WIDTHS, 1)
        scale = INIT_SCALE ** (1 / (len(WIDTHS) + 1))
        self.matrices, self.biases, self.factors = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for before, after in zip(sizes, sizes[1:]):
            start = math.log(math.expm1(1 / scale / after))
            self.matrices.append(nn.Parameter(torch.full((channels, after, before), start)))
            self.biases.append(nn.Parameter(torch.rand(channels, after, 1) - 0.5))
        for width in WIDTHS:
            self.factors.append(nn.Parameter(torch.zeros(channels, width, 1)))
        self.register_buffer("table", torch.zeros(channels, 2 * LARGEST_SYMBOL + 1))
        self.register_buffer("table_checksum", torch.zeros((), dtype=torch.int64))
        self.register_state_dict_pre_hook(FactorizedDensity._before_saving)

    def _before_saving(self, prefix: str, keep_vars: bool) -> None:
        whole = all(type(p) is nn.Parameter and p.device.type != "meta" for p in self.parameters())
        if whole and not self.table_is_current:  # neither without values nor divided among processes
            self.update_table()

    @property
    def table_is_current(self) -> bool:
        """Whether the weights are those that the table was computed from."""
        return int(self.table_checksum) == self._checksum()

    def _checksum(self) -> int:
        """CRC-32 of the weights."""
        value = 0
        for parameter in self.parameters():
            value = zlib.crc32(parameter.detach().float().cpu().numpy().tobytes(), value)
        return value

    def likelihood(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> the probability of each value, of the same shape, float32."""
        with no_autocast(z.device):
            values = z.float().transpose(0, 1).flatten(1).unsqueeze(1)  # (C, 1, Bhw)
            found = self._mass(values, self.parameters_as(torch.float32))
            return found.squeeze(1).unflatten(1, (z.shape[0], *z.shape[2:])).transpose(0, 1)

    def parameters_as(self, dtype: torch.dtype, device=None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """M_k, b_k and a_k of each layer, on a device if one is named; the last has no a_k."""

        def convert(parameter: Tensor) -> Tensor:
            return parameter.to(device).to(dtype)  # one after the other: MPS has no float64

        factors = [*map(convert, self.factors), None]
        return list(zip(map(convert, self.matrices), map(convert, self.biases), factors))

    @staticmethod
    def _mass(values: Tensor, layers: list[tuple[Tensor, Tensor, Tensor | None]]) -> Tensor:
        def logits(x: Tensor) -> Tensor:
            for matrix, bias, factor in layers:
                x = F.softplus(matrix) @ x + bias
                if factor is not None:
                    x = x + torch.tanh(factor) * torch.tanh(x)
            return x

        lower, upper = logits(values - 0.5), logits(values + 0.5)
        sign = torch.where(lower + upper > 0, -1.0, 1.0)  # differences of sigmoids are exact where both are small
        return lower_bound((torch.sigmoid(sign * upper) - torch.sigmoid(sign * lower)).abs(), MIN_LIKELIHOOD)

    @torch.no_grad()
    def update_table(self) -> None:
        """Computes `table`, (C, 127): the probabilities of -63 ... 63, in float64 on the CPU, kept as float32."""
        layers = self.parameters_as(torch.float64, "cpu")
        symbols = torch.arange(-LARGEST_SYMBOL, LARGEST_SYMBOL + 1, dtype=torch.float64)
        mass = self._mass(symbols.expand(len(self.table), 1, -1), layers).squeeze(1)
        self.table.copy_(mass / mass.sum(dim=1, keepdim=True))
        self.table_checksum.fill_(self._checksum())
