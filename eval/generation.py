"""How close a generator's images are to real ones.

    python -m favae.eval.generation --pipeline runs/generator/final --reference IMAGES --num-images 50000 \\
        --guidance-scale 1 --output runs/generation
    torchrun --nproc_per_node 8 -m favae.eval.generation ...

Samples the pipeline (classes in turn, so that they are balanced; image i has its own seed, so the number of processes
and the batch size change nothing), prints a table and writes results.json and samples.png into the output folder.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

import favae  # noqa: F401  its pipelines become known to DiffusionPipeline
from favae.data.images import (
    DataError,
    ImageDataset,
    add_data_arguments,
    data_name,
    open_data_arguments,
    skip_missing,
    to_uint8,
)
from favae.distributed import process_state
from favae.eval.features import FeatureExtractor, add_feature_arguments, gather_rows, image_generator, own_indices
from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.report import save_samples
from favae.foundation import MissingWeights


def inception_score(logits: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)), as mean and standard deviation over consecutive splits.

    Args:
        logits: (N, K), in random order.
    Raises:
        ValueError: with fewer images than splits.
    Source: Salimans et al., NeurIPS 2016.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many images, got {len(logits)}")
    logits = torch.as_tensor(logits, dtype=torch.float64)
    scores = []
    for part in logits.tensor_split(splits):
        log_p = part.log_softmax(dim=1)
        marginal = log_p.exp().mean(dim=0, keepdim=True)
        scores.append((log_p.exp() * (log_p - marginal.log())).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, tile: int = 2048) -> tuple[float, float]:
    """Share of fakes inside the manifold of the reals (precision), and the reverse (recall).

    The manifold of a set is the union of balls around its points that reach to each point's k-th neighbour in the set.

    Args:
        real, fake: features (N, D) and (M, D).
        k: neighbours, not counting the point itself.
        tile: rows compared at a time, which bounds the memory.
    Raises:
        ValueError: if a set has k points or fewer.
    Source: Kynkäänniemi et al., NeurIPS 2019.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} images on each side, got {len(real)} and {len(fake)}")
    real, fake = (torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (real, fake))

    def radii(points: Tensor) -> Tensor:
        reach = []
        for part in points.split(tile):
            nearest = torch.full((len(part), k + 1), torch.inf)
            for other in points.split(tile):
                candidates = torch.cat([nearest, torch.cdist(part, other)], dim=1)
                nearest = candidates.topk(k + 1, dim=1, largest=False).values
            reach.append(nearest[:, k])
        return torch.cat(reach)

    def covered(points: Tensor, centres: Tensor, reach: Tensor) -> float:
        inside = 0
        for part in points.split(tile):
            tiles = zip(centres.split(tile), reach.split(tile))
            inside += int(torch.stack([(torch.cdist(part, c) <= r).any(dim=1) for c, r in tiles]).any(dim=0).sum())
        return inside / len(points)

    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


@torch.no_grad()
def sample_images(pipeline, labels: list[int], *, seed: int, batch_size: int, **settings) -> Tensor:
    """This process's share of the images with the given labels: uint8 (n, 3, H, W), see `own_indices`.

    Args:
        settings: passed to the pipeline (`guidance_scale`, `num_inference_steps`, ...).
    """
    pipeline.set_progress_bar_config(disable=True)
    images = []
    indices = list(own_indices(len(labels)))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    for batch in tqdm(batches, desc="sampling", disable=not process_state().is_main_process):
        generators = [image_generator(seed, i) for i in batch]
        output = pipeline([labels[i] for i in batch], generator=generators, output_type="pt", **settings)
        images.append(to_uint8(output.images.cpu() * 2 - 1))
    return torch.cat(images)


