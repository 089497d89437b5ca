"""How close generated images are to real ones.

    python -m favae.eval.generation --pipeline runs/generator/final --reference imagenet/train --guidance-scale 1 1.5 \\
        --num-images 50000 --output runs/generation
    python -m favae.eval.generation --samples FOLDER-OR-NPZ --reference VIRTUAL_imagenet256_labeled.npz --output ...
    torchrun --nproc_per_node 8 -m favae.eval.generation ...

A pipeline (any class-conditional or unconditional one of diffusers) is sampled into <output>/samples/, once for each
guidance scale and seed; classes in turn unless --labels random. Image i has its own seed: the number of processes
changes nothing, and a killed command goes on when it is run again. Folders and .npz files are measured as they are.
Prints a table; writes results.json and samples.png.

FID, sFID, IS, precision and recall (k = 3, Inception's 2,048 features) follow ADM's evaluator, KID torch-fidelity;
numbers on other features have other names. Precision and recall look at 10,000 real images at most, as ADM's do.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

import favae  # noqa: F401  its pipelines become known to DiffusionPipeline
from favae.data.images import DataError, add_data_arguments, open_data_arguments
from favae.distributed import process_state
from favae.errors import FavaeError
from favae.eval.features import (
    FeatureExtractor,
    add_feature_arguments,
    extract_features,
    metric_name,
    open_extractors,
)
from favae.eval.figures import save_samples
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.image_sets import SampleFolder, open_samples, write_npz
from favae.eval.measures import KERNEL_SUBSET_SIZE, inception_score, kernel_distance, precision_recall
from favae.eval.references import Reference, open_references
from favae.eval.results import UINT8, format_metric, format_table, write_results
from favae.eval.sampling import class_names, sample_to_folder

__all__ = ["inception_score", "kernel_distance", "measure", "precision_recall"]

logger = logging.getLogger(__name__)

NEIGHBOURS = 3


def measure(arrays: dict, reference: Reference) -> dict[str, float | None]:
    """All measures on one extractor's features, by the names they may be called.

    Args:
        arrays: of the generated images, see `extract_features`.
    Returns:
        None for a measure that there are too few images for, or that lacks its part of the reference; why is logged.
    """
    fake, kept = arrays["features"], reference.kept
    results: dict[str, float | None] = {}

    def attempt(names: str, calculate: Callable[[], Sequence[float]], needs_images: bool = False) -> None:
        keys = [metric_name(name, reference.features) for name in names.split()]
        try:
            if needs_images and kept is None:
                raise ValueError("the reference has no images")
            results.update(zip(keys, calculate()))
        except ValueError as error:
            logger.warning("no %s: %s", ", ".join(keys), error)
            results.update(dict.fromkeys(keys))

    def distance(features, mean, covariance) -> tuple[float]:
        return (frechet_distance(mean, covariance, *feature_statistics(features)),)

    attempt("FID", lambda: distance(fake, reference.mean, reference.covariance))
    if "spatial" in arrays and reference.spatial_mean is not None:
        spatial = arrays["spatial"]
        attempt("sFID", lambda: distance(spatial, reference.spatial_mean, reference.spatial_covariance))
    if "logits" in arrays:
        # consecutive parts must not follow the classes
        order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(0)).numpy()
        attempt("IS IS_std", lambda: inception_score(arrays["logits"][order], score_splits(len(fake))))
    device = process_state().device
    attempt("precision recall", lambda: precision_recall(kept, fake, NEIGHBOURS, device=device), needs_images=True)
    subset = 0 if kept is None else min(KERNEL_SUBSET_SIZE, len(kept), len(fake))
    attempt("KID KID_std", lambda: kernel_distance(kept, fake, subset_size=subset), needs_images=True)
    return results


def score_splits(count: int) -> int:
    """10, fewer below 1,000 images."""
    return min(10, max(1, count // 100))


def measure_samples(
    samples: Dataset,
    references: Sequence[Reference],
    extractors: Sequence[FeatureExtractor],
    *,
    batch_size: int = 32,
    num_workers: int = 0,
) -> tuple[dict[str, float | None], int]:
    """All measures of a set of images on all extractors (all processes take part), and how many could be read."""
    arrays, _ = extract_features(
        samples, extractors, batch_size=batch_size, num_workers=num_workers, description="samples"
    )
    metrics = {}
    if process_state().is_main_process:
        for values, reference in zip(arrays, references):
            metrics |= measure(values, reference)
    process_state().wait_for_everyone()
    return metrics, len(arrays[0]["features"])


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pipeline", help="a saved pipeline to sample: folder or hub name")
    what.add_argument("--samples", help="images that are there: a folder, or an .npz (arr_0)")
    add_data_arguments(parser, "--reference", split="train")
    parser.add_argument("--output", type=Path, required=True)
    add_feature_arguments(parser)
    sampling = parser.add_argument_group("with --pipeline")
    sampling.add_argument("--num-images", type=int, default=50_000)
    sampling.add_argument("--labels", choices=["balanced", "random"], default="balanced")
    sampling.add_argument("--guidance-scale", type=float, nargs="+", default=[1.0], help="1 is without guidance")
    sampling.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="of time, 1 = data")
    sampling.add_argument("--num-inference-steps", type=int, default=50)
    sampling.add_argument("--seed", type=int, nargs="+", default=[0])
    sampling.add_argument("--write-npz", action="store_true", help="samples for ADM's evaluator, shuffled")
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(arguments)
    except (FavaeError, OSError, ValueError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with the samples that are missing")


def run(arguments: argparse.Namespace) -> None:
    extractors = open_extractors(arguments)
    state, output, speed = process_state(), arguments.output, (arguments.batch_size, arguments.num_workers)
    if arguments.pipeline:
        sets, protocol, names = _sample(arguments)
    else:
        sets, protocol, names = [({}, open_samples(arguments.samples))], {"labels": "as given"}, None
    references = open_references(
        arguments.data,
        extractors,
        sets[0][1].size,
        open_images=lambda: open_data_arguments(arguments),
        batch_size=speed[0],
        num_workers=speed[1],
    )

    rows = []
    for about, samples in sets:
        metrics, count = measure_samples(samples, references, extractors, batch_size=speed[0], num_workers=speed[1])
        rows.append({"model": arguments.pipeline or arguments.samples, **about, "metrics": metrics})
        found = {
            "num_images": count,
            "resolution": list(samples.size),
            "uint8": UINT8 if arguments.pipeline else "as given",
            "crop": "center",
            "features": [extractor.name for extractor in extractors],
            "reference": {r.features: {"hash": r.hash, "num_images": r.count} for r in references},
            "reference_name": arguments.data,
            "is_splits": score_splits(count),
            **protocol,
        }
        if state.is_main_process:  # after each set, so that nothing is lost when a later one fails
            write_results(output, "generation", found, rows)
    if not state.is_main_process:
        return
    for about, samples in sets:
        name = f"samples-{_slug(about)}.png" if len(sets) > 1 else "samples.png"
        save_samples(output / name, samples, names)
    print(f"{rows[0]['model']}: {found['num_images']:,} images against {arguments.data}")
    shown = [
        {"": _label(about)} | {k: format_metric(k, v) for k, v in row["metrics"].items() if "_std" not in k}
        for (about, _), row in zip(sets, rows)
    ]
    print(format_table(shown))


def _slug(about: dict) -> str:
    return "-".join(f"{key}-{value}" for key, value in about.items())


def _label(about: dict) -> str:
    return ", ".join(f"{key.replace('_scale', '')} {value}" for key, value in about.items()) or "samples"


def _sample(arguments: argparse.Namespace) -> tuple[list[tuple[dict, SampleFolder]], dict, list[str] | None]:
    """Samples a pipeline; returns the sets with their guidance and seed, the protocol, and the classes if in turn."""
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline).to(process_state().device)
    names = class_names(pipeline)
    settings = {"num_inference_steps": arguments.num_inference_steps}
    if arguments.guidance_interval:
        settings["guidance_interval"] = tuple(arguments.guidance_interval)
    sets = []
    for scale in arguments.guidance_scale:
        for seed in arguments.seed:
            about = {"guidance_scale": scale, "seed": seed} if names else {"seed": seed}
            folder = arguments.output / "samples" / "-".join(f"{key}-{value}" for key, value in about.items())
            guidance = {"guidance_scale": scale} if names else {}
            sample_to_folder(
                pipeline,
                folder,
                arguments.num_images,
                labels=arguments.labels,
                seed=seed,
                batch_size=arguments.batch_size,
                **guidance,
                **settings,
            )
            samples = SampleFolder(folder)
            if len(samples) != arguments.num_images:
                raise DataError(f"{folder} holds {len(samples)} images, not {arguments.num_images}; delete it")
            if arguments.write_npz and process_state().is_main_process:
                write_npz(folder.with_name(f"{folder.name}.npz"), samples)
            sets.append((about, samples))
    scheduler = pipeline.scheduler
    protocol = {
        "labels": arguments.labels if names else None,
        "sampler": type(scheduler).__name__,
        "shift": scheduler.config.get("shift"),
        "guidance_interval": arguments.guidance_interval,
        "num_inference_steps": arguments.num_inference_steps,
        "posterior": None,
    }
    return sets, protocol, names if arguments.labels == "balanced" else None


if __name__ == "__main__":
    main()
