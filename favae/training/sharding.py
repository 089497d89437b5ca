"""Training state divided among the processes (FSDP2 of torch), models put together again, and blocks compiled.

Without sharding every process holds the whole model, its gradients, the optimizer's state and the EMA, 20 bytes per
parameter; with it, its share of them. The arithmetic is that of DistributedDataParallel.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock, Decoder, Encoder
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from favae.distributed import process_state

# Blocks ---------------------------------------------------------------------------------------------------------------


def blocks_of(model: ModelMixin) -> list[nn.Module]:
    """What is compiled and sharded one by one: blocks of a transformer or TAESD, stages of an autoencoder or UNet."""
    for name in ("transformer_blocks", "blocks"):
        if hasattr(model, name):
            return list(getattr(model, name))
    networks = [module for module in model.modules() if isinstance(module, (Encoder, Decoder, UNet2DModel))]
    stages = [[*getattr(n, "down_blocks", []), n.mid_block, *getattr(n, "up_blocks", [])] for n in networks]
    tiny = [module for module in model.modules() if isinstance(module, AutoencoderTinyBlock)]
    return tiny + [block for network in stages for block in network if block is not None]


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compiles each block's forward. Hooks stay outside of the graph, and the names of the weights as they are."""
    # Adaptive loss weights take gradients before the backward pass and keep the graph for it.
    torch._functorch.config.donated_buffer = False
    # The stages of an autoencoder share their code and differ in width and size: each gets a graph of its own.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)  # type: ignore[method-assign]


# Sharding -------------------------------------------------------------------------------------------------------------


def shard(module: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Divides the parameters of a training module among the processes, in place, before an optimizer is made of them.

    A process that no launcher started keeps it whole.

    Args:
        module: the training module, the same on every process; frozen networks in it stay whole.
        blocks: of the model. A forward or backward pass holds one of them in one piece at a time and, with mixed
            precision, beside its share, the half-precision weights that autocast keeps for the backward pass.
    """
    state = process_state()
    if not torch.distributed.is_initialized():
        return
    mesh = init_device_mesh(state.device.type, (state.num_processes,))
    module.to(state.device)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    fully_shard(module, mesh=mesh, ignored_params=frozen)


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_shards(model: nn.Module) -> list[Tensor]:
    """This process's share of each parameter, in the parameter's memory; all of it if the model is not sharded."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


@torch.no_grad()
def gather_full_model(model: ModelMixin) -> ModelMixin:
    """A copy of a sharded model on the CPU of every process, in eval mode; a model that is not sharded as it is.

    All processes must call it.
    """
    return _copy_of(model, _whole_tensors(model)) if is_sharded(model) else model


def _whole_tensors(module: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The state of a module, which may be sharded, on the CPU: one tensor at a time is whole on the accelerator.

    All processes must call it; those that do not keep it get {}.
    """
    state = {}
    for name, value in module.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu()
    return state


def _copy_of(model: ModelMixin, state: dict[str, Tensor]) -> ModelMixin:
    # `from_config` would drop what was a default when the model was made and has been registered since.
    config = {key: value for key, value in model.config.items() if key != "_use_default_values"}
    with torch.random.fork_rng(devices=[]):  # the copy's initialization must not change what training draws next
        copy = type(model).from_config(config)
    copy.load_state_dict(state)
    return copy.eval()


def save_full_state(module: nn.Module, path: Path, write: bool = True) -> None:
    """Writes a diffusers model as a folder for `from_pretrained`, and any other module as PATH.safetensors.

    All processes call it, in case the module is sharded; those with `write` do the writing.
    """
    if isinstance(module, ModelMixin) and not is_sharded(module):
        if write:
            module.save_pretrained(path)
        return
    state = _whole_tensors(module, keep=write)
    if write and isinstance(module, ModelMixin):
        _copy_of(module, state).save_pretrained(path)
    elif write:
        tensors = {name: value.contiguous() for name, value in state.items()}
        safetensors.torch.save_file(tensors, f"{path}.safetensors")


@torch.no_grad()
def load_full_state(module: nn.Module, path: Path) -> None:
    """Reads what `save_full_state` wrote into a module that exists, each process its share.

    Raises:
        RuntimeError: for weights of another module.
    """
    if isinstance(module, ModelMixin):
        state = type(module).from_pretrained(path).state_dict()
    else:
        state = safetensors.torch.load_file(f"{path}.safetensors")
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=True, strict=True))


def local_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer as plain tensors and numbers; of a sharded model, this process's share of it."""
    return tree_map(lambda value: value.to_local() if isinstance(value, DTensor) else value, optimizer.state_dict())


def load_local_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores what `local_state` gave.

    Raises:
        ValueError: if it is of other parameters, or of another share of them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        parameter = parameters[number]
        share = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name, value in values.items():
            if not isinstance(value, Tensor) or not value.dim():
                continue  # a number of steps
            if value.shape != share.shape:
                raise ValueError(f"the optimizer's {name} has the shape {tuple(value.shape)}, not {tuple(share.shape)}")
            if isinstance(parameter, DTensor):
                values[name] = DTensor.from_local(
                    value.to(share.device),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
    optimizer.load_state_dict(state)
