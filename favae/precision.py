"""Float32 islands inside mixed precision, and where bfloat16 is fast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off on this device, if it has such a thing (the meta device, which only counts, has not)."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters that are floating point: quantized weights are integers, biases are not."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16, or float32 on a processor that has to emulate bfloat16, or of which torch does not say."""
    if device != "cpu":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if any(has for name, has in capabilities.items() if "bf16" in name) else torch.float32
