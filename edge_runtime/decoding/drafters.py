"""Where drafted tokens come from: a draft model or prompt lookup. A request may use both, lookup first.

A drafter is asked for up to K tokens that continue a sequence and says from which distribution each was drawn; it
never decides what is emitted (`speculative.verify` does). It may return fewer, or none.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from edge_runtime.decoding.sampling import Distribution, Sampler
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal
from edge_runtime.errors import LogitsError
from edge_runtime.models.base import CachedModel

_log = logging.getLogger(__name__)

MIN_MATCH = 3
"""Tokens that must repeat before their continuation is copied: shorter matches are mostly noise."""
MAX_MATCH = 32
"""Longest match that is told from a longer one."""
MAX_CANDIDATES = 16
"""Most recent occurrences that are compared for the longest match."""


class Drafter(Protocol):
    """A source of drafted tokens for one request after another."""

    def start(self, prompt_ids: list[int]) -> None:
        """Begin a new request."""

    def lag(self, num_tokens: int) -> int:
        """Return how many tokens of a sequence of `num_tokens` have to be read before drafting can begin."""

    def propose(self, token_ids: list[int], num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draft up to `num_draft_tokens` tokens that continue `token_ids`."""


class DraftModel:
    """Draft with a small model that shares the target's vocabulary.

    The draft's cache is brought up to date only when a draft is wanted: pacing that falls to 0 costs nothing.

    Args:
        cached: The draft model.
        vocab_size: The target's; a draft row may be wider or narrower by padding, whose tokens are never drafted.
    """

    def __init__(self, cached: CachedModel, vocab_size: int) -> None:
        self._cached = cached
        self._vocab_size = vocab_size
        self._held = 0
        self._has_failed = False

    @property
    def properties(self) -> dict[str, Any]:
        """How the draft really runs, for reports."""
        return dict(getattr(self._cached.model, "properties", {}))

    def start(self, prompt_ids: list[int]) -> None:
        """Begin a new request; earlier turns of a chat are held already."""
        self._held = self._cached.shared(prompt_ids)
        self._has_failed = False

    def lag(self, num_tokens: int) -> int:
        """Return how many tokens of a sequence of `num_tokens` the draft has not read yet."""
        return num_tokens - self._held

    def propose(self, token_ids: list[int], num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draft tokens one by one; fewer where the draft's own context ends, or its logits are NaN or infinite."""
        room = self._cached.model.context_length - len(token_ids)
        num_draft_tokens = min(num_draft_tokens, room)
        if num_draft_tokens <= 0 or self._has_failed:
            return NO_PROPOSAL
        drafted: list[int] = []
        drawn_from: list[Distribution] = []
        rows = self._cached.catch_up(token_ids, self._held)
        self._held = len(token_ids)
        try:
            while True:
                drawn_from.append(sampler.distribution(rows[-1, : self._vocab_size]))
                drafted.append(drawn_from[-1].sample(sampler.random))
                sampler.push(drafted[-1])
                if len(drafted) == num_draft_tokens:
                    break
                rows = self._cached.forward(drafted[-1:])
        except LogitsError as error:
            self._give_up(error)
        for token_id in drafted:
            sampler.pop(token_id)
        return Proposal(drafted, drawn_from)

    def _give_up(self, error: LogitsError) -> None:
        """Draft no more in this request, whose answer is the target's; forget keys and values that may be NaN."""
        _log.warning("the draft model is not used for the rest of this answer: %s", error)
        self._has_failed = True
        self._cached.rollback(0)


class PromptLookup:
    """Copy what followed the longest earlier occurrence of the sequence's ending; the most recent one among equals.

    Source: Saxena 2023, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). An index from each run
    of MIN_MATCH tokens to where it ended makes the search independent of the context's length.
    """

    def __init__(self) -> None:
        self.start([])

    def start(self, prompt_ids: list[int]) -> None:
        """Begin a new request."""
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = MIN_MATCH

    def lag(self, num_tokens: int) -> int:
        """Return 0: indexing costs next to nothing."""
        return 0

    def propose(self, token_ids: list[int], num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Copy `num_draft_tokens` tokens; none where nothing repeats."""
        self._index(token_ids)
        end = self._longest_match(token_ids)
        if end is None:
            return NO_PROPOSAL
        # A match that reaches to the end repeats itself: what is copied is copied again, as in LZ77.
        period = len(token_ids) - end
        return Proposal.of_copied([token_ids[end + i % period] for i in range(num_draft_tokens)])

    def _index(self, token_ids: list[int]) -> None:
        """Index every run that ends before the last token, so that it has a continuation."""
        for end in range(self._indexed, len(token_ids)):
            self._ends.setdefault(tuple(token_ids[end - MIN_MATCH : end]), []).append(end)
        self._indexed = max(self._indexed, len(token_ids))

    def _longest_match(self, token_ids: list[int]) -> int | None:
        """Return the position after the best earlier occurrence of the ending; None where there is none."""
        best, best_length = None, 0
        ends = self._ends.get(tuple(token_ids[-MIN_MATCH:]), [])
        for end in reversed(ends[-MAX_CANDIDATES:]):
            length = _common_suffix(token_ids, end)
            if length > best_length:
                best, best_length = end, length
        return best


def _common_suffix(token_ids: list[int], end: int) -> int:
    """Return how many tokens before `end` equal those before the sequence's end, at most MAX_MATCH."""
    length = 0
    while length < min(end, MAX_MATCH) and token_ids[end - 1 - length] == token_ids[-1 - length]:
        length += 1
    return length
