"""Which processes there are. Started alone, by torchrun, or by accelerate launch; on accelerators or on CPUs."""

import torch
from accelerate import PartialState


def on_cpu() -> bool:
    """Whether processes must be told to use the CPU: without, accelerate takes torchrun's for so many single ones."""
    return not torch.accelerator.is_available()


def process_state() -> PartialState:
    """accelerate's state of this process: `num_processes`, `process_index`, `is_main_process`, `device`, barriers."""
    return PartialState(cpu=on_cpu())
