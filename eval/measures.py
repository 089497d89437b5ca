"""Measures of a set of generated images, from features or logits as plain arrays; no model is needed."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.retrieval import retrieval_hit_rate

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000


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


def precision_recall(
    real: np.ndarray, fake: np.ndarray, k: int = 3, *, tile: int = 2048, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """Share of fakes inside the manifold of the reals (precision), and the reverse (recall).

    The manifold of a set is the union of balls around its points that reach to each point's k-th neighbour in the set.

    Args:
        real, fake: features (N, D) and (M, D).
        k: neighbours, not counting the point itself.
        tile: rows compared at a time, which bounds the memory.
        device: where distances are computed.
    Raises:
        ValueError: if a set has k points or fewer.
    Source: Kynkäänniemi et al., NeurIPS 2019.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} images on each side, got {len(real)} and {len(fake)}")
    real, fake = (torch.as_tensor(np.asarray(x), dtype=torch.float32, device=device) for x in (real, fake))

    def radii(points: Tensor) -> Tensor:
        reach = []
        for part in points.split(tile):
            nearest = torch.full((len(part), k + 1), torch.inf, device=device)
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


def kernel_distance(
    real: np.ndarray,
    fake: np.ndarray,
    *,
    subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    degree: int = 3,
    seed: int = 2020,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^degree, unbiased (KID).

    Args:
        real, fake: features (N, D) and (M, D).
        subsets: random subsets of both; the result is their mean and standard deviation.
        subset_size: images of each side in a subset, without replacement.
        seed: of the choice; the default and the order of the draws are torch-fidelity's, so the values are too.
    Raises:
        ValueError: if a side has fewer images than a subset, or a subset fewer than two.
    Source: Binkowski et al., ICLR 2018.
    """
    if subset_size < 2 or min(len(real), len(fake)) < subset_size:
        raise ValueError(f"subsets of {subset_size} need that many images (and 2), got {len(real)} and {len(fake)}")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** degree

    random, pairs = np.random.RandomState(seed), subset_size * (subset_size - 1)
    distances = []
    for _ in range(subsets):
        x = fake[random.choice(len(fake), subset_size, replace=False)].astype(np.float64)
        y = real[random.choice(len(real), subset_size, replace=False)].astype(np.float64)
        within = sum((k.sum() - np.trace(k)) / pairs for k in (kernel(x, x), kernel(y, y)))
        distances.append(within - 2 * kernel(x, y).mean())
    return float(np.mean(distances)), float(np.std(distances))


def retrieval(
    samples: np.ndarray, gallery: np.ndarray, relevant: np.ndarray, top: Sequence[int] = (1, 5)
) -> tuple[dict[int, float], dict[int, float]]:
    """How often one of a sample's k nearest images, by the angle between features, is what its text asked for.

    Args:
        samples, gallery: features (M, D) of generated and (N, D) of real images.
        relevant: (M, N), whether an image of the gallery is what the text of a sample asked for.
        top: values of k.
    Returns:
        The share of samples for each k, and what k images drawn at random would give.
    Raises:
        ValueError: for other shapes, or k not in 1 ... N.
    """
    relevant = np.asarray(relevant, dtype=bool)
    if relevant.shape != (len(samples), len(gallery)):
        raise ValueError(f"relevant must have shape {(len(samples), len(gallery))}, got {relevant.shape}")
    if not all(1 <= k <= len(gallery) for k in top):
        raise ValueError(f"k must be in 1 ... {len(gallery)}, got {tuple(top)}")
    samples, gallery = (F.normalize(torch.as_tensor(np.asarray(x, np.float64)), dim=1) for x in (samples, gallery))
    queries = list(zip(samples @ gallery.T, torch.from_numpy(relevant)))
    rates = {k: float(np.mean([retrieval_hit_rate(*query, top_k=k) for query in queries])) for k in top}
    others = len(gallery) - relevant.sum(axis=1)
    missed = {k: [math.comb(int(n), k) / math.comb(len(gallery), k) for n in others] for k in top}
    return rates, {k: float(1 - np.mean(values)) for k, values in missed.items()}
