"""Checkpoints of other programs: read without running what is in them, and matched tensor by tensor with ours."""

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from favae.errors import CheckpointError

CONTAINERS = ("state_dict", "model", "ema")  # where training programs keep a network's tensors


def read_checkpoint(path: str | Path, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """The tensors of a file of any training program, by name; no object in it is ever built, no code of it is run.

    Args:
        path: .safetensors, or anything that `torch.save` wrote.
        containers: where in the file the tensors may be, the first that is there counts; without any of them, at its
            top. What is no tensor is left out, and so are the prefixes `module.` and `_orig_mod.` of wrapped networks.
    Returns:
        On the CPU, of the file's dtypes.
    Raises:
        CheckpointError: if there is no such file, it is damaged, has no tensors, or has objects that only their own
            code could build.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path} is a folder, not a checkpoint file" if path.is_dir() else f"{path}: no such file"
        )
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError(f"{path} is damaged, or no checkpoint") from error
        raise CheckpointError(
            f"{path} holds objects ({foreign[1]}) that only foreign code can build, and is not opened; if you trust "
            "it, save the tensors of its state_dict alone"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as e:
        raise CheckpointError(f"{path} is damaged, or no checkpoint") from e
    state: dict[str, Tensor] = {}
    for name, tensor in _tensors(content, containers).items():
        name = str(name).replace("_orig_mod.", "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        if name in state:
            raise CheckpointError(f"{path} has {name} twice, with and without a prefix")
        state[name] = tensor
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    return state


def _tensors(content: object, containers: Sequence[str]) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for container in containers:
        if isinstance(content.get(container), Mapping):
            content = content[container]
            break
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Entry:
    """Where another program keeps a tensor of ours.

    Attributes:
        name: its name there.
        part, parts: ours is this one, counted from 0, of so many equal blocks of its rows, as in a fused projection.
        convolution: a 1x1 convolution (D, D', 1, 1) there, a matrix (D, D') here.
    """

    name: str
    part: int = 0
    parts: int = 1
    convolution: bool = False


def shapes_of(kind: type[ModelMixin], config: Mapping) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's state, without its weights.

    Raises:
        CheckpointError: if the config makes no model.
    """
    try:
        with torch.device("meta"):
            state = kind.from_config(dict(config)).state_dict()
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"its shapes make no {kind.__name__}: {str(error).splitlines()[0]}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def take(
    state: Mapping[str, Tensor], entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The tensors of `entries` out of a state of the original, by our names.

    Args:
        state: exactly what the entries name.
        shapes: of ours.
    Raises:
        CheckpointError: for names that are missing or not expected, and for other shapes.
    """
    names = {entry.name for entry in entries.values()}
    if missing := names - state.keys():
        raise CheckpointError(f"lacks {listed(missing)}")
    if unexpected := state.keys() - names:
        raise CheckpointError(f"has {listed(unexpected)}, which this layout does not have")
    result = {}
    for key, entry in entries.items():
        tensor, (rows, *columns) = state[entry.name], shapes[key]
        expected = (rows * entry.parts, *columns, *((1, 1) if entry.convolution else ()))
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{entry.name} has shape {tuple(tensor.shape)}, expected {expected}")
        result[key] = tensor.chunk(entry.parts)[entry.part].reshape(shapes[key])
    return result


def give(state: Mapping[str, Tensor], entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The inverse of `take`: the original's state out of ours.

    Raises:
        CheckpointError: if the state has other names than the entries.
    """
    if odd := state.keys() ^ entries.keys():
        raise CheckpointError(f"the state and its config disagree about {listed(odd)}")
    blocks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, entry in entries.items():
        blocks[entry.name][entry.part] = state[key][..., None, None] if entry.convolution else state[key]
    return {
        name: torch.cat([parts[i] for i in range(len(parts))]) if len(parts) > 1 else parts[0].contiguous()
        for name, parts in blocks.items()
    }


def need(state: Mapping[str, Tensor], name: str, dimensions: int | None = None) -> Tensor:
    """One tensor of an original's state.

    Raises:
        CheckpointError: if it is missing, or has not so many dimensions.
    """
    if name not in state:
        raise CheckpointError(f"lacks {name}")
    if dimensions is not None and state[name].ndim != dimensions:
        raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, expected {dimensions} dimensions")
    return state[name]


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many names `pattern.format(0)`, `pattern.format(1)`, ... there are without a gap."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def without(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """All but the names that begin so."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def listed(names: Iterable[str], most: int = 3) -> str:
    """A few of them for a message of one line."""
    names = sorted(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
