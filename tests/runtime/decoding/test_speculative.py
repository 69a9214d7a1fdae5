"""Verification emits the target's distribution exactly, whatever the draft's is.

Every random answer is enumerated, so probabilities are compared as fractions, without tolerance.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters.draft_model import DraftModel
from edge_runtime.decoding.request import Request
from edge_runtime.decoding.sampling import Categorical, PointMass, Sampler
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, accepts, verify
from edge_runtime.models.base import advance
from tests.runtime.fakes import TableModel, TokenList, exact_distribution, random_table

SAMPLED = GenerationConfig(temperature=1.0)
FOUR = {"p": (1, 4, 2, 1), "q": (4, 2, 1, 1)}
"""Eighths: accepted with 1/4, 1, 1, 1; the residual is 2/3 and 1/3. All of it comes out even in 24 parts."""
PARTS = 24


def logits(weights: tuple[int, ...]) -> np.ndarray:
    """Return (1, V) logits of a distribution; a weight of 0 is a token that cannot occur."""
    with np.errstate(divide="ignore"):
        return np.log(np.array([weights], np.float32))


def one_draft_token(p: tuple[int, ...], q: tuple[int, ...]) -> dict[tuple[int, ...], Fraction]:
    """Return the exact distribution of the first emitted token after drafting one from q."""

    def experiment(random) -> tuple[int, ...]:
        sampler = Sampler(SAMPLED, [0], random)
        drawn_from = sampler.distribution(logits(q)[0])
        proposal = Proposal([drawn_from.sample(random)], [drawn_from])
        rows = np.concatenate([logits(p), logits((1,) + (0,) * (len(p) - 1))])
        return tuple(verify(rows, proposal, sampler).token_ids[:1])

    return exact_distribution(experiment, PARTS)


def as_fractions(weights: tuple[int, ...]) -> dict[tuple[int, ...], Fraction]:
    return {(i,): Fraction(w, sum(weights)) for i, w in enumerate(weights) if w}


@pytest.mark.parametrize(
    ("p", "q"),
    [
        pytest.param(FOUR["p"], FOUR["q"], id="overlapping"),
        pytest.param(FOUR["p"], FOUR["p"], id="draft equals target"),
        pytest.param((1, 1, 0, 0), (0, 0, 1, 3), id="disjoint"),
        pytest.param((1, 2, 1, 0), (0, 1, 1, 2), id="draft lacks a token and adds one"),
        pytest.param((0, 0, 0, 1), (1, 1, 1, 1), id="target certain"),
        pytest.param((1, 1, 1, 1), (0, 0, 1, 0), id="draft certain"),
    ],
)
def test_accept_rule_preserves_target_distribution(p, q):
    """Litgpt and openvino.genai accept by other rules and emit other distributions."""
    assert one_draft_token(p, q) == as_fractions(p)


def test_rejected_token_is_replaced_from_the_residual():
    """openvino.genai draws the replacement from the next position's logits, conditioned on the rejected token."""
    residual = Categorical(None, np.array([1.0, 4, 2, 1])).residual(Categorical(None, np.array([4.0, 2, 1, 1])))
    assert [residual.probability(i) for i in range(4)] == pytest.approx([0, 2 / 3, 1 / 3, 0], abs=1e-15)


def test_copied_token_is_verified_against_a_point_mass():
    """Prompt lookup has no distribution of its own; taking its tokens as certain keeps sampling exact."""

    def experiment(random) -> tuple[int, ...]:
        sampler = Sampler(SAMPLED, [0], random)
        rows = np.concatenate([logits((1, 4, 2, 1)), logits((1, 0, 0, 0))])
        return tuple(verify(rows, Proposal.of_copied([2]), sampler).token_ids[:1])

    assert exact_distribution(experiment, 24 * 7) == as_fractions((1, 4, 2, 1))


def test_everything_accepted_adds_the_bonus_token():
    """The bonus token comes from the last row, conditioned on all drafted tokens."""

    def experiment(random) -> tuple[int, ...]:
        sampler = Sampler(SAMPLED, [0], random)
        block = verify(np.concatenate([logits((0, 1)), logits((0, 1)), logits((3, 1))]), copied, sampler)
        assert block.num_accepted == 2
        return tuple(block.token_ids)

    copied = Proposal.of_copied([1, 1])
    assert exact_distribution(experiment, 4) == {(1, 1, 0): Fraction(3, 4), (1, 1, 1): Fraction(1, 4)}


