"""How close generated images are to real ones.

    python -m favae.eval.generation --pipeline runs/generator/final --reference imagenet/train --guidance-scale 1 1.5 \\
        --num-images 50000 --output runs/generation
    python -m favae.eval.generation --samples FOLDER-OR-NPZ --reference VIRTUAL_imagenet256_labeled.npz --output ...
    torchrun --nproc_per_node 8 -m favae.eval.generation ...

A pipeline (class-conditional with a transformer, of texts, or without a condition) is sampled into <output>/samples/,
once for each guidance scale and seed; classes in turn unless --labels random, the lines of --prompts in turn. Image i
has its own seed: the number of processes changes nothing, and a killed command goes on when it is run again. Folders
and .npz files are measured as they are.
Prints a table; writes results.json and samples.png.

FID, sFID, precision and recall (k = 3, Inception's 2,048 features) follow ADM's evaluator, IS (10 parts; at 50,000
images ADM's 5,000 each) and KID torch-fidelity; numbers on other features have other names. Precision and recall look
at 10,000 real images at most, as ADM's do.
"""

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

import favae  # noqa: F401  its pipelines become known to DiffusionPipeline
from favae.data.sources import add_data_arguments, open_data_arguments
from favae.distributed import process_state
from favae.errors import DataError, FavaeError
from favae.eval.extraction import ImageStatistics, image_statistics
from favae.eval.features import (
    FeatureExtractor,
    add_feature_arguments,
    metric_name,
    open_extractors,
)
from favae.eval.figures import save_samples
from favae.eval.frechet import frechet_distance
from favae.eval.image_sets import SampleFolder, open_samples, write_npz
from favae.eval.measures import KERNEL_SUBSET_SIZE, inception_score, kernel_distance, precision_recall
from favae.eval.references import Reference
from favae.eval.results import UINT8, format_table, one_line, shown_metrics, write_results
from favae.eval.sampling import class_names, sample_to_folder
from favae.models.token_heads import DEFAULT_STEPS

__all__ = ["inception_score", "kernel_distance", "measure", "precision_recall"]

logger = logging.getLogger(__name__)

NEIGHBOURS = 3
OF_TOKENS = ("temperature", "top_k", "top_p")
SHOWN = {"guidance_scale": "guidance", "seed": "seed"}


def measure(samples: ImageStatistics, reference: ImageStatistics) -> dict[str, float | None]:
    """All measures of one extractor, by the names they may be called.

    Args:
        samples: of the generated images, with all features and logits.
    Returns:
        None for a measure that there are too few images for, or that lacks its part of the reference; why is logged.
    """
    fake, kept = samples.kept, reference.kept
    results: dict[str, float | None] = {}

    def attempt(names: str, calculate: Callable[[], Sequence[float]], *needed) -> None:
        keys = [metric_name(name, reference.features) for name in names.split()]
        try:
            if any(part is None for part in needed):
                raise ValueError("too few images, or the reference has none")
            results.update(zip(keys, calculate()))
        except ValueError as error:
            logger.warning("no %s: %s", ", ".join(keys), error)
            results.update(dict.fromkeys(keys))

    def distance(prefix: str) -> None:
        moments = [getattr(side, f"{prefix}{key}") for side in (reference, samples) for key in ("mean", "covariance")]
        attempt("sFID" if prefix else "FID", lambda: (frechet_distance(*moments),), *moments)

    distance("")
    if samples.spatial_mean is not None and reference.spatial_mean is not None:
        distance("spatial_")
    if samples.logits is not None:
        # consecutive parts must not follow the classes
        order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0)).numpy()
        attempt("IS IS_std", lambda: inception_score(samples.logits[order], score_splits(len(fake))))
    device = process_state().device
    attempt("precision recall", lambda: precision_recall(kept, fake, NEIGHBOURS, device=device), kept)
    subset = 0 if kept is None else min(KERNEL_SUBSET_SIZE, len(kept), len(fake))
    attempt("KID KID_std", lambda: kernel_distance(kept, fake, subset_size=subset), kept)
    return results


