"""Checkpoints that are complete or absent: written under a temporary name, renamed, found by step."""

import errno
import json
import logging
import re
import shutil
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import nn

from favae.errors import CheckpointError
from favae.training.sharding import (
    in_one_piece,
    kind_of,
    load_optimizers,
    load_whole,
    own_parts,
    save_optimizers,
)

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


def _disk_is_full(error: Exception) -> bool:
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Complete checkpoints below `folder`, oldest first: [(step, path)]."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def save_module(module: nn.Module, path: Path, write: bool = True) -> None:
    """A diffusers model as a folder that `from_pretrained` opens, any other module as a safetensors file.

    All processes call it, in case the model is sharded; one of them, with `write`, does what the name says.
    """
    module = in_one_piece(module)
    if not write:
        return
    if isinstance(module, ModelMixin):
        module.save_pretrained(path)
    else:
        safetensors.torch.save_model(module, f"{path}.safetensors")


def load_module(module: nn.Module, path: Path) -> None:
    """Reads what `save_module` wrote into a module that exists."""
    if isinstance(module, ModelMixin):
        load_whole(module, kind_of(module).from_pretrained(path).state_dict())
    else:
        safetensors.torch.load_model(module, f"{path}.safetensors")


class Ema:
    """diffusers' `EMAModel` of one model, in float32, that lends its weights to the model for the length of a block.

    Args:
        model: unwrapped. decay: the ceiling; early steps average over fewer. device: where the average is kept.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | str = "cpu"):
        self.model = model
        self.average = EMAModel(own_parts(model), decay=decay)
        self.average.to(device, dtype=torch.float32)

    def step(self) -> None:
        self.average.step(own_parts(self.model))

    def __enter__(self) -> nn.Module:
        self.average.store(own_parts(self.model))
        self.average.copy_to(own_parts(self.model))
        return self.model

    def __exit__(self, *error) -> None:
        self.average.restore(own_parts(self.model))

    def load(self, path: Path, steps: int) -> None:
        """Reads averaged weights that `save_module` wrote, and how many steps they stand for."""
        with self as model:
            load_module(model, path)
            for shadow, parameter in zip(self.average.shadow_params, own_parts(model)):
                shadow.copy_(parameter.detach())
        self.average.optimization_step = steps


class Checkpointer:
    """Saves and restores everything a run needs to go on as if nothing had happened.

    A checkpoint holds each module of `modules` in loadable form (once: accelerate's own copy of the weights is left
    out), accelerate's state (optimisers, gradient scaler, random states of every process), and a small JSON.

    Args:
        accelerator: after `prepare`.
        folder: holds the `step-N` folders.
        modules: by name, unwrapped.
        ema: saved as one more module, "ema".
        total_limit: how many checkpoints are kept; None keeps all.
        sharded: by name, models that are divided among the processes, and their optimisers, of which accelerate would
            save the main process's part only.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        modules: dict[str, nn.Module],
        ema: Ema | None,
        total_limit: int | None,
        sharded: dict[str, tuple[nn.Module, list]] | None = None,
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.modules = modules
        self.ema = ema
        self.total_limit = total_limit
        self.sharded = sharded or {}
        accelerator.register_save_state_pre_hook(lambda models, weights, output: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int, state: dict) -> Path:
        """Writes `step-N`; called by every process.

        Raises:
            CheckpointError: if the disk is full; the older checkpoints are as they were.
        """
        final = self.folder / f"step-{step}"
        temporary = self.folder / f".writing-step-{step}"
        try:
            return self._save(step, state, temporary, final)
        except (OSError, RuntimeError) as error:  # safetensors and torch.save have errors of their own
            if not _disk_is_full(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(self._what_is_needed(step)) from error

    def _what_is_needed(self, step: int) -> str:
        there = find_checkpoints(self.folder)
        modules = [*self.modules.values(), *([self.ema.model] if self.ema else [])]
        needed = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        if there:
            needed = max(needed, sum(file.stat().st_size for file in there[-1][1].rglob("*") if file.is_file()))
        free = shutil.disk_usage(self.folder).free
        last = f"the last complete one is {there[-1][1]}" if there else "there is no complete one yet"
        return (
            f"the disk is full: checkpoint step-{step} needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
            f"in {self.folder}; {last}"
        )

    def _save(self, step: int, state: dict, temporary: Path, final: Path) -> Path:
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary))
        main = self.accelerator.is_main_process
        for name, module in self.modules.items():
            save_module(module, temporary / name, write=main)
        if self.ema is not None:
            with self.ema as averaged:
                save_module(averaged, temporary / "ema", write=main)
            state = {**state, "ema_steps": self.ema.average.optimization_step}
        for name, (model, optimizers) in self.sharded.items():
            save_optimizers(model, optimizers, temporary / f"{name}-optimizer")
        if main:
            state = {"step": step, "num_processes": self.accelerator.num_processes, **state}
            (temporary / STATE_FILE).write_text(json.dumps(state))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._prune()
        self.accelerator.wait_for_everyone()
        return final

    def _prune(self) -> None:
        if self.total_limit is not None:
            for _, path in find_checkpoints(self.folder)[: -self.total_limit]:
                shutil.rmtree(path)

    def load(self, path: Path) -> dict:
        """Restores a checkpoint and returns the state given to `save`, with its step.

        Raises:
            CheckpointError: for a checkpoint of another number of processes, whose random states are not there.
        """
        state = json.loads((path / STATE_FILE).read_text())
        written, here = state.get("num_processes"), self.accelerator.num_processes
        if written not in (None, here):
            raise CheckpointError(
                f"{path} was written by {written} process(es) and goes on with as many, not with {here}"
            )
        for name, module in self.modules.items():
            load_module(module, path / name)
        self.accelerator.load_state(str(path))
        for name, (model, optimizers) in self.sharded.items():
            load_optimizers(model, optimizers, path / f"{name}-optimizer")
        if self.ema is not None:
            self.ema.load(path / "ema", state["ema_steps"])
        logger.info("resumed from %s", path)
        return state
