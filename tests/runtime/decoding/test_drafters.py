"""Draft sources propose what they should, say what it was drawn from, and leave the request's state alone."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters.base import Draft
from edge_runtime.decoding.drafters.draft_model import DraftModel
from edge_runtime.decoding.drafters.lookup import MAX_MATCH, MIN_MATCH, PromptLookup
from edge_runtime.decoding.request import Request
from edge_runtime.decoding.sampling import PointMass, Sampler
from tests.runtime.fakes import TableModel, TokenList, make_engine, random_table, run

V = 20
TABLE = random_table(V, 1)


def sampler(**options) -> Sampler:
    return Sampler(GenerationConfig(**options), [0], np.random.default_rng(1))


def request(ids: list[int]) -> Request:
    """Return a request that has come so far."""
    made = Request([0], GenerationConfig(), 512, TokenList())
    made.token_ids = ids
    return made


def copied(ids: list[int], num_draft_tokens: int = 4) -> list[int]:
    """Return what prompt lookup proposes after `ids`."""
    return PromptLookup().open(request(ids)).propose(num_draft_tokens, sampler()).token_ids


@pytest.mark.parametrize(
    ("ids", "wanted"),
    [
        ([], []),
        ([1, 2], []),
        ([1, 2, 3], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),
        ([1, 2, 9, 1, 2], []),
        ([7, 7, 7, 7], [7, 7, 7, 7]),
        ([1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 3], [6, 1, 2, 3]),
        ([8, 1, 2, 3, 5, 9, 1, 2, 3, 6, 8, 1, 2, 3], [5, 9, 1, 2]),
    ],
    ids=[
        "empty", "too short", "only itself", "nothing repeats", "copy", "match of two is noise", "overlaps itself",
        "most recent among equals", "longest before most recent",
    ],
)  # fmt: skip
def test_lookup_copies_what_followed_the_best_earlier_match(ids, wanted):
    """openvino.genai takes the oldest match and accepts matches of one token."""
    assert copied(ids) == wanted


def test_lookup_proposes_no_more_than_asked_for():
    ids = list(range(20)) * 2
    assert copied(ids, 1) == [0]
    assert copied(ids, 50) == [*range(20), *range(20), *range(10)]


def test_lookup_finds_matches_that_arise_while_generating():
    """The index grows with the answer; the last token never counts as a match's own continuation."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 3, 5).tolist()
    lookup = PromptLookup().open(request(ids))
    for token_id in random.integers(0, 3, 300).tolist():
        assert lookup.propose(3, sampler()).token_ids == slow_lookup(ids, 3)
        ids.append(token_id)


def slow_lookup(ids: list[int], count: int, candidates: int = 16) -> list[int]:
    """Restate the rule: of the last 16 occurrences of the last 3 tokens, the longest match, the latest among equals."""
    ends = [e for e in range(MIN_MATCH, len(ids)) if ids[e - MIN_MATCH : e] == ids[-MIN_MATCH:]][-candidates:]

    def match_length(end: int) -> int:
        length = 0
        while length < min(end, MAX_MATCH) and ids[end - 1 - length] == ids[-1 - length]:
            length += 1
        return length

    best = max(ends, key=lambda end: (match_length(end), end), default=None)
    continued = list(ids)
    for i in range(0 if best is None else count):
        continued.append(continued[best + i])
    return continued[len(ids) :]


def test_lookup_searches_its_own_request_only():
    lookup = PromptLookup()
    lookup.open(request([1, 2, 3, 9, 1, 2, 3])).propose(4, sampler())
    assert lookup.open(request([5, 1, 2, 3])).propose(4, sampler()).token_ids == []


def test_copied_tokens_are_point_masses():
    """Their probability is 1, so that sampled decoding stays exact."""
    lookup = PromptLookup().open(request([1, 2, 3, 9, 1, 2, 3]))
    proposal = lookup.propose(2, sampler(temperature=1.0))
    assert [type(made) for made in proposal.distributions] == [PointMass, PointMass]
    assert [made.token_id for made in proposal.distributions] == proposal.token_ids


