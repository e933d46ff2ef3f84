"""How sure a share of right pairs is, and whether two models differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
RESAMPLES = 10_000


def standard_error(points: Sequence[float]) -> float | None:
    """Sample standard deviation over the root of the number; None below two."""
    if len(points) < 2:
        return None
    return float(np.std(points, ddof=1)) / math.sqrt(len(points))


def wilson_interval(share: float, count: float, z: float = Z_95) -> tuple[float, float]:
    """The interval of Wilson (1927) around a share of ``count`` trials; 95 % by default.

    Unlike share +- 2 standard errors it stays within 0 and 1 and has a width where all trials went the same way.
    """
    if count <= 0:
        raise ValueError(f"an interval needs at least one trial, not {count}")
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # Where all trials went the same way one end is the share itself, which rounding would put beside it.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same pairs.

    Attributes:
        pairs: that both models have.
        difference: of the accuracies, the second's minus the first's.
        low, high: its 95 % interval, by resampling the pairs (percentile bootstrap).
        first_only, second_only: pairs that only this model has right; a tie is in neither.
        p_value: of McNemar's exact test on these two numbers, two-sided.
    """

    pairs: int
    difference: float
    low: float
    high: float
    first_only: int
    second_only: int
    p_value: float


def compare(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Comparison:
    """Compare two models by their points (1 right, 0 wrong, between for ties) on the same pairs, in the same order.

    Raises:
        ValueError: no pairs, or not the same number.
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
    """McNemar's exact test: how likely a split at least as uneven is, if either side is as likely."""
    total = first_only + second_only
    if total == 0:
        return 1.0
    ways = tail = 1  # of none, at most none
    for k in range(min(first_only, second_only)):
        ways = ways * (total - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)
