"""Metrics of sets of images, from features or logits as plain arrays. No model is needed.

IS, KID, precision and recall are torch-fidelity's; this module calls it with arrays, in float64 where that matters.
"""

import numpy as np
import torch
from torch.nn import functional as F
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

PROJECTIONS = 1000  # of MIND
CLIP_BANDWIDTH = 10.0  # of CMMD's kernel
DISTANCE_ROWS = 1024  # of the distance matrix in memory at a time: 200 MB at 50,000 images; fewer take longer


def inception_score(logits: np.ndarray, *, splits: int = 10) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)), as mean and standard deviation over consecutive splits.

    Args:
        logits: (N, K), in random order, N >= splits.
    Source: Salimans et al., NeurIPS 2016.
    """
    # One split at a time, because torch-fidelity makes three float64 copies of what it is given.
    parts = torch.from_numpy(logits).tensor_split(splits)
    scores = [isc_features_to_metric(part, splits=1, shuffle=False)["inception_score_mean"] for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    real: np.ndarray, fake: np.ndarray, *, neighbors: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """The share of fakes inside the manifold of the reals (precision), and the reverse (recall).

    The manifold of a set is the union of balls around its points, each of which reaches to the point's k-th neighbor
    in the set.

    Args:
        real, fake: features (N, D) and (M, D), N and M > neighbors.
        neighbors: k, not counting the point itself.
        device: where distances are computed.
    Source: Kynkäänniemi et al., NeurIPS 2019.
    """
    real, fake = (torch.as_tensor(features, dtype=torch.float32, device=device) for features in (real, fake))
    found = prc_features_to_metric(
        fake, real, prc_neighborhood=neighbors, prc_batch_size=DISTANCE_ROWS, save_cpu_ram=True, verbose=False
    )
    return found["precision"], found["recall"]


def kernel_distance(
    real: np.ndarray, fake: np.ndarray, *, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased (KID).

    Args:
        real, fake: features (N, D) and (M, D).
        subsets: random subsets of both; the result is the mean and the standard deviation over them.
        subset_size: images of each side in a subset, without replacement; 2 ... min(N, M).
    Source: Binkowski et al., ICLR 2018.
    """
    real, fake = (torch.as_tensor(features, dtype=torch.float64) for features in (real, fake))
    found = kid_features_to_metric(fake, real, kid_subsets=subsets, kid_subset_size=subset_size, verbose=False)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def projected_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """MIND: 3 D times the mean squared difference of quantiles over 1,000 random directions, always the same ones.

    It is not 0 for two sets of one distribution, and grows as they get smaller: compare values of one N alone.

    Args:
        real, fake: features (N, D) each.
    Raises:
        ValueError: if the shapes differ.
    Source: arXiv 2605.06797.
    """
    if real.shape != fake.shape:
        raise ValueError(f"sets of different sizes: {real.shape}, {fake.shape}")
    directions = np.random.default_rng(0).normal(size=(real.shape[1], PROJECTIONS))
    directions /= np.linalg.norm(directions, axis=0)
    quantiles = [np.sort(np.asarray(features, np.float64) @ directions, axis=0) for features in (real, fake)]
    return float(3 * real.shape[1] * np.square(quantiles[0] - quantiles[1]).mean())


def clip_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """CMMD: 1,000 times the squared maximum mean discrepancy of embeddings of length 1, with a Gaussian kernel.

    On such embeddings the kernel, of bandwidth 10, is linear to 1 %, so that this is about 10 |mean - mean|^2.

    Args:
        real, fake: (N, D) and (M, D), CLIP's; they are normalized here.
    Source: Jayasumana et al., CVPR 2024 (arXiv 2401.09603), with its biased estimate.
    """
    real, fake = (F.normalize(torch.as_tensor(features, dtype=torch.float64), dim=1) for features in (real, fake))

    def mean_kernel(one: torch.Tensor, two: torch.Tensor) -> float:
        rows = [(two @ part.T - 1).div(CLIP_BANDWIDTH**2).exp().sum() for part in one.split(DISTANCE_ROWS)]
        return float(sum(rows)) / (len(one) * len(two))

    return 1000 * (mean_kernel(real, real) + mean_kernel(fake, fake) - 2 * mean_kernel(real, fake))
