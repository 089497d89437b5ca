"""Which processes there are, and how they share work.

Started alone, by torchrun, or by accelerate launch; on accelerators or on CPUs.
"""

from collections.abc import Callable
from datetime import timedelta

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor

from favae.errors import DataError, FavaeError

# Without, a process that waits for the others gives up after 30 minutes (10 on GPUs) and takes them with it. A process
# that dies is noticed by the launcher of its machine, which ends the others there; those of other machines wait.
LONGEST_WAIT = timedelta(hours=12)


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


def own_indices(total: int) -> range:
    """The items of this process: every n-th one, beginning with its rank.

    Raises:
        DataError: if a process would get none.
    """
    state = process_state()
    if total < state.num_processes:
        raise DataError(f"{total} images are too few for {state.num_processes} processes")
    return range(state.process_index, total, state.num_processes)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of image `index`, in whichever process and batch it is made."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, index]).generate_state(1)[0]))


def gather_rows(rows: Tensor, indices: Tensor, total: int) -> Tensor:
    """Puts rows that processes computed in the order of the whole, on every process, on the CPU.

    Args:
        rows: (n, ...), those of this process.
        indices: (n,), the place of each row in the whole; no two processes have the same.
        total: the number of places. Places that no process filled (unreadable images) are left out.
    Returns:
        (at most total, ...).
    """
    if process_state().num_processes == 1 and bool((indices.diff() > 0).all()):
        return rows.cpu()  # without a copy: features of 50,000 images take 400 MB
    device = process_state().device
    indices = indices.to(device)
    everything = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype, device=device)
    everything[indices] = rows.to(device)
    filled = torch.zeros(total, device=device)
    filled[indices] = 1
    everything, filled = reduce(everything, "sum"), reduce(filled, "sum")
    return everything.cpu() if bool(filled.all()) else everything[filled > 0].cpu()


def everyone(ok: bool) -> bool:
    """Whether all processes say yes. All must ask, so that they fail together and none waits for another."""
    flag = torch.tensor([float(not ok)], device=process_state().device)
    return reduce(flag, "sum").item() == 0
