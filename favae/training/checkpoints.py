"""Checkpoints: complete or absent, checked before they are resumed from, and nothing in them is executed."""

import json
import logging
import random
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from favae.errors import CheckpointError, DiskFull, FavaeError, one_line
from favae.files import READ_ERRORS, UNFINISHED, remove, remove_leftover, removed_on_error, replace, sync
from favae.hashing import checksum
from favae.training.optimization import Ema, set_learning_rates
from favae.training.sharding import (
    is_sharded,
    load_full_state,
    load_local_state,
    local_shards,
    local_state,
    save_full_state,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # written last; it lists the other files
DAMAGED = "damaged-"


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints below `folder`, oldest first: [(step, path)]."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, each of which is read; None if they are as they were written."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        if state.pop("checksum") != checksum_of_state(state):
            return f"{STATE_FILE} is not as it was written"
        for name, (size, value) in state["files"].items():
            file = checkpoint / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or checksum(file) != value:
                return f"{name} is not as it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{STATE_FILE} is missing or damaged"
    return None


def checksum_of_state(state: dict[str, Any]) -> int:
    """CRC-32 of what `STATE_FILE` holds besides this number."""
    return zlib.crc32(json.dumps(state).encode())


def tidy(folder: Path, newest_whole: int) -> None:
    """Renames the checkpoints after step `newest_whole`, so that they take the place of no whole one, and removes those
    that a killed process was writing."""
    for path in folder.glob(f"{UNFINISHED}*"):
        remove_leftover(path)
    for step, path in find_checkpoints(folder):
        if step > newest_whole:
            remove(path.with_name(DAMAGED + path.name))
            path.rename(path.with_name(DAMAGED + path.name))


class Checkpointer:
    """Saves and restores everything a run needs to continue as if nothing had happened.

    A checkpoint holds each trained part in loadable form, the optimizers' state, the random states of every process,
    and a small JSON. What is not safetensors or JSON is opened by PyTorch's restricted unpickler, which builds tensors,
    numbers and containers and calls nothing.

    Args:
        accelerator: after `prepare`.
        folder: holds the `step-N` folders.
        parts: the trained modules by name, not wrapped for distribution.
        ema: its weights are saved as one more part, "ema".
        schedules: of the learning rates.
        total_limit: how many checkpoints are kept; None keeps all.
        optimizers: all of them. If a part is sharded, each process saves its own share of their state.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        parts: Mapping[str, nn.Module],
        ema: Ema,
        schedules: list[LambdaLR],
        total_limit: int | None,
        optimizers: list[torch.optim.Optimizer],
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.parts = dict(parts)
        self.ema = ema
        self.schedules, self.optimizers = schedules, optimizers
        self.total_limit = total_limit
        self.sharded = any(is_sharded(part) for part in parts.values())

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `step-N`; called by every process.

        Raises:
            DiskFull: the older checkpoints are as they were.
        """
        final, temporary = self.folder / f"step-{step}", self.folder / f"{UNFINISHED}step-{step}"
        try:
            with removed_on_error(temporary, final):
                self._write(temporary, step, state)
        except DiskFull as error:
            complete = find_checkpoints(self.folder)
            last = f"the last complete one is {complete[-1][1]}" if complete else "there is no complete one yet"
            size = tqdm.format_sizeof(self._size(), "B")
            raise DiskFull(f"{error}; a checkpoint takes about {size}; {last}") from error
        if self.accelerator.is_main_process:
            replace(temporary, final)
            self._prune()
        self.accelerator.wait_for_everyone()
        return final

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        process = accelerator.process_index
        if main:
            remove(folder)
            folder.mkdir(parents=True)
        accelerator.wait_for_everyone()
        for name, part in self.parts.items():
            save_full_state(part, folder / name, write=main)
        if self.ema.average is not None:
            with self.ema as averaged:
                save_full_state(averaged, folder / "ema", write=main)
        if main or self.sharded:
            torch.save([local_state(optimizer) for optimizer in self.optimizers], self._optimizer_file(folder))
        torch.save(random_states(accelerator.device), folder / f"random-states-{process}.pt")
        accelerator.wait_for_everyone()
        if main:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            scaler = accelerator.scaler
            state = {
                "step": step,
                "num_processes": accelerator.num_processes,
                "sharded": self.sharded,
                "ema_steps": self.ema.num_steps,
                "schedules": [schedule.state_dict() for schedule in self.schedules],
                "gradient_scaler": None if scaler is None else scaler.state_dict(),
                **state,
                "files": {str(path.relative_to(folder)): (path.stat().st_size, checksum(path)) for path in files},
            }
            (folder / STATE_FILE).write_text(json.dumps({**state, "checksum": checksum_of_state(state)}))
            sync(folder)

    def _size(self) -> int:
        """Bytes of the tensors in a checkpoint, as far as this process holds them."""
        tensors = [tensor for part in self.parts.values() for tensor in local_shards(part)]
        tensors += [] if self.ema.average is None else self.ema.average.shadow_params
        tensors += [
            value
            for optimizer in self.optimizers
            for state in local_state(optimizer)["state"].values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]
        return sum(tensor.nbytes for tensor in tensors)

    def _optimizer_file(self, folder: Path) -> Path:
        return folder / f"optimizers-{self.accelerator.process_index if self.sharded else 0}.pt"

    def _prune(self) -> None:
        if self.total_limit is not None:
            for _, path in find_checkpoints(self.folder)[: -self.total_limit]:
                shutil.rmtree(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Restores a checkpoint and returns the state given to `save`, with its step.

        Learning rates and other settings of optimizers stay those of this run.


        Raises:
            CheckpointError: if it was written by another number of processes, or for other settings.
        """
        try:
            state = json.loads((path / STATE_FILE).read_text())
            self._check_processes(path, state)
            self._load(path, state)
        except FavaeError:
            raise
        except READ_ERRORS as error:
            reason = one_line(error)
            raise CheckpointError(f"resume: {path} does not fit these settings ({reason})") from error
        logger.info("resumed from %s", path)
        return state

    def _check_processes(self, path: Path, state: dict[str, Any]) -> None:
        written, here = state["num_processes"], self.accelerator.num_processes
        if written != here:  # the random states of the other processes are not there
            raise CheckpointError(
                f"{path} was written by {written} process(es) and is resumed by as many, not by {here}"
            )
        if state["sharded"] != self.sharded:
            raise CheckpointError(f"resume: {path} was written with train.shard={str(state['sharded']).lower()}")

    def _load(self, path: Path, state: dict[str, Any]) -> None:
        accelerator = self.accelerator
        for name, part in self.parts.items():
            load_full_state(part, path / name)
        optimizers = torch.load(self._optimizer_file(path), map_location="cpu", weights_only=True)
        for optimizer, saved in zip(self.optimizers, optimizers, strict=True):
            settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
            load_local_state(optimizer, saved)
            for group, own in zip(optimizer.param_groups, settings):
                group |= own
        for schedule, numbers in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict({**numbers, "base_lrs": schedule.base_lrs})
            set_learning_rates(schedule)
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["gradient_scaler"])
        self.ema.load(path / "ema", state["ema_steps"])
        file = path / f"random-states-{accelerator.process_index}.pt"
        set_random_states(torch.load(file, map_location="cpu", weights_only=True), accelerator.device)


def random_states(device: torch.device) -> dict[str, Any]:
    """Where the random numbers of Python, NumPy and PyTorch are, as numbers and tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restores what `random_states` gave."""
    random.setstate(states["python"])
    keys: Tensor = states["numpy"][0]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *states["numpy"][1:]))
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"])
