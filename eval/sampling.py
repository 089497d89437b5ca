"""Images of a pipeline, written to a folder: the same images for any number of processes, and after a kill."""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from favae.data.images import to_uint8
from favae.distributed import everyone, image_generator, main_process_does, process_state
from favae.errors import DataError, NonFiniteError
from favae.files import SETTINGS_FILE, atomic_path, is_unwritten, lock_folder, read_json, write_text
from favae.hashing import hash_model
from favae.models.class_conditional import num_classes
from favae.models.hub import LATENT_RGB_KEYS
from favae.pipelines.conditions import ConditionalPipeline

OTHERWISE = "sample it with your own code, and evaluate the folder of images"


@torch.no_grad()
def sample_to_folder(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    count: int,
    *,
    labels: Literal["balanced", "random"] = "balanced",
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    check_size: Callable[[tuple[int, int]], None] = lambda size: None,
    **settings,
) -> None:
    """Writes 000000.png, 000001.png, ... into a folder, by all processes together. Images that exist are kept.

    Batches always hold the same consecutive images, every image has random numbers of its own, and schedulers that use
    the global random numbers find them seeded by batch. So every image is a function of these arguments alone.

    Args:
        pipeline: is called with `class_labels`, with `prompt`, or without a condition with `batch_size`, and with
            `output_type="np"`.
        labels: whether the classes of a class-conditional pipeline are taken in turn or at random.
        prompts: of a text-to-image pipeline; taken in turn.
        check_size: is called with the height and width of the first images, and raises `DataError` if others should
            not be made.
        settings: passed to the pipeline (`guidance_scale`, `num_inference_steps`, ...).
    Raises:
        FolderInUse: if another process is writing there.
        DataError: if the folder holds other images, or samples of other settings, or the pipeline cannot be called so.
        NonFiniteError: if an image is not finite; the batches before it are kept.
    """
    folder, state = Path(folder), process_state()

    # The condition of each image, and a record of everything that determines the images.
    classes = classes_of(pipeline)
    _check_call(pipeline, classes, prompts, settings)
    if prompts is not None:
        conditions = {"prompt": [prompts[i % len(prompts)] for i in range(count)]}
    elif classes is not None:
        conditions = {"class_labels": class_labels(count, list(classes), labels, seed)}
    else:
        conditions = {}
    plan = {"count": count, "labels": labels if classes else None, "classes": list(classes or [])}
    plan |= {"seed": seed, "batch_size": batch_size}
    if prompts is not None:
        plan |= {"prompts": hash_prompts(prompts), "max_length": pipeline.config.get("max_length")}
    scheduler = getattr(pipeline, "scheduler", None)
    plan |= {"pipeline": pipeline_hash(pipeline), "scheduler": scheduler and settings_of(scheduler), **settings}

    # This process's batches of which an image is missing.
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    pipeline.set_progress_bar_config(disable=True)
    failure = None
    with _writing_samples(folder, json.loads(json.dumps(plan, default=str))):
        missing = [batch for batch in mine if not all(image_file(folder, i).exists() for i in batch)]
        for batch in tqdm(missing, desc="sampling", disable=not state.is_main_process):
            try:
                images = _sample_batch(pipeline, batch, conditions, seed, settings)
                check_size(tuple(images.shape[1:3]))
            except (NonFiniteError, DataError) as error:
                failure = type(error)(f"samples {batch.start} to {batch[-1]}: {error}")
                break
            for i, image in zip(batch, to_uint8(images * 2 - 1)):
                with atomic_path(image_file(folder, i)) as temporary:
                    Image.fromarray(image.squeeze(-1).numpy()).save(temporary, format="PNG", compress_level=1)
        all_whole = everyone(failure is None)

    # All processes fail together.
    if not all_whole:
        raise failure or NonFiniteError("another process's samples are not finite, or of another size")


def _sample_batch(
    pipeline: DiffusionPipeline, batch: range, conditions: dict[str, list], seed: int, settings: dict
) -> Tensor:
    """The images with these indices: (B, H, W, C) in [0, 1], on the CPU. Raises `NonFiniteError`."""
    condition = {name: [values[i] for i in batch] for name, values in conditions.items()}
    condition = condition or {"batch_size": len(batch)}
    generators = [image_generator(seed, i) for i in batch]
    device = process_state().device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(generators[0].initial_seed())
        images = pipeline(**condition, generator=generators, output_type="np", **settings).images
    images = torch.from_numpy(np.asarray(images))
    if not torch.isfinite(images).all():  # pipelines of others do not look
        raise NonFiniteError("its images are not finite; try float32, or check that tokenizer and generator match")
    return images