def draft_model(vocab_size: int = V, context_length: int = 512) -> tuple[DraftModel, TableModel]:
    model = TableModel(TABLE, context_length, chunk_size=64)
    return DraftModel(model, vocab_size), model


def draft(ids: list[int], **options) -> Draft:
    """Return a draft model's part in a request that has come so far."""
    return draft_model(**options)[0].open(request(ids))


def test_draft_says_what_each_token_was_drawn_from():
    options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    again, ids = sampler(**options), [3, 1, 4]
    proposal = draft(ids).propose(5, sampler(**options))
    for token_id, made in zip(proposal.token_ids, proposal.distributions, strict=True):
        wanted = again.distribution(TABLE[ids[-2], ids[-1]])
        assert [made.probability(i) for i in range(V)] == [wanted.probability(i) for i in range(V)]
        assert made.probability(token_id) > 0
        again.push(token_id)
        ids = [*ids, token_id]


def test_drafting_leaves_no_token_in_the_penalties():
    """Unverified tokens must not count in the target's own distribution."""
    own = sampler(temperature=0.8, presence_penalty=2.0, repetition_penalty=1.5)
    row = TABLE[0, 0]
    before = [own.distribution(row).probability(i) for i in range(V)]
    draft([3, 1, 4]).propose(6, own)
    assert [own.distribution(row).probability(i) for i in range(V)] == before


def test_padding_of_a_wider_draft_is_never_drafted():
    """The target has no row for such a token."""
    for seed in range(20):
        own = Sampler(GenerationConfig(temperature=2.0), [0], np.random.default_rng(seed))
        assert max(draft([3, seed % 6, 4], vocab_size=6).propose(8, own).token_ids) < 6


def test_draft_feeds_each_token_once():
    """The drafted tokens that were accepted stay in the draft's cache; K drafts cost K forwards."""
    drafter, model = draft_model()
    ids = [3, 1, 4]
    made = drafter.open(request(ids))
    first = made.propose(4, sampler()).token_ids
    assert (model.num_forwards, model.open_sequences[0].num_tokens) == (4, 6)
    ids += [*first, 0]
    made.propose(1, sampler())
    assert (model.num_forwards, model.open_sequences[0].num_tokens) == (5, 8)


def test_what_the_draft_has_not_read_is_counted():
    """In a chat the earlier turns are held: a count that has them too keeps pacing from drafting at all."""
    drafter, _ = draft_model()
    ids = list(range(10))
    made = drafter.open(request(ids))
    assert made.num_unread == 10
    made.propose(3, sampler())
    ids += [1, 2]
    assert made.num_unread == 2
    made.close()
    assert drafter.open(request([*range(10), 5, 5, 5])).num_unread == 3
    assert drafter.open(request([9, 9])).num_unread == 2


def test_what_one_request_has_drafted_is_no_other_ones():
    """Each has a sequence of its own: two that take turns read every token once."""
    drafter, model = draft_model()
    texts = [[3, 1, 4], [2, 7]]
    drafts = [drafter.open(request(ids)) for ids in texts]
    for _ in range(5):
        for ids, made in zip(texts, drafts, strict=True):
            (drafted,) = made.propose(1, sampler()).token_ids
            ids.append(drafted)
    assert model.num_forwards == 10
    for ids, length in zip(texts, (3, 2), strict=True):
        alone = draft(ids[:length]).propose(5, sampler()).token_ids
        assert ids[length:] == alone


def test_draft_with_a_full_context_proposes_nothing():
    assert len(draft([1, 2, 3, 4], context_length=6).propose(8, sampler()).token_ids) == 2
    assert draft([1, 2, 3, 4, 5, 6], context_length=6).propose(8, sampler()).token_ids == []


def test_lookup_is_asked_before_the_draft():
    """It costs nothing; the draft steps in where nothing repeats."""
    engine = make_engine(TABLE, random_table(V, 5))
    run(engine, [2, 7, 1, 8, 3] * 5, lookup=True, num_draft_tokens=3, max_new_tokens=2)
    assert engine.drafter.model.num_forwards == 0
    run(engine, [2, 7, 1, 8, 3], lookup=True, num_draft_tokens=3, max_new_tokens=3)
    assert engine.drafter.model.num_forwards > 0
