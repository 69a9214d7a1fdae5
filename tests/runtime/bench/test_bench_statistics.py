"""Bootstrap intervals: they repeat, hold the estimate, narrow with more prompts, and cover what they promise."""

import numpy as np
import pytest

from edge_runtime.bench.statistics import median_interval, ratio_difference_interval, ratio_interval

COVERAGE_TOLERANCE = 0.08
"""Of 200 experiments: 0.95 +- 0.05 by chance, and a percentile bootstrap of 30 values is a little too narrow."""


def test_equal_prompts_have_a_point():
    assert median_interval([2.0] * 5) == (2.0, 2.0)
    assert ratio_interval([1, 2], [2, 4]) == (0.5, 0.5)


def test_nothing_measured_has_none():
    assert median_interval([]) is None
    assert ratio_interval([0, 0], [0, 0]) is None


def test_prompt_without_proposals_does_not_count():
    assert ratio_interval([1, 0, 3], [4, 0, 4]) == ratio_interval([1, 3], [4, 4])


def test_same_data_same_interval():
    values = list(np.random.default_rng(1).random(20))
    assert median_interval(values) == median_interval(values)


def test_ratio_is_of_sums_and_not_a_mean_of_ratios():
    """One prompt with many proposals outweighs many with few."""
    low, high = ratio_interval([900, *[0] * 9], [1000, *[1] * 9])
    assert high == pytest.approx(0.9, abs=0.01)
    assert low == 0  # a resample without that prompt


def test_a_difference_is_of_the_same_prompts():
    """Prompts differ more than drafts do: unpaired, the interval of this difference would hold 0."""
    rates = [0.1 * prompt for prompt in range(1, 10)]
    one, other = ([(int(100 * (rate + better)), 100) for rate in rates] for better in (0.05, 0.0))
    low, high = ratio_difference_interval(one, other)
    assert low == pytest.approx(0.05, abs=0.005)
    assert high == pytest.approx(0.05, abs=0.005)
    assert ratio_difference_interval(other, one) == (pytest.approx(-high), pytest.approx(-low))


def test_interval_covers_as_often_as_it_promises():
    random = np.random.default_rng(2)
    intervals = [median_interval(random.normal(1.0, 0.2, 30)) for _ in range(200)]
    assert abs(np.mean([low <= 1.0 <= high for low, high in intervals]) - 0.95) < COVERAGE_TOLERANCE
