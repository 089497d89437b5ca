"""The Fréchet distance between two Gaussians."""

import numpy as np
import scipy.linalg

ROWS_AT_A_TIME = 1024  # that are added to a covariance


class RunningStatistics:
    """Mean and covariance of features (N, D) that come in batches, in float64. Sums of several processes can be added.

    Attributes:
        count: rows so far.
        total: (D,), their sum. scatter: (D, D), the sum of their outer products.
    """

    def __init__(self, dimensions: int):
        self.count = 0
        self.total = np.zeros(dimensions)
        self.scatter = np.zeros((dimensions, dimensions))
        self._waiting: list[np.ndarray] = []

    def update(self, features: np.ndarray) -> None:
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= ROWS_AT_A_TIME:
            self.flush()

    def flush(self) -> None:
        """Adds the rows that wait for a full chunk. Call this before reading the sums."""
        features = np.concatenate(self._waiting) if self._waiting else np.zeros((0, len(self.total)))
        self._waiting = []
        for start in range(0, len(features), ROWS_AT_A_TIME):
            rows = np.asarray(features[start : start + ROWS_AT_A_TIME], dtype=np.float64)
            self.count += len(rows)
            self.total += rows.sum(axis=0)
            self.scatter += rows.T @ rows

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D) of at least two rows."""
        self.flush()
        mean = self.total / self.count
        return mean, (self.scatter - self.count * np.outer(mean, mean)) / (self.count - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), N >= 2, in float64."""
    statistics = RunningStatistics(features.shape[1])
    for start in range(0, len(features), ROWS_AT_A_TIME):
        statistics.update(features[start : start + ROWS_AT_A_TIME])
    return statistics.finish()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64.

    tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of S1 S2. These are the eigenvalues of the
    symmetric matrix L^T S1 L with S2 = L L^T, or of S2^(1/2) S1 S2^(1/2) where N < D leaves S2 without full rank, so
    that nothing becomes complex.

    Args:
        mu1, mu2: (D,). sigma1, sigma2: (D, D), symmetric.
    Returns:
        The distance, >= 0 up to rounding.
    Raises:
        ValueError: if shapes differ, or something is not finite.
    Source: Heusel et al., NeurIPS 2017 (FID); Dowson and Landau, 1982.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape or sigma1.shape != (mu1.size, mu1.size):
        raise ValueError(f"statistics of different sizes: {mu1.shape}, {sigma1.shape}, {mu2.shape}, {sigma2.shape}")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics are not finite")
    try:
        # The transpose of a symmetric matrix is the same in LAPACK's order, and is not copied.
        eigenvalues = scipy.linalg.eigvalsh(sigma1.T, sigma2.T, type=2, driver="gvx", check_finite=False)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(sigma2)
        root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
        eigenvalues = np.linalg.eigvalsh(root @ sigma1 @ root)
    cross = np.sqrt(eigenvalues.clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
