"""Optimizers, learning rate schedules, gradient clipping and the moving average of the weights."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from favae.training.config import TrainConfig
from favae.training.muon import Muon
from favae.training.sharding import load_full_state, local_shards


def create_optimizers(
    groups: Iterable[dict[str, Any]], train: TrainConfig, learning_rate: float, matrices: Iterable[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """AdamW for groups of parameters, and Muon for `matrices` in their place, if there are any.

    Muon's updates have the size of AdamW's, so that one learning rate serves both (arXiv 2502.16982). The weights of a
    convolution are a matrix with one row for each output channel.
    """
    matrices, betas = list(matrices), (train.betas[0], train.betas[1])
    is_matrix = {id(matrix) for matrix in matrices}
    others = [{**group, "params": [p for p in group["params"] if id(p) not in is_matrix]} for group in groups]
    others = [group for group in others if group["params"]]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, learning_rate, betas=betas, weight_decay=train.weight_decay)
    ]
    if matrices:
        optimizers.append(Muon(matrices, learning_rate, weight_decay=train.weight_decay, nesterov=True, betas=betas))
    return optimizers


def matrices_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The weights of all linear layers and convolutions that are trained, but for transposed ones."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    weights = [layer.get_parameter("weight") for layer in layers]
    return [weight for weight in weights if weight.requires_grad]


def weight_decay_groups(module: nn.Module, parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of parameters: weights of layers, which decay, and biases, norms, embeddings and positions, which do not.

    Source: minGPT, whose groups the published code of CAT (Lin et al., CVPR 2023) follows.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    decaying = {id(layer.weight) for layer in layers}
    decaying -= {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}  # tied to a layer
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decaying]},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, first_step: int = 0) -> LambdaLR:
    """The learning rate over the steps from `first_step` on. It is not prepared by accelerate, which would step it once
    per process."""
    return get_scheduler(
        train.lr_scheduler,
        optimizer,
        num_warmup_steps=train.lr_warmup_steps,
        num_training_steps=max(1, train.steps - first_step),
        num_cycles=train.lr_num_cycles,
    )


def set_learning_rates(schedule: LambdaLR) -> None:
    """Sets the rates that a schedule has at its step, after its step or its rates at the start have changed."""
    rates = [base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> bool:
    """Scales the gradients to a norm of at most `max_norm`; None leaves them as they are.

    Returns:
        Whether the norm is finite. All processes decide alike, because they look at the same summed gradient.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_norm or math.inf)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return bool(torch.isfinite(torch.as_tensor(norm)))


def optimizer_step(
    accelerator: Accelerator, optimizers: list[torch.optim.Optimizer], schedules: list[LambdaLR], finite: bool
) -> None:
    """Changes the weights, unless the gradient is not finite, and clears the gradients."""
    for optimizer, schedule in zip(optimizers, schedules):
        # The gradient scaler of fp16 has to see a gradient that is not finite: it skips the step itself and lowers its
        # scale.
        if finite or accelerator.scaler is not None:
            optimizer.step()
        if finite:
            schedule.step()
        optimizer.zero_grad(set_to_none=True)


class Ema:
    """diffusers' `EMAModel` of one model, in float32, that lends its weights to the model for the length of a block.

    Step t, counted from 1, is average <- d average + (1 - d) weights, where d is `decay`, or, with `warmup`,
    min(decay, t / (9 + t)), and 0 in the first step: early on the average is of few weights, and it reaches a decay of
    0.9999 after 90,000 steps.

    Args:
        model: not wrapped for distribution; it may be sharded.
        decay: 0 keeps no average, and the model as it is.
        device: where the average is kept.
        warmup: LDM and diffusers have it; LightningDiT, DiT, SiT and MAR have a constant decay.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | str = "cpu", *, warmup: bool = True):
        self.model = model
        self.average: EMAModel | None = None
        if decay:
            constant = {} if warmup else {"min_decay": decay, "update_after_step": -1}
            self.average = EMAModel(local_shards(model), decay=decay, **constant)
            self.average.to(device, dtype=torch.float32)

    def step(self) -> None:
        if self.average is not None:
            self.average.step(local_shards(self.model))

    @torch.no_grad()
    def multiply(self, weights: Sequence[Tensor], factor: float) -> None:
        """Multiplies weights of the model, and their averages."""
        for weight in weights:
            weight.mul_(factor)
        if self.average is not None:
            chosen = set(weights)
            for parameter, shadow in zip(self.model.parameters(), self.average.shadow_params):
                if parameter in chosen:
                    shadow.mul_(factor)

    def __enter__(self) -> nn.Module:
        if self.average is not None:
            self.average.store(local_shards(self.model))
            self.average.copy_to(local_shards(self.model))
        return self.model

    def __exit__(self, *error: object) -> None:
        if self.average is not None:
            self.average.restore(local_shards(self.model))

    @property
    def num_steps(self) -> int:
        """How many steps the average stands for."""
        return 0 if self.average is None else self.average.optimization_step

    def load(self, path: Path, num_steps: int) -> None:
        """Reads EMA weights that a checkpoint holds."""
        if self.average is None:
            return
        with self as model:
            load_full_state(model, path)
            for shadow, parameter in zip(self.average.shadow_params, local_shards(model)):
                shadow.copy_(parameter.detach())
        self.average.optimization_step = num_steps
