"""Which processes there are. Started alone, by torchrun, or by accelerate launch; on accelerators or on CPUs."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from favae.errors import FavaeError

# Without, a process that waits for the others gives up after 30 minutes (10 on GPUs) and takes them with it. A process
# that dies is noticed by the launcher, which ends the others.
LONGEST_WAIT = timedelta(days=30)


def on_cpu() -> bool:
    """Whether processes must be told to use the CPU: without, accelerate takes torchrun's for so many single ones."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """accelerate's state of this process: `num_processes`, `process_index`, `is_main_process`, `device`, barriers."""
    return PartialState(cpu=on_cpu(), timeout=LONGEST_WAIT)


def main_process_does(action: Callable[[], None]) -> None:
    """Runs an action on the main process while the others wait. If it raises a `FavaeError`, all processes do."""
    error: list[FavaeError | None] = [None]
    if process_state().is_main_process:
        try:
            action()
        except FavaeError as raised:
            error = [raised]
    broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]
