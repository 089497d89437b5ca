"""What a run would be, in words."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin

from favae.autoencoders import measure_budget
from favae.training.config import TrainConfig


@contextmanager
def without_memory() -> Iterator[None]:
    """Models are built on the meta device, without torch's warning for each weight that is not copied to it."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
        yield


def describe_tokenizer(vae: ModelMixin, resolution: int) -> str:
    budget = measure_budget(vae, resolution)
    return (
        f"tokenizer: {budget.params:,} parameters, {budget.latent} per {resolution} px image, "
        f"{budget.flops / 1e9:.2f} GFLOP to encode and decode one"
    )


def describe_run(train: TrainConfig, num_images: int | None, num_processes: int) -> str:
    """Batch, steps per epoch and epochs, as far as the number of images is known."""
    batch = train.batch_size * train.gradient_accumulation_steps * num_processes
    text = f"training: {train.steps:,} steps of {batch} images ({num_processes} process(es))"
    if num_images is None:
        return f"{text}; steps per epoch: unknown without data"
    epochs = train.steps * batch / num_images
    return f"{text}; {num_images:,} images, {num_images / batch:,.1f} steps per epoch, {epochs:,.2f} epochs"
