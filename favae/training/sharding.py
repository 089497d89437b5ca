"""Training state divided among the processes (FSDP2 of torch), and models put together again.

Without it, every process holds the whole model, its gradients, its optimiser's state and the average, 20 bytes per
parameter; with it, its part of them. The arithmetic is that of DistributedDataParallel.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from favae.distributed import process_state


def shard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Divides a model's parameters, in place, before an optimiser is made of them; one process keeps it whole.

    Args:
        model: the same on every process.
        blocks: of the model; a forward or backward pass holds one of them in one piece at a time, and with mixed
            precision, beside its part, the half-precision weights that autocast keeps for the backward pass.
    """
    state = process_state()
    if state.num_processes == 1:
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    model.to(state.device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def kind_of(model: nn.Module) -> type[nn.Module]:
    """The class a model had before it was sharded, which gives it a class of its own."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def own_parts(model: nn.Module) -> list[Tensor]:
    """This process's part of each parameter, in the parameter's memory; all of it if the model is not sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


@torch.no_grad()
def in_one_piece(model: nn.Module) -> nn.Module:
    """A sharded model's copy on the CPU of every process, in eval mode; a model that is not sharded as it is.

    All processes must call it.
    """
    if not is_sharded(model):
        return model
    with torch.random.fork_rng(devices=[]):  # training goes on with the numbers it would have drawn
        copy = kind_of(model).from_config(model.config)
    own = copy.state_dict()
    for name, value in model.state_dict().items():  # one at a time: not all may fit
        own[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    return copy.eval()


@torch.no_grad()
def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Gives each process its part of weights that all of them have read.

    Raises:
        ValueError: for weights of another model.
    """
    shapes = {name: value.shape for name, value in state.items()}
    if shapes != {name: value.shape for name, value in model.state_dict().items()}:
        raise ValueError(f"the weights are not those of this {kind_of(model).__name__}")
    for name, own in model.state_dict().items():
        value = state[name].to(own.device)
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value)


def save_optimizers(model: nn.Module, optimizers: list, folder: Path) -> None:
    """Each process writes its part of the optimisers' state. Raises OSError or RuntimeError if one cannot."""
    with _first_error():
        distributed_checkpoint.save(get_optimizer_state_dict(model, optimizers), checkpoint_id=folder)


def load_optimizers(model: nn.Module, optimizers: list, folder: Path) -> None:
    """Each process reads its part. Raises OSError or RuntimeError if there is none that fits."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no {folder.name}; it was written without train.shard")
    state = get_optimizer_state_dict(model, optimizers)
    with _first_error():
        distributed_checkpoint.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizers, state)


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """What went wrong in one of the processes, in place of torch's collection of it, which is no `Exception`."""
    try:
        yield
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise (first if isinstance(first, (OSError, RuntimeError)) else RuntimeError(str(first))) from None
