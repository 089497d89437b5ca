"""Sets of generated images to measure: one for each guidance scale and seed of a pipeline, or somebody else's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

from favae.distributed import process_state
from favae.errors import DataError, ModelError, one_line
from favae.eval.image_sets import SampleFolder, open_samples
from favae.eval.results import UINT8
from favae.eval.sampling import classes_of, hash_prompts, sample_to_folder, settings_of
from favae.eval.seams import patch_size_of
from favae.models.flow_head import DEFAULT_STEPS
from favae.pipelines import CATPipeline, LightningDiTPipeline
from favae.pipelines.conditions import ConditionalPipeline
from favae.pipelines.solvers import Solver, flow_scheduler, shift_of

SAMPLING_PROTOCOL_KEYS = (
    "labels", "prompts", "sampler", "scheduler", "shift", "guidance_interval", "guidance_channels",
    "num_inference_steps", "temperature", "top_k", "top_p", "dtype",
)  # fmt: skip


@dataclass
class SampleSets:
    """Images to measure.

    Attributes:
        name: the pipeline, the folder or the file they come from.
        sets: for each set, what tells it apart ({"guidance_scale": 1.5, "seed": 0}; {} for given images), and images.
        protocol: how the images were sampled; None for what is not known of given images.
        class_names: the classes that images were sampled of in turn; None if there are none, or in another order.
        patch_size: pixels along each side of what one latent stands for; None if it is not known.
    """

    name: str
    sets: list[tuple[dict, Dataset]]
    protocol: dict
    class_names: list[str] | None = None
    patch_size: int | None = None


def given_samples(path: str, patch_size: int | None = None) -> SampleSets:
    """A folder or an .npz file of images that another program may have sampled.

    Args:
        patch_size: pixels per latent of that program's autoencoder.
    Raises:
        DataError: if it is neither.
    """
    protocol = {**dict.fromkeys(SAMPLING_PROTOCOL_KEYS), "uint8": "as given"}
    return SampleSets(path, [({}, open_samples(path))], protocol, patch_size=patch_size)


def sampling_protocol(pipeline: DiffusionPipeline, settings: Mapping[str, object], **condition: str | None) -> dict:
    """The part of a result's protocol that says how a pipeline was sampled.

    Args:
        settings: what the pipeline was called with. What it was not called with is None.
        condition: `labels` or `prompts`.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    steps = settings.get("num_inference_steps", settings.get("num_head_steps"))
    return {
        **{key: settings.get(key) for key in SAMPLING_PROTOCOL_KEYS},
        "sampler": type(scheduler).__name__ if scheduler else None,
        "scheduler": settings_of(scheduler)[1] if scheduler else None,
        "shift": shift_of(scheduler) if scheduler else None,
        "num_inference_steps": steps,
        **condition,
        "uint8": UINT8,
    }


