"""The figures of a report from the metrics of its requests: one for each prompt, in the prompts' order.

Rates are of summed counts. None stands for what nothing was measured of.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import numpy as np

from edge_runtime.bench.statistics import median_interval, ratio_interval
from edge_runtime.metrics import Metrics
from edge_runtime.text.stream import GenerationResult


def acceptance(requests: list[Metrics]) -> dict[str, Any]:
    """Return how many drafted tokens were kept: the rate, its interval, and the rate by position in a block.

    The rate of a position counts every block that had it, whether or not those before it were kept.
    """
    accepted = [metrics.accepted_tokens for metrics in requests]
    proposed = [metrics.proposed_tokens for metrics in requests]
    kept = _sum_positions(metrics.accepted_by_position for metrics in requests)
    drafted = _sum_positions(metrics.proposed_by_position for metrics in requests)
    return {
        "acceptance_rate": round(sum(accepted) / sum(proposed), 4) if any(proposed) else None,
        "acceptance_rate_ci": rounded(ratio_interval(accepted, proposed)),
        "acceptance_by_position": [round(part / whole, 4) for part, whole in zip(kept, drafted, strict=True)],
    }


def speedup(plain: list[Metrics], requests: list[Metrics]) -> dict[str, Any]:
    """Return the median over prompts of the plain time per token divided by the variant's, and its interval."""
    pairs = [(base.tpot_ms, made.tpot_ms) for base, made in zip(plain, requests, strict=True)]
    ratios = [base / made for base, made in pairs if base and made]  # an answer of one token has no time per token
    seconds = sum(metrics.decode_s for metrics in requests)
    return {
        "speedup": round(float(np.median(ratios)), 4) if ratios else None,
        "speedup_ci": rounded(median_interval(ratios)),
        "tokens_per_second": round(num_decoded(requests) / seconds, 3) if seconds else None,
    }


def num_decoded(requests: list[Metrics]) -> int:
    """Return the tokens after each answer's first, which comes from the prompt's forward."""
    return sum(max(0, metrics.new_tokens - 1) for metrics in requests)


def num_equal(answers: list[GenerationResult], plain: list[GenerationResult]) -> int:
    """Return how many answers have the plain ones' tokens."""
    return sum(answer.token_ids == wanted.token_ids for answer, wanted in zip(answers, plain, strict=True))


def _sum_positions(counts: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip_longest(*counts, fillvalue=0)]


def rounded(value: float | tuple[float, float] | None) -> Any:
    """Return a number or both ends of an interval with four decimals."""
    if isinstance(value, tuple):
        return [round(part, 4) for part in value]
    return None if value is None else round(value, 4)
