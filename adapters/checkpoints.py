"""Reading checkpoints of other programs without executing anything, and matching their tensors with ours by name."""

import pickle
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor

from favae.errors import CheckpointError
from favae.files import READ_ERRORS

CONTAINERS = ("state_dict", "model", "ema")  # keys under which training programs keep a network's tensors


def read_checkpoint(path: str | Path, containers: Sequence[str] = CONTAINERS) -> dict[str, Tensor]:
    """The tensors in a file of any training program, by name. Nothing in the file is executed.

    Args:
        path: .safetensors, or anything that `torch.save` wrote.
        containers: keys under which the tensors may be. The first one that the file has is taken; if it has none of
            them, the tensors at its top are. The prefixes `module.` and `_orig_mod.` of wrapped networks are removed.
    Returns:
        Tensors on the CPU, in the file's dtypes.
    Raises:
        CheckpointError: if the file is missing or damaged, has no tensors, or holds objects that cannot be read without
            executing foreign code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if foreign is None:
            raise CheckpointError(f"{path} is damaged, or not a checkpoint") from error
        raise CheckpointError(
            f"{path} holds objects ({foreign[1]}) that only foreign code can build, and is not opened; if you trust "
            "it, save the tensors of its state_dict alone"
        ) from error

    state: dict[str, Tensor] = {}
    for name, tensor in _find_tensors(content, containers).items():
        name = re.sub(r"^(module\.)+", "", str(name).replace("_orig_mod.", ""))
        if name in state:
            raise CheckpointError(f"{path} has {name} twice, with and without a prefix")
        state[name] = tensor
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    return state


def _find_tensors(content: object, containers: Sequence[str]) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    inner = [content[key] for key in containers if isinstance(content.get(key), Mapping)]
    values = inner[0] if inner else content
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Location:
    """Where another program keeps a tensor of ours.

    Attributes:
        name: the name of the tensor there.
        part, parts: ours is the block `part`, counted from 0, of `parts` equal blocks of its rows, as in a fused
            projection.
        convolution: it is a 1x1 convolution (D, D', 1, 1) there and a matrix (D, D') here.
    """

    name: str
    part: int = 0
    parts: int = 1
    convolution: bool = False


def state_shapes(model_class: type[ModelMixin], config: Mapping) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's state, without its weights.

    Raises:
        CheckpointError: if the config does not make a model.
    """
    try:
        with torch.device("meta"):
            state = model_class.from_config(dict(config)).state_dict()
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise CheckpointError(f"its shapes make no {model_class.__name__}: {str(error).splitlines()[0]}") from error
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def tensors_from_original(
    state: Mapping[str, Tensor], locations: Mapping[str, Location], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Our state out of the state of another program.

    Args:
        state: exactly the tensors that the locations name.
        locations, shapes: of each of our tensors, by our names.
    Raises:
        CheckpointError: if names are missing or unexpected, or a shape differs.
    """
    names = {location.name for location in locations.values()}
    if missing := names - state.keys():
        raise CheckpointError(f"lacks {list_names(missing)}")
    if unexpected := state.keys() - names:
        raise CheckpointError(f"has {list_names(unexpected)}, which this layout does not have")
    result = {}
    for key, location in locations.items():
        tensor, (rows, *columns) = state[location.name], shapes[key]
        expected = (rows * location.parts, *columns, *((1, 1) if location.convolution else ()))
        if tuple(tensor.shape) != expected:
            raise CheckpointError(f"{location.name} has shape {tuple(tensor.shape)}, expected {expected}")
        result[key] = tensor.chunk(location.parts)[location.part].reshape(shapes[key])
    return result


def tensors_to_original(state: Mapping[str, Tensor], locations: Mapping[str, Location]) -> dict[str, Tensor]:
    """The inverse of `tensors_from_original`.

    Raises:
        CheckpointError: if the state has other names than the locations.
    """
    if different := state.keys() ^ locations.keys():
        raise CheckpointError(f"the state and its config disagree about {list_names(different)}")
    blocks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, location in locations.items():
        tensor = state[key][..., None, None] if location.convolution else state[key]
        blocks[location.name][location.part] = tensor
    return {
        name: torch.cat([parts[i] for i in range(len(parts))]) if len(parts) > 1 else parts[0].contiguous()
        for name, parts in blocks.items()
    }


def required_tensor(state: Mapping[str, Tensor], name: str, dimensions: int) -> Tensor:
    """The tensor of this name.

    Raises:
        CheckpointError: if it is missing, or does not have so many dimensions.
    """
    if name not in state:
        raise CheckpointError(f"lacks {name}")
    if state[name].ndim != dimensions:
        raise CheckpointError(f"{name} has shape {tuple(state[name].shape)}, expected {dimensions} dimensions")
    return state[name]


def count_numbered(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many of the names `pattern.format(0)`, `pattern.format(1)`, ... there are without a gap."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def drop_prefixes(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names do not begin with one of the prefixes."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def list_names(names: Iterable[str]) -> str:
    """A few of the names, for a message of one line."""
    names = sorted(names)
    rest = len(names) - 3
    return ", ".join(names[:3]) + (f" and {rest} more" if rest > 0 else "")