def sample_pipeline(
    path: str,
    output: Path,
    *,
    num_images: int = 50_000,
    labels: Literal["balanced", "random"] = "balanced",
    prompts: Sequence[str] | None = None,
    guidance_scales: Sequence[float] = (1.0,),
    guidance_interval: Sequence[float] | None = None,
    guidance_channels: int | None = None,
    shift: float | None = None,
    solver: Solver | None = None,
    num_inference_steps: int | None = None,
    seeds: Sequence[int] = (0,),
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    check_size: Callable[[tuple[int, int]], None] = lambda size: None,
    trust_remote_code: bool = False,
) -> SampleSets:
    """Samples a saved pipeline into <output>/samples/, by all processes together.

    Images that were written before, by the same settings, are kept.

    Args:
        path: folder or hub name.
        num_images: per guidance scale and seed.
        labels: of a class-conditional pipeline: classes in turn or at random.
        prompts: of a text-to-image pipeline; taken in turn.
        guidance_interval: first and last time with guidance; 1 is data. None guides at all times.
        guidance_channels: how many of the latent channels are guided, counted from the first; None guides all.
        shift: of the scheduler, in place of the saved one. solver: likewise; see `flow_scheduler`.
        num_inference_steps: 50 by default; for CAT's flow head, its steps per token.
        temperature, top_k, top_p: of an autoregressive pipeline.
        dtype: of the pipeline's weights.
        check_size: see `sample_to_folder`.
    Raises:
        DataError: if the pipeline cannot be sampled like this, or <output>/samples/ holds something else.
        NonFiniteError: if a sample is not finite.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (AttributeError, ImportError, KeyError, TypeError) as error:  # of a class that is not installed
        raise ModelError(f"{path}: no pipeline could be opened here ({one_line(error)})") from error
    saved = pipeline.load_config(path)  # DiTPipeline keeps only one of two classes of one name
    if saved.get("id2label"):
        pipeline.register_to_config(id2label=saved["id2label"])
    pipeline = pipeline.to(process_state().device, getattr(torch, dtype))
    classes = classes_of(pipeline)
    conditional = bool(classes or prompts)
    if not conditional and list(guidance_scales) != [1.0]:
        raise DataError(f"guidance needs classes or prompts, and a {type(pipeline).__name__} has neither")

    if min(guidance_scales) < 1 and not isinstance(pipeline, ConditionalPipeline):
        raise DataError(f"guidance scales below 1 have no effect in a {type(pipeline).__name__}")
    if labels == "random" and not classes:
        raise DataError(f"random labels need classes, and a {type(pipeline).__name__} has none")
    if shift is not None or solver is not None:
        _set_scheduler(pipeline, shift, solver)

    # What is passed to the pipeline, beside the condition.
    options = {
        "guidance_interval": None if guidance_interval is None else list(guidance_interval),
        "guidance_channels": guidance_channels,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    settings = steps_argument(pipeline, num_inference_steps)
    settings |= {name: value for name, value in options.items() if value is not None}

    # One folder for each guidance scale and seed.
    sets = []
    guidances = [{"guidance_scale": scale} for scale in dict.fromkeys(guidance_scales)] if conditional else [{}]
    for guidance in guidances:
        for seed in dict.fromkeys(seeds):
            key = {**guidance, "seed": seed}
            folder = output / "samples" / slug(key)
            sample_to_folder(
                pipeline,
                folder,
                num_images,
                labels=labels,
                prompts=prompts,
                seed=seed,
                batch_size=batch_size,
                check_size=check_size,
                **guidance,
                **settings,
            )
            samples = SampleFolder(folder)
            if len(samples) != num_images:
                raise DataError(f"{folder} holds {len(samples)} images, not {num_images}; delete it")
            sets.append((key, samples))

    condition = {"labels": labels if classes else None, "prompts": hash_prompts(prompts) if prompts else None}
    protocol = sampling_protocol(pipeline, settings, **condition) | {"dtype": dtype}
    vae = getattr(pipeline, "vae", None)
    names = list(classes.values()) if classes and labels == "balanced" else None
    return SampleSets(path, sets, protocol, names, None if vae is None else patch_size_of(vae))


def _set_scheduler(pipeline: DiffusionPipeline, shift: float | None, solver: Solver | None) -> None:
    """Gives a pipeline of flow matching another solver, or another shift of its time steps.

    Raises:
        DataError: if its scheduler has no such setting.
    """
    scheduler = getattr(pipeline, "scheduler", None)
    saved = None if scheduler is None else shift_of(scheduler)
    name = type(pipeline).__name__
    if saved is None:
        raise DataError(f"the scheduler of a {name} has no shift")
    shift = saved if shift is None else shift
    if solver is None:
        key = "flow_shift" if "flow_shift" in scheduler.config else "shift"
        pipeline.register_modules(scheduler=type(scheduler).from_config(scheduler.config, **{key: shift}))
    elif not isinstance(pipeline, LightningDiTPipeline):
        raise DataError(f"another solver is for a LightningDiTPipeline, not for a {name}")
    else:
        pipeline.register_modules(scheduler=flow_scheduler(solver, shift))


def steps_argument(pipeline: DiffusionPipeline, steps: int | None) -> dict[str, Any]:
    """The pipeline's argument for the number of steps; {} for an autoregressive pipeline that takes none.

    Raises:
        DataError: if it takes none, and a number is given.
    """
    if hasattr(pipeline, "scheduler"):
        return {"num_inference_steps": 50 if steps is None else steps}
    if isinstance(pipeline, CATPipeline) and pipeline.transformer.config.head == "flow":
        return {"num_head_steps": DEFAULT_STEPS if steps is None else steps}
    if steps is not None:
        raise DataError(f"this {type(pipeline).__name__} takes no number of steps")
    return {}


def read_prompts(file: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: if there is none, or the file is not UTF-8.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{file} is not UTF-8 text") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{file} is empty; it must have a prompt per line")
    return prompts


def slug(key: dict) -> str:
    """The name of a set in file names: guidance_scale-1.5-seed-0."""
    return "-".join(f"{name}-{value}" for name, value in key.items())
