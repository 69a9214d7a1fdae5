"""What one decoding step costs, measured by itself, and the speed-up that these costs predict.

A step drafts k tokens and verifies them: d(k) + t(k + 1) seconds, sampling included. With n_k such steps in all answers

    predicted speed-up = tokens * t(1) / sum over k of n_k (d(k) + t(k + 1))

which for steps of one length K is block_efficiency * t(1) / (d(K) + t(K + 1)). Draft and target take turns in the
measurement as they do in decoding, so that each finds the processor's caches as the other left them. What the costs do
not hold: text and pacing, and forwards whose width changes from one to the next, which OpenVINO prepares anew. A draft
reads two tokens after a block that was wholly accepted and one otherwise, and lookup drafts or does not, so that with
models of a few milliseconds the measured speed-up stays below the predicted one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from edge_runtime.decoding.drafters.base import Draft
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, verify
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import CausalModel, Sequence, advance

REPEATS = 5
"""Steps of each length that count for each prompt. They follow one more of the same length, which pays for the
change of width: 1.3 to 2.4 ms for a target whose plain step takes 1.5 (9M int8 parameters, CPU, 2 cores)."""


class Step(NamedTuple):
    """Seconds of one decoding step.

    Attributes:
        draft_s: d(k), drafting k tokens.
        target_s: t(k + 1), the target's forward over the last token and k drafted ones, and their verification.
    """

    draft_s: float
    target_s: float


class FixedText(NamedTuple):
    """A text that steps are measured after; implements `drafters.base.Text`.

    Attributes:
        token_ids: All its tokens.
    """

    token_ids: list[int]


def run_step(
    target: CausalModel,
    sequence: Sequence,
    draft: Draft | None,
    token_ids: list[int],
    num_draft_tokens: int,
    sampler: Sampler,
) -> Step:
    """Draft and verify once; the next step begins with the same text.

    Args:
        target: The model that verifies.
        sequence: One of the target's, which holds `token_ids`, or more.
        draft: Drafts for a text of `token_ids`; None to draft nothing.
        token_ids: The text so far.
        num_draft_tokens: k.
        sampler: With the options of the requests that are to be predicted.
    """
    sequence.rollback(len(token_ids) - 1)
    begin = time.perf_counter()
    proposal = draft.propose(num_draft_tokens, sampler) if draft else NO_PROPOSAL
    drafted = time.perf_counter()
    if len(proposal.token_ids) < num_draft_tokens:  # lookup found nothing here: any tokens cost the target as much
        proposal = Proposal.of_copied((token_ids * num_draft_tokens)[:num_draft_tokens])
    rows = advance(target, sequence, token_ids[-1:] + proposal.token_ids, 1 + num_draft_tokens)
    accepted = verify(rows, proposal, sampler).num_accepted
    sequence.rollback(len(token_ids) + accepted)
    return Step(drafted - begin, time.perf_counter() - drafted)


def median_step(steps: list[Step]) -> Step:
    """Return the median of each part."""
    return Step(median(step.draft_s for step in steps), median(step.target_s for step in steps))


def step_counts(requests: Iterable[Metrics]) -> dict[int, int]:
    """Return how many steps of the requests drafted 0, 1, 2, … tokens; lengths that did not occur are left out."""
    counts: dict[int, int] = defaultdict(int)
    for metrics in requests:
        # How many steps drafted at least k tokens.
        at_least = [metrics.target_forwards, *metrics.proposed_by_position, 0]
        for length in range(len(at_least) - 1):
            counts[length] += at_least[length] - at_least[length + 1]
    return {length: count for length, count in counts.items() if count}


def predicted_speedup(num_tokens: int, counts: dict[int, int], costs: dict[int, float]) -> float | None:
    """Return the speed-up that step costs predict; None where a cost is missing.

    Args:
        num_tokens: Tokens that the counted steps emitted.
        counts: n_k.
        costs: d(k) + t(k + 1), and t(1) for k = 0.
    """
    if not counts or not {0, *counts} <= costs.keys():
        return None
    return num_tokens * costs[0] / sum(count * costs[length] for length, count in counts.items())
