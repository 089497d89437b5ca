"""Metrics on plain arrays: closed forms, extremes, and agreement with torch-fidelity or brute force."""

import numpy as np
import pytest
from torch_fidelity.metric_fid import fid_statistics_to_metric

from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.metrics import (
    clip_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    projected_distance,
)


def test_frechet_of_gaussians_in_closed_form():
    a, b = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 1.0])
    assert frechet_distance(np.zeros(3), a, np.array([1.0, 2.0, 2.0]), b) == pytest.approx(9 + 1 + 0 + 4)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotated = [rotation @ m @ rotation.T for m in (a, b)]
    assert frechet_distance(np.zeros(3), rotated[0], np.zeros(3), rotated[1]) == pytest.approx(5)
    with pytest.raises(ValueError, match="different sizes"):
        frechet_distance(np.zeros(3), a, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(3), a, np.full(3, np.nan), b)


def test_statistics_are_numpys_in_chunks_and_in_float32():
    features = np.random.default_rng(0).normal(3, 2, size=(9000, 5)).astype(np.float32)
    mean, covariance = feature_statistics(features)
    assert np.allclose(mean, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert np.allclose(covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("count", [300, 40])  # 40 < 64 dimensions: rank-deficient
def test_frechet_agrees_with_torch_fidelity(count):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(count, 64)), rng.normal(0.3, 1.2, size=(count, 64))
    ours = frechet_distance(*feature_statistics(real), *feature_statistics(fake))
    theirs = fid_statistics_to_metric(
        dict(zip(("mu", "sigma"), feature_statistics(real))),
        dict(zip(("mu", "sigma"), feature_statistics(fake))),
        verbose=False,
    )["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(frechet_distance(*feature_statistics(real), *feature_statistics(real))) < 1e-3


def test_kernel_distance_is_unbiased_and_by_hand():
    rng = np.random.default_rng(0)
    same = [kernel_distance(*rng.normal(size=(2, 50, 4)), subsets=1, subset_size=50)[0] for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    a, b = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])  # kernel (xy + 1)^3
    expected = 3.0**3 + 1.0**3 - 2 * (1 + 4.0**3 + 1 + 7.0**3) / 4
    assert kernel_distance(a, b, subsets=3, subset_size=2) == pytest.approx((expected, 0))


def test_projected_distance_of_a_shift_and_its_floor():
    rng = np.random.default_rng(0)
    real, other = rng.normal(size=(2, 4000, 16))
    shift = np.linspace(-1, 1, 16)
    assert projected_distance(real, real[::-1]) == 0
    assert projected_distance(real, real + shift) == pytest.approx(3 * np.square(shift).sum(), rel=0.1)
    assert projected_distance(real, other) == projected_distance(other, real) > 0
    floor = [projected_distance(real[:n], other[:n]) for n in (500, 4000)]
    assert floor[0] > 4 * floor[1] and floor[1] == pytest.approx(3 * 16 * 1.6e-3, rel=0.5)  # 3 tr(S) w(n)
    with pytest.raises(ValueError, match="different sizes"):
        projected_distance(real, other[:10])


def test_clip_distance_is_ten_times_the_squared_distance_of_the_mean_embeddings():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(1500, 32)), 3 * rng.normal(size=(300, 32)) + 2
    means = [(x / np.linalg.norm(x, axis=1, keepdims=True)).mean(axis=0) for x in (real, fake)]
    assert clip_distance(real, fake) == pytest.approx(10 * np.square(means[0] - means[1]).sum(), rel=0.02)
    assert clip_distance(real, fake) == pytest.approx(clip_distance(fake, real))
    assert abs(clip_distance(real, 5 * real)) < 1e-9


def test_precision_and_recall_know_which_is_which():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 8))
    collapsed = real[:1] + 1e-3 * rng.normal(size=(400, 8))
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.02
    scattered = 10 * rng.normal(size=(400, 8))
    assert precision_recall(real, scattered)[0] < 0.05
    assert precision_recall(real, real) == (1, 1)


def test_precision_and_recall_by_all_distances():
    """More images than rows of the distance matrix that are in memory at a time."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(1500, 4)), rng.normal(0.5, 1.2, size=(1100, 4))

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))

    def covered(points, centers):
        radii = np.sort(distances(centers, centers), axis=1)[:, 3]
        return (distances(points, centers) <= radii).any(axis=1).mean()

    expected = covered(fake, real), covered(real, fake)
    assert precision_recall(real, fake, neighbors=3) == pytest.approx(expected, abs=2e-3)


def test_inception_score_extremes():
    sure = 50 * np.eye(10)[np.arange(100) % 10]
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-3)
    assert inception_score(np.zeros((100, 10)), splits=1)[0] == pytest.approx(1)
