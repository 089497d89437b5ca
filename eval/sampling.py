"""Images of a pipeline, written to a folder: the same ones whatever the number of processes, also after a kill."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from favae.data.images import to_uint8
from favae.data.latents import tokenizer_hash
from favae.distributed import process_state
from favae.errors import DataError, NonFiniteError
from favae.eval.features import everyone, image_generator
from favae.files import atomic_path, write_text
from favae.hashing import hash_model

SETTINGS_FILE = "settings.json"
OWN_SAMPLES = "sample it yourself and give the folder with --samples"


def class_names(pipeline: DiffusionPipeline) -> list[str] | None:
    """The classes of a class-conditional pipeline; None for one without `class_labels`.

    Raises:
        DataError: if there are classes, but none knows how many.
    """
    if "class_labels" not in inspect.signature(pipeline.__call__).parameters:
        return None
    if not hasattr(pipeline, "transformer"):
        raise DataError(f"a {type(pipeline).__name__} has no transformer whose classes are known; {OWN_SAMPLES}")
    config = pipeline.transformer.config
    count = config["num_classes"] if "num_classes" in config else config["num_embeds_ada_norm"]
    names = {index: name for name, index in getattr(pipeline, "labels", {}).items()}  # all that DiTPipeline keeps
    names |= {int(index): name for index, name in (pipeline.config.get("id2label") or {}).items()}
    # of a transformer that was built for more classes than it was trained on, those that have a name
    return [str(names[index]) for index in sorted(names)] or [str(index) for index in range(count)]


def class_labels(count: int, classes: int, kind: str, seed: int) -> list[int]:
    """The class of each image: "balanced" takes classes in turn, "random" draws them.

    Raises:
        DataError: for another kind.
    """
    if kind == "balanced":
        return [i % classes for i in range(count)]
    if kind == "random":
        return np.random.default_rng(seed).integers(classes, size=count).tolist()
    raise DataError(f"labels are balanced or random, got {kind}")


def pipeline_hash(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the weights of all its models, and of the configurations of those that are diffusers'."""
    models = [model for _, model in sorted(pipeline.components.items()) if isinstance(model, nn.Module)]
    hashes = [tokenizer_hash(model) if isinstance(model, ModelMixin) else hash_model(model) for model in models]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@torch.no_grad()
def sample_to_folder(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    count: int,
    *,
    labels: str = "balanced",
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int = 32,
    **settings,
) -> None:
    """Writes 000000.png ... into a folder, by all processes together; those that are there are kept.

    Batches are always the same consecutive images, image i has random numbers of its own, and schedulers that draw
    from the global generator find it seeded by batch: so every image is a function of these arguments alone.

    Args:
        pipeline: called with `class_labels`, with `prompt`, or without a condition with `batch_size`;
            `output_type="np"`.
        prompts: of a text-to-image pipeline; taken in turn.
        settings: passed to it (`guidance_scale`, `num_inference_steps`, ...).
    Raises:
        DataError: if the folder holds other images, or samples of other settings, or the pipeline cannot be called so.
        NonFiniteError: if an image is not finite; those before it are kept.
    """
    folder, state = Path(folder), process_state()
    names = class_names(pipeline)
    accepted = inspect.signature(pipeline.__call__).parameters
    unknown = [key for key in settings if key not in accepted]
    if prompts is None and "prompt" in accepted:
        raise DataError(f"a {type(pipeline).__name__} draws from texts: give them with --prompts")
    if prompts is not None and "prompt" not in accepted:
        raise DataError(f"--prompts: a {type(pipeline).__name__} takes no texts")
    if unknown or (names is None and prompts is None and "batch_size" not in accepted):
        what = f"takes no {', '.join(unknown)}" if unknown else "takes neither class_labels nor batch_size"
        raise DataError(f"a {type(pipeline).__name__} {what}; {OWN_SAMPLES}")
    plan = {"count": count, "labels": labels if names else None, "seed": seed, "batch_size": batch_size}
    if prompts is not None:
        plan["prompts"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    scheduler = getattr(pipeline, "scheduler", None)
    plan |= {"pipeline": pipeline_hash(pipeline), "scheduler": scheduler and dict(scheduler.config), **settings}
    _check_plan(folder, json.loads(json.dumps(plan, default=str)))

    classes = class_labels(count, len(names), labels, seed) if names else None
    pipeline.set_progress_bar_config(disable=True)
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    mine = batches[state.process_index :: state.num_processes]
    missing = [batch for batch in mine if not all(_file(folder, i).exists() for i in batch)]
    bad: list[int] = []
    devices = [state.device] if state.device.type == "cuda" else []
    for batch in tqdm(missing, desc="sampling", disable=not state.is_main_process):
        if prompts is not None:
            which = {"prompt": [prompts[i % len(prompts)] for i in batch]}
        else:
            which = {"class_labels": [classes[i] for i in batch]} if names else {"batch_size": len(batch)}
        generators = [image_generator(seed, i) for i in batch]
        with torch.random.fork_rng(devices):
            torch.manual_seed(image_generator(seed, batch[0]).initial_seed())
            images = pipeline(**which, generator=generators, output_type="np", **settings).images
        images = torch.from_numpy(np.asarray(images))
        bad = [i for i, image in zip(batch, images) if not torch.isfinite(image).all()]
        if bad:
            break
        for i, image in zip(batch, to_uint8(images * 2 - 1)):
            with atomic_path(_file(folder, i)) as temporary:
                Image.fromarray(image.numpy()).save(temporary, format="PNG", compress_level=1)
    if not everyone(not bad):
        which = f"sample {bad[0]} (and {len(bad) - 1} more of its batch)" if bad else "a sample of another process"
        raise NonFiniteError(
            f"{which} is not finite; try float32, or see whether tokenizer and generator belong together"
        )


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06}.png"


def _check_plan(folder: Path, plan: dict) -> None:
    file, state = folder / SETTINGS_FILE, process_state()
    if not file.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder} holds something else than samples of this command; take another --output")
    if file.is_file():
        old = json.loads(file.read_text())
        changed = [key for key in sorted(set(old) | set(plan)) if old.get(key) != plan.get(key)]
        if changed:
            raise DataError(
                f"{folder} holds samples of another {', '.join(changed)}; delete it, or take another --output"
            )
    state.wait_for_everyone()  # nobody writes before everybody has looked
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(plan, indent=1))
    state.wait_for_everyone()
