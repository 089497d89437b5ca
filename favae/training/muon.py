"""timm's Muon, which orthogonalizes matrices of one shape together on a GPU: it would wait for a loop over them."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import timm.optim
import torch
from timm.optim import muon
from torch import Tensor
from torch.distributed.tensor import DTensor

from favae.precision import fast_dtype

BATCH = 2**24  # the most numbers that are orthogonalized together: more take memory


class Muon(timm.optim.Muon):
    """timm's `Muon`, with Nesterov's momentum, the weights of a convolution as one matrix, and no AdaMuon.

    Matrix products are in the published precision, bfloat16, where that is fast, and else in float32. timm has no
    argument for either, so `step` lends its own function to timm.
    """

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        published = muon.muon
        muon.muon = _update
        try:
            return super().step(closure)
        finally:
            muon.muon = published


def _update(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    ns_steps: int,
    ns_coefficients: str,
    eps: float,
    adjust_lr_fn: str,
    **others: object,
) -> None:
    """One step of all matrices of a group; the arguments are those of timm's function, whose place it takes."""
    coefficients = muon.resolve_ns_coefficients(ns_coefficients, muon._COEFFICIENTS)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(momentum_buffers, grads, 1 - momentum)
    updates = [grad.lerp(buffer, momentum) for grad, buffer in zip(grads, momentum_buffers)]
    dtype = fast_dtype(params[0].device.type)
    for batch in _batches(params):
        matrices = [updates[i].flatten(1) for i in batch]
        matrix = torch.stack(matrices) if len(batch) > 1 else matrices[0]
        orthogonal = muon.zeropower_via_newtonschulz(matrix, ns_steps, coefficients, eps=eps, dtype=dtype)
        rate = lr * muon.get_lr_scale(matrix.shape, adjust_lr_fn)
        for i, update in zip(batch, orthogonal if len(batch) > 1 else [orthogonal]):
            params[i].add_(update.reshape(params[i].shape), alpha=-rate)


def _batches(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """The places of matrices of one shape, as many as make up `BATCH` numbers, or one on its own."""
    places = defaultdict(list)
    for i, param in enumerate(params):
        places[(i,) if _is_alone(param) else param.flatten(1).shape].append(i)
    for same in places.values():
        size = max(1, BATCH // params[same[0]].numel())
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _is_alone(param: Tensor) -> bool:
    """Whether it is orthogonalized on its own: a processor does not gain from more, and a sharded one is no tensor to
    be stacked."""
    return param.device.type == "cpu" or isinstance(param, DTensor)