def image_file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"


# ----------------------------------------------------------------------------------------------------------------------
# Conditions


def classes_of(pipeline: DiffusionPipeline) -> dict[int, str] | None:
    """Indices and names of the classes of a class-conditional pipeline, in order.

    None for a pipeline without `class_labels`, or without classes.

    Raises:
        DataError: if there are classes, but nothing says how many.
    """
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return None
    if not hasattr(pipeline, "transformer"):
        raise DataError(f"the number of classes of a {type(pipeline).__name__} is not known; {OTHERWISE}")
    count = num_classes(pipeline.transformer)
    if count == 0:
        return None
    # DiTPipeline keeps nothing but `labels`, of name to index.
    names = {index: name for name, index in getattr(pipeline, "labels", {}).items()}
    names |= {int(index): name for index, name in (pipeline.config.get("id2label") or {}).items()}
    # A transformer may be built for more classes than it was trained on: those it was trained on have names.
    return {i: str(names[i]) for i in sorted(names)} or {i: str(i) for i in range(count)}


def class_labels(count: int, classes: Sequence[int], order: Literal["balanced", "random"], seed: int) -> list[int]:
    """The class of each image: "balanced" takes classes in turn, "random" takes them at random."""
    if order == "balanced":
        return [classes[i % len(classes)] for i in range(count)]
    return [classes[i] for i in np.random.default_rng(seed).integers(len(classes), size=count)]


def hash_prompts(prompts: Sequence[str]) -> str:
    """SHA-256 of the prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether a pipeline generates images of texts. One of ours may take them, and its transformer have none."""
    if isinstance(pipeline, ConditionalPipeline):
        return pipeline.transformer.config.get("text_dim") is not None
    return "prompt" in inspect.signature(pipeline.__call__).parameters


def _check_call(
    pipeline: DiffusionPipeline, classes: dict[int, str] | None, prompts: Sequence[str] | None, settings: dict
) -> None:
    """Raises `DataError` if the pipeline takes something else than it would be called with."""
    accepted = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    if prompts is None and takes_prompts(pipeline):
        raise DataError(f"a {name} needs prompts")
    if prompts is not None and not takes_prompts(pipeline):
        raise DataError(f"a {name} takes no prompts")
    if prompts is not None and classes is not None:
        raise DataError(f"a {name} of classes and texts is not sampled here; call it with both")
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise DataError(f"a {name} takes no {', '.join(unknown)}; {OTHERWISE}")
    if classes is None and prompts is None and "batch_size" not in accepted:
        raise DataError(f"a {name} takes neither class_labels nor batch_size; {OTHERWISE}")


# ----------------------------------------------------------------------------------------------------------------------
# The record of what a folder was sampled with


def pipeline_hash(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the weights of all its models, and of the configurations of those that are diffusers'.

    The statistics of latents belong to them, because pipelines apply these.
    """
    models = [model for _, model in sorted(pipeline.components.items()) if isinstance(model, nn.Module)]
    return hashlib.sha256("".join(hash_model(model, settings_of(model)) for model in models).encode()).hexdigest()


def settings_of(part: nn.Module | SchedulerMixin) -> list | None:
    """Class and configuration of a part of diffusers, without what says where it comes from, or is for previews."""
    if not isinstance(part, (ModelMixin, SchedulerMixin)):
        return None
    settings = {k: v for k, v in part.config.items() if k not in LATENT_RGB_KEYS and not k.startswith("_")}
    return [type(part).__name__, settings]


@contextmanager
def _writing_samples(folder: Path, plan: dict) -> Iterator[None]:
    """Locks the folder for the block, in which the plan is there.

    Raises:
        DataError: if the folder holds samples of another plan, or something else. Nothing is written then.
        FolderInUse: if another process is writing there.
    """
    file, locks = folder / SETTINGS_FILE, []

    def begin() -> None:
        if not file.is_file() and folder.is_dir() and not is_unwritten(folder):
            raise DataError(f"{folder} holds something other than samples; choose another folder")
        old = read_json(file) if file.is_file() else plan
        changed = [key for key in sorted(set(old) | set(plan)) if old.get(key) != plan.get(key)]
        if changed:
            raise DataError(
                f"{folder} holds samples of another {', '.join(changed)}; delete it, or choose another folder"
            )
        locks.append(lock_folder(folder))
        write_text(file, json.dumps(plan, indent=1))

    main_process_does(begin)
    try:
        yield
    finally:
        for lock in locks:
            lock.close()
