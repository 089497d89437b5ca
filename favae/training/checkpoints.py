"""Checkpoints that are complete or absent: written under a temporary name, renamed, found by step."""

import errno
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from favae.errors import CheckpointError
from favae.training.optimization import Ema
from favae.training.sharding import is_sharded, load_full_state, load_optimizers, save_full_state, save_optimizers

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
OPTIMIZER_FOLDER = "sharded-optimizer"


def find_checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """Complete checkpoints below `folder`, oldest first: [(step, path)]."""
    matches = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in Path(folder).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in matches if match)


class Checkpointer:
    """Saves and restores everything a run needs to continue as if nothing had happened.

    A checkpoint holds each part in loadable form (once: accelerate's own copy of the weights is left out), accelerate's
    state (optimizers, gradient scaler, random states of every process), and a small JSON.

    Args:
        accelerator: after `prepare`.
        folder: holds the `step-N` folders.
        parts: the trained modules by name, not wrapped for distribution.
        ema: its weights are saved as one more part, "ema".
        schedules: of the learning rates.
        total_limit: how many checkpoints are kept; None keeps all.
        model, optimizers: the training module and its optimizers. If the module is sharded, each process saves its own
            share of the optimizers' state, of which accelerate would save the main process's alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        parts: Mapping[str, nn.Module],
        ema: Ema,
        schedules: list[LRScheduler],
        total_limit: int | None,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
    ):
        self.accelerator = accelerator
        self.folder = folder
        self.parts = dict(parts)
        self.ema = ema
        self.total_limit = total_limit
        self.model, self.optimizers = model, optimizers
        self.sharded = is_sharded(model)
        accelerator.register_for_checkpointing(*schedules)
        accelerator.register_save_state_pre_hook(lambda models, weights, output: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `step-N`; called by every process.

        Raises:
            CheckpointError: if the disk is full; the older checkpoints are as they were.
        """
        final, temporary = self.folder / f"step-{step}", self.folder / f".writing-step-{step}"
        try:
            self._write(temporary, step, state)
        except (OSError, RuntimeError) as error:  # safetensors and torch.save raise errors of their own
            if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "No space left" not in str(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            complete = find_checkpoints(self.folder)
            last = f"the last complete one is {complete[-1][1]}" if complete else "there is no complete one yet"
            raise CheckpointError(f"the disk of {self.folder} is full: step-{step} was not written; {last}") from error
        if self.accelerator.is_main_process:
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            self._prune()
        self.accelerator.wait_for_everyone()
        return final

    def _write(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        accelerator, main = self.accelerator, self.accelerator.is_main_process
        if main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(folder))
        for name, part in self.parts.items():
            save_full_state(part, folder / name, write=main)
        if self.ema.average is not None:
            with self.ema as averaged:
                save_full_state(averaged, folder / "ema", write=main)
        if self.sharded:
            save_optimizers(self.model, self.optimizers, folder / OPTIMIZER_FOLDER)
        if main:
            state = {"step": step, "num_processes": accelerator.num_processes, "ema_steps": self.ema.num_steps, **state}
            (folder / STATE_FILE).write_text(json.dumps(state))
        accelerator.wait_for_everyone()

    def _prune(self) -> None:
        if self.total_limit is not None:
            for _, path in find_checkpoints(self.folder)[: -self.total_limit]:
                shutil.rmtree(path)

    def load(self, path: Path) -> dict[str, Any]:
        """Restores a checkpoint and returns the state given to `save`, with its step.

        Raises:
            CheckpointError: if it was written by another number of processes, or for other settings.
        """
        state = json.loads((path / STATE_FILE).read_text())
        written, here = state["num_processes"], self.accelerator.num_processes
        if written != here:  # the random states of the other processes are not there
            raise CheckpointError(
                f"{path} was written by {written} process(es) and is resumed by as many, not by {here}"
            )
        try:
            for name, part in self.parts.items():
                load_full_state(part, path / name)
            self.accelerator.load_state(str(path))
            if self.sharded:
                load_optimizers(self.model, self.optimizers, path / OPTIMIZER_FOLDER)
            self.ema.load(path / "ema", state["ema_steps"])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"resume: {path} does not fit these settings ({reason})") from error
        logger.info("resumed from %s", path)
        return state