def score_splits(count: int) -> int:
    """10, fewer below 1,000 images."""
    return min(10, max(1, count // 100))


def measure_samples(
    samples: Dataset,
    references: Sequence[ImageStatistics],
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[dict[str, float | None], int]:
    """All measures of a set of images with all extractors, and how many images could be read.

    All processes take part; the main one has the measures.
    """
    found = image_statistics(
        samples, extractors, logits=True, batch_size=batch_size, num_workers=num_workers, description="samples"
    )
    metrics = {}
    if process_state().is_main_process:
        for entry, reference in zip(found, references):
            metrics |= measure(entry, reference)
    process_state().wait_for_everyone()
    return metrics, found[0].count


def protocol_of(
    references: Sequence[ImageStatistics], extractors: Sequence[FeatureExtractor], size: tuple[int, int], count: int
) -> dict:
    """What every result of this module records, beside how the samples came about."""
    return {
        "num_images": count,
        "resolution": list(size),
        "features": {extractor.name: extractor.hash for extractor in extractors},
        "reference": {r.features: {"hash": r.hash, "num_images": r.count} for r in references},
        "reference_crop": "center",
        "is_splits": score_splits(count),
    }


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pipeline", help="a saved pipeline to sample: folder or hub name")
    parser.add_argument("--trust-remote-code", action="store_true", help="of a pipeline prepared for the Hub")
    what.add_argument("--samples", help="images that are there: a folder, or an .npz (arr_0)")
    add_data_arguments(parser, "--reference", split="train")
    parser.add_argument("--output", type=Path, required=True)
    add_feature_arguments(parser)
    sampling = parser.add_argument_group("with --pipeline")
    sampling.add_argument("--num-images", type=int, default=50_000)
    sampling.add_argument("--labels", choices=["balanced", "random"], default="balanced")
    sampling.add_argument("--prompts", type=Path, help="a file of texts, one per line, for a text-to-image pipeline")
    sampling.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0], help="1 is without guidance")
    sampling.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="of time, 1 = data")
    sampling.add_argument("--num-inference-steps", type=int, help="(default: 50; of CAT's flow head 25, per token)")
    sampling.add_argument("--seed", type=int, nargs="+", default=[0])
    sampling.add_argument("--temperature", type=float, help="of an autoregressive pipeline, as the next two")
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--top-p", type=float)
    parser.add_argument("--write-npz", action="store_true", help="the samples for ADM's evaluator too, shuffled")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(arguments)
    except (FavaeError, OSError, ValueError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with the samples that are missing")


def run(arguments: argparse.Namespace) -> None:
    extractors = open_extractors(arguments)
    reference = Reference(arguments.data, extractors, lambda: open_data_arguments(arguments))
    if arguments.pipeline:
        sets, protocol, names = _sample(arguments)
    else:
        unknown = dict.fromkeys(("labels", "prompts", "sampler", "shift", "guidance_interval", "num_inference_steps"))
        unknown |= dict.fromkeys(("posterior", *OF_TOKENS))
        sets, protocol, names = [({}, open_samples(arguments.samples))], unknown | {"uint8": "as given"}, None
    loading = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
    size = sets[0][1].size
    references = reference.statistics(size, **loading)

    output, rows = arguments.output, []
    for about, samples in sets:
        metrics, count = measure_samples(samples, references, extractors, **loading)
        rows.append({"model": arguments.pipeline or arguments.samples, **about, "metrics": metrics})
        found = protocol_of(references, extractors, size, count) | protocol | {"reference_name": arguments.data}
        if process_state().is_main_process:  # after each set, so that nothing is lost when a later one fails
            write_results(output, "generation", found, rows)
    if not process_state().is_main_process:
        return
    for about, samples in sets:
        name = "-".join(["samples", *_slug(about)] if len(sets) > 1 else ["samples"])
        save_samples(output / f"{name}.png", samples, names)
        if arguments.write_npz:
            write_npz(output / f"{name}.npz", samples)
    print(f"{rows[0]['model']}: {found['num_images']:,} images against {arguments.data}")
    print(format_table([{"": _label(row), **shown_metrics(row)} for row in rows]))


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not empty. Raises `DataError` if there is none."""
    if not file.is_file():
        raise DataError(f"--prompts: no such file: {file}")
    try:
        prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"--prompts: {file} is not UTF-8 text") from None
    if not prompts:
        raise DataError(f"--prompts: {file} is empty; it has a text per line")
    return prompts


def _slug(about: dict) -> list[str]:
    return [f"{key}-{value}" for key, value in about.items()]


def _label(row: dict) -> str:
    return ", ".join(f"{name} {row[key]}" for key, name in SHOWN.items() if key in row) or "samples"


def _sample(arguments: argparse.Namespace) -> tuple[list[tuple[dict, SampleFolder]], dict, list[str] | None]:
    """Samples a pipeline; returns the sets with their guidance and seed, the protocol, and the classes if in turn."""
    prompts = None if arguments.prompts is None else read_prompts(arguments.prompts)
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline, trust_remote_code=arguments.trust_remote_code)
    pipeline = pipeline.to(process_state().device)
    names = class_names(pipeline)
    autoregressive = not hasattr(pipeline, "scheduler")
    steps = arguments.num_inference_steps
    if autoregressive and pipeline.transformer.config.head != "flow":
        steps = None
    elif steps is None:
        steps = DEFAULT_STEPS if autoregressive else 50
    settings = {} if steps is None else {"num_head_steps" if autoregressive else "num_inference_steps": steps}
    settings |= {key: value for key in OF_TOKENS if (value := getattr(arguments, key)) is not None}
    if arguments.guidance_interval:
        settings["guidance_interval"] = tuple(arguments.guidance_interval)
    if names is None and prompts is None and arguments.guidance_scale != [1.0]:
        raise DataError(f"--guidance-scale: a {type(pipeline).__name__} has no classes to be guided by")
    sets = []
    for scale in arguments.guidance_scale:
        for seed in arguments.seed:
            guidance = {"guidance_scale": scale} if names or prompts else {}
            about = {**guidance, "seed": seed}
            folder = arguments.output / "samples" / "-".join(_slug(about))
            sample_to_folder(
                pipeline,
                folder,
                arguments.num_images,
                labels=arguments.labels,
                prompts=prompts,
                seed=seed,
                batch_size=arguments.batch_size,
                **guidance,
                **settings,
            )
            samples = SampleFolder(folder)
            if len(samples) != arguments.num_images:
                raise DataError(f"{folder} holds {len(samples)} images, not {arguments.num_images}; delete it")
            sets.append((about, samples))
    protocol = {
        "labels": arguments.labels if names else None,
        "prompts": None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "sampler": None if autoregressive else type(pipeline.scheduler).__name__,
        "shift": None if autoregressive else pipeline.scheduler.config.get("shift"),
        "guidance_interval": arguments.guidance_interval,
        "num_inference_steps": steps,
        **{key: getattr(arguments, key) for key in OF_TOKENS},
        "posterior": None,
        "uint8": UINT8,
    }
    return sets, protocol, names if arguments.labels == "balanced" else None


if __name__ == "__main__":
    main()
