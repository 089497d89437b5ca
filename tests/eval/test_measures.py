"""Measures on plain arrays: closed forms, extremes, and agreement with torch-fidelity on the same features."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from favae.eval.frechet import feature_statistics, frechet_distance
from favae.eval.generation import inception_score, kernel_distance, precision_recall
from favae.eval.measures import retrieval


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
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        feature_statistics(features[:1])


@pytest.mark.parametrize("count", [300, 40])  # 40 < 64 dimensions: rank-deficient
def test_agreement_with_torch_fidelity(count):
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
    logits = rng.normal(size=(count, 10)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=4, shuffle=False)
    ours = inception_score(logits, splits=4)
    assert ours == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-3)
    tensors = torch.from_numpy(fake).float(), torch.from_numpy(real).float()  # its first is the generated one
    ours = precision_recall(real, fake, tile=17)
    theirs = prc_features_to_metric(*tensors, prc_neighborhood=3, verbose=False)
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-3)
    ours = kernel_distance(real, fake, subsets=5, subset_size=30)
    theirs = kid_features_to_metric(*tensors, kid_subsets=5, kid_subset_size=30, verbose=False)
    values = theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]
    assert ours == pytest.approx(values, rel=1e-3)


def test_kernel_distance_is_unbiased_and_by_hand():
    rng = np.random.default_rng(0)
    same = [kernel_distance(*rng.normal(size=(2, 50, 4)), subsets=1, subset_size=50)[0] for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / len(same) ** 0.5
    a, b = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])  # kernel (xy + 1)^3
    expected = 3.0**3 + 1.0**3 - 2 * (1 + 4.0**3 + 1 + 7.0**3) / 4
    assert kernel_distance(a, b, subsets=3, subset_size=2) == pytest.approx((expected, 0))
    with pytest.raises(ValueError, match="subsets of 3 need that many"):
        kernel_distance(a, b, subset_size=3)


def test_precision_and_recall_know_which_is_which():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 8))
    collapsed = real[:1] + 1e-3 * rng.normal(size=(400, 8))
    precision, recall = precision_recall(real, collapsed)
    assert precision > 0.99 and recall < 0.02
    scattered = 10 * rng.normal(size=(400, 8))
    assert precision_recall(real, scattered)[0] < 0.05
    assert precision_recall(real, real) == (1, 1)
    with pytest.raises(ValueError, match="more than 3 images on each side, got 400 and 3"):
        precision_recall(real, real[:3])


def test_inception_score_extremes():
    sure = 50 * np.eye(10)[np.arange(100) % 10]
    assert inception_score(sure, splits=1)[0] == pytest.approx(10, rel=1e-3)
    assert inception_score(np.zeros((100, 10)), splits=1)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="10 splits need as many images, got 5"):
        inception_score(np.zeros((5, 3)))


def test_retrieval_counts_what_is_near_and_what_chance_gives():
    angles = np.deg2rad([0, 10, 20, 90, 100])
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1) * [[1], [5], [0.1], [2], [1]]  # lengths do not count
    samples = np.deg2rad([1, 91])
    samples = np.stack([np.cos(samples), np.sin(samples)], axis=1)
    relevant = np.zeros((2, 5), bool)
    relevant[0, 0] = relevant[1, [2, 4]] = True  # the nearest; the second nearest
    rates, chance = retrieval(samples, gallery, relevant, top=(1, 2, 5))
    assert rates == {1: 0.5, 2: 1.0, 5: 1.0}
    assert chance == pytest.approx({1: (1 / 5 + 2 / 5) / 2, 2: (2 / 5 + (1 - 3 / 10)) / 2, 5: 1.0})
    nothing, without = retrieval(samples, gallery, np.zeros((2, 5), bool))
    assert nothing == without == {1: 0.0, 5: 0.0}
    with pytest.raises(ValueError, match=r"shape \(2, 5\), got \(5, 2\)"):
        retrieval(samples, gallery, relevant.T)
    with pytest.raises(ValueError, match=r"in 1 ... 5, got \(6,\)"):
        retrieval(samples, gallery, relevant, top=(6,))


def test_retrieval_at_random_is_chance():
    rng = np.random.default_rng(0)
    samples, gallery = rng.normal(size=(2000, 8)), rng.normal(size=(40, 8))
    rates, chance = retrieval(samples, gallery, rng.random((2000, 40)) < 0.1)
    assert all(rates[k] == pytest.approx(chance[k], abs=0.03) for k in (1, 5)) and chance[1] == pytest.approx(
        0.1, abs=0.01
    )