def extract(extractor: FeatureExtractor, batches, total: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Features (N, D) and logits (N, K), or None, of all processes' images.

    Args:
        batches: this process's, as pairs of places in the whole (n,) and uint8 images (n, 3, H, W).
        total: the places there are.
    """
    places, features, logits = [], [], []
    for indices, images in batches:
        feature, logit = extractor(images)
        places.append(indices)
        features.append(feature)
        logits.append(logit)
    if not places:
        raise DataError("not one of the images can be read")
    places = torch.cat(places)
    gathered = gather_rows(torch.cat(features), places, total).numpy()
    return gathered, None if logits[0] is None else gather_rows(torch.cat(logits), places, total).numpy()


def measure(real: np.ndarray, fake: np.ndarray, fake_logits: np.ndarray | None, splits: int = 10) -> dict:
    """fd, is, is_std, precision, recall from features; `is` is None where the extractor has no classes.

    Precision and recall look at 10,000 of the real images at most, always the same, as ADM's evaluator does.
    """
    chosen = np.random.default_rng(0).permutation(len(real))[:10_000]
    precision, recall = precision_recall(real[chosen], fake)
    order = np.random.default_rng(0).permutation(len(fake))  # consecutive splits must not follow the classes
    score = (None, None) if fake_logits is None else inception_score(fake_logits[order], splits)
    return {
        "fd": frechet_distance(*feature_statistics(real), *feature_statistics(fake)),
        "is": score[0],
        "is_std": score[1],
        "precision": precision,
        "recall": recall,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True, help="a saved pipeline: folder or hub name")
    add_data_arguments(parser, "--reference", split="train")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--output", required=True)
    add_feature_arguments(parser)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"))
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    try:
        run(arguments)
    except (DataError, MissingWeights, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace) -> None:
    extractor = FeatureExtractor(arguments.features, arguments.weights)
    pipeline = DiffusionPipeline.from_pretrained(arguments.pipeline).to(process_state().device)
    resolution = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    reference = ImageDataset(open_data_arguments(arguments), resolution)
    names = pipeline.config.id2label or {i: str(i) for i in range(pipeline.transformer.config.num_classes)}
    names = {int(index): name for index, name in names.items()}
    classes = len(names)

    labels = [i % classes for i in range(arguments.num_images)]
    settings = {
        "guidance_scale": arguments.guidance_scale,
        "guidance_interval": tuple(arguments.guidance_interval),
        "num_inference_steps": arguments.num_inference_steps,
    }
    samples = sample_images(pipeline, labels, seed=arguments.seed, batch_size=arguments.batch_size, **settings)
    mine = torch.tensor(own_indices(len(labels)))
    batches = zip(mine.split(arguments.batch_size), samples.split(arguments.batch_size))
    fake, logits = extract(extractor, batches, len(labels))

    loader = DataLoader(
        Subset(reference, own_indices(len(reference))),
        arguments.batch_size,
        num_workers=arguments.num_workers,
        collate_fn=skip_missing,
    )
    batches = ((batch["index"], to_uint8(batch["image"])) for batch in loader if batch is not None)
    real, _ = extract(extractor, batches, len(reference))
    shown = min(classes, 16)  # in the picture: eight of each of the first classes
    places = torch.tensor([place for place in range(len(labels))[: 8 * classes] if labels[place] < shown])
    here = torch.isin(mine, places)
    grid = gather_rows(samples[here], torch.searchsorted(places, mine[here]), len(places))
    if not process_state().is_main_process:
        return
    result = measure(real, fake, logits, splits=min(10, max(1, len(labels) // 100)))

    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    result |= {
        "num_images": len(labels),
        "features": extractor.name,
        "reference": data_name(arguments),
        "crop": "center",
        "num_reference": len(real),
        "labels": "balanced",
        "sampler": type(pipeline.scheduler).__name__,
        "shift": pipeline.scheduler.config.shift,
        "seed": arguments.seed,
        "num_processes": process_state().num_processes,
        "uint8": "round((x + 1) * 127.5)",
        **settings,
    }
    (output / "results.json").write_text(json.dumps(result, indent=1))
    save_samples(output / "samples.png", grid, [names[i] for i in range(shown)])
    for name, key in (("FID", "fd"), ("IS", "is"), ("precision", "precision"), ("recall", "recall")):
        value = "-" if result[key] is None else f"{result[key]:.4f}"
        print(f"{extractor.metric(name):36} {value}")


if __name__ == "__main__":
    main()
