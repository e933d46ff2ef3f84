"""Uncertainty of an accuracy, and comparison of two models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


def standard_error(points: Sequence[float]) -> float | None:
    """Sample standard deviation, divided by the root of the number of points; None for fewer than two."""
    if len(points) < 2:
        return None
    return float(np.std(points, ddof=1)) / math.sqrt(len(points))


def wilson_interval(share: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """The interval of Wilson (1927) around a share of ``count`` trials; 95 % by default.

    Unlike share +- 2 standard errors, it stays within 0 and 1, and it has a width even if all trials are equal.
    """
    if count <= 0:
        raise ValueError(f"an interval needs at least one trial, not {count}")
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # If all trials are equal, one end is the share itself; rounding must not move it away.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pairs.

    Attributes:
        pairs: number of pairs that both models have.
        difference: accuracy of the second model minus that of the first.
        low, high: 95 % interval of the difference, by resampling the pairs (percentile bootstrap).
        first_only, second_only: number of pairs that only this model gets right; ties are in neither.
        p_value: two-sided p-value of McNemar's exact test on these two numbers.
    """

    pairs: int
    difference: float
    low: float
    high: float
    first_only: int
    second_only: int
    p_value: float


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compare two models by their points (1 right, 0 wrong, between for ties) on the same pairs in the same order.

    Raises:
        ValueError: there are no pairs, or the numbers differ.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"two models need points on the same pairs, not {len(first)} and {len(second)}")
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    differences = b - a
    random = np.random.default_rng(seed)
    means = [differences[random.integers(len(a), size=len(a))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    first_only, second_only = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return Comparison(
        len(a),
        float(differences.mean()),
        float(low),
        float(high),
        first_only,
        second_only,
        mcnemar_p_value(first_only, second_only),
    )


def mcnemar_p_value(first_only: int, second_only: int) -> float:
    """McNemar's exact test: the probability of a split at least as uneven, if both sides are equally likely."""
    total = first_only + second_only
    if total == 0:
        return 1.0
    ways = tail = 1  # ways to choose k pairs, and at most k pairs, for k = 0
    for k in range(min(first_only, second_only)):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)