def test_nothing_drafted_is_plain_sampling():
    def experiment(random) -> tuple[int, ...]:
        return tuple(verify(logits((1, 2, 1)), NO_PROPOSAL, Sampler(SAMPLED, [0], random)).token_ids)

    assert exact_distribution(experiment, 4) == as_fractions((1, 2, 1))


THREE = np.array([[1, 2, 1], [2, 1, 1], [1, 1, 2]])
"""Quarters, by the last token: rejections have one possible replacement, so all comes out even in four parts."""


def three_token_table(weights: np.ndarray) -> np.ndarray:
    """Return the table of a model whose next-token weights are a row of `weights`, chosen by the last token."""
    return np.log(np.broadcast_to(weights, (3, 3, 3)).astype(np.float32))


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3])
@pytest.mark.parametrize("shift", [0, 1, 2], ids=["draft equals target", "shifted", "shifted twice"])
def test_block_has_the_joint_distribution_of_plain_sampling(num_draft_tokens, shift):
    """Right marginals are not enough: the second token must depend on the first as it does in plain sampling.

    Blocks differ in length, so the first two tokens are compared; a block of one is continued by plain sampling.
    """
    p, q = THREE, np.roll(THREE, shift, axis=0)

    def experiment(random) -> tuple[int, ...]:
        sampler = Sampler(SAMPLED, [0], random)
        draft = DraftModel(TableModel(three_token_table(q)), 3).open(Request([0], SAMPLED, 8, TokenList()))
        target = TableModel(three_token_table(p))
        sequence = target.sequence()
        proposal = draft.propose(num_draft_tokens, sampler)
        rows = advance(target, sequence, [0, *proposal.token_ids], num_draft_tokens + 1)
        emitted = verify(rows, proposal, sampler).token_ids
        if len(emitted) == 1:
            sequence.rollback(1)
            emitted += verify(advance(target, sequence, emitted), NO_PROPOSAL, sampler).token_ids
        return tuple(emitted[:2])

    wanted = {(a, b): Fraction(int(p[0, a] * p[a, b]), 16) for a in range(3) for b in range(3)}
    assert exact_distribution(experiment, 4) == wanted


def test_draft_equal_to_target_is_always_accepted():
    """Rounding must not reject: p and q are computed by the same operations."""
    random = np.random.default_rng(0)
    sampler = Sampler(GenerationConfig(temperature=0.7, top_p=0.9, top_k=20), [0], random)
    for row in random_table(30, 1).reshape(-1, 30):
        drawn_from = sampler.distribution(row)
        assert accepts(drawn_from.sample(random), sampler.distribution(row), drawn_from, random)


@pytest.mark.parametrize("draft_size", [3, 4, 6], ids=["narrower draft", "same width", "wider draft"])
def test_residual_of_unequal_widths_keeps_what_only_the_target_has(draft_size):
    """A draft row may be padded to another width than the target's."""
    drawn_from = Categorical(None, np.array([2.0, 1, 1, 0, 0, 0])[:draft_size])
    residual = Categorical(None, np.array([1.0, 1, 1, 1])).residual(drawn_from)
    assert [residual.probability(i) for i in range(4)] == pytest.approx([0, 0, 0, 1])


def test_greedy_keeps_a_draft_while_it_is_the_targets_own_choice():
    """Litgpt accepts by the softmax ratio at temperature 0: 24 % of tokens that were not the argmax went through."""
    sampler = Sampler(GenerationConfig(), [0], np.random.default_rng(0))
    rows = np.concatenate([logits((1, 2, 1)), logits((4, 5, 1)), logits((1, 1, 9))])
    drafted_from = [PointMass(1), PointMass(0)]
    assert verify(rows, Proposal([1, 0], drafted_from), sampler) == ([1, 1], 1)


def test_greedy_decoding_draws_no_random_number():
    """A seed must not matter where nothing is random."""
    sampler = Sampler(GenerationConfig(), [0], None)
    assert verify(logits((1, 2, 1)), NO_PROPOSAL, sampler).token_ids == [1]
    assert verify(np.concatenate([logits((1, 2, 1))] * 2), Proposal([0], [PointMass(0)]), sampler).token_ids == [1]
