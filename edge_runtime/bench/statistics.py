"""Confidence intervals over prompts: percentile bootstrap (Efron 1979) with a fixed seed, so that reports repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0

Interval = tuple[float, float]


def median_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of the median of one value for each prompt; None without values."""
    return _bootstrap(np.asarray(values), lambda samples: np.median(samples, axis=1))


def ratio_interval(parts: Sequence[int], wholes: Sequence[int]) -> Interval | None:
    """Return the interval of sum(parts) / sum(wholes), with one of each for each prompt; None where all wholes are 0.

    Prompts are drawn, not the events within them, which depend on each other.
    """
    pairs = [(part, whole) for part, whole in zip(parts, wholes, strict=True) if whole]
    return _bootstrap(np.asarray(pairs), lambda samples: samples[..., 0].sum(axis=1) / samples[..., 1].sum(axis=1))


def ratio_difference_interval(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> Interval | None:
    """Return the interval of the difference of two such ratios over the same prompts, drawn together.

    Args:
        one: Part and whole of each prompt.
        other: Values of the other variant, in the same order.
    """
    both = [(*a, *b) for a, b in zip(one, other, strict=True) if a[1] and b[1]]

    def difference(samples: NDArray[Any]) -> NDArray[Any]:
        sums = samples.sum(axis=1)
        result: NDArray[Any] = sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
        return result

    return _bootstrap(np.asarray(both), difference)


def _bootstrap(prompts: NDArray[Any], statistic: Callable[[NDArray[Any]], NDArray[Any]]) -> Interval | None:
    """Return the interval of a statistic of (N, ...) values, which takes (RESAMPLES, N, ...) to (RESAMPLES,)."""
    if not len(prompts):
        return None
    drawn = np.random.default_rng(SEED).integers(0, len(prompts), (RESAMPLES, len(prompts)))
    low, high = np.quantile(statistic(prompts[drawn]), ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)
