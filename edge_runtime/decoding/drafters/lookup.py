"""Draft by copying what followed an earlier occurrence of a text's ending."""

from __future__ import annotations

from edge_runtime.decoding.drafters.base import Text
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, VerifiedBlock
from edge_runtime.models.base import Output

MIN_MATCH = 3
"""Tokens that must repeat before their continuation is copied: shorter matches are mostly noise."""
MAX_MATCH = 32
"""Longest match that is told from a longer one."""
MAX_CANDIDATES = 16
"""Most recent occurrences that are compared for the longest match."""


class PromptLookup:
    """Copy what followed the longest earlier occurrence of the sequence's ending; the most recent one among equals.

    Source: Saxena 2023, prompt lookup decoding (github.com/apoorvumang/prompt-lookup-decoding). An index from each run
    of MIN_MATCH tokens to where it ended makes the search independent of the context's length.
    """

    def open(self, text: Text) -> LookupDraft:
        """Begin to draft for a text."""
        return LookupDraft(text)


class LookupDraft:
    """Prompt lookup's part in one text; implements `Draft`."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = MIN_MATCH

    @property
    def num_unread(self) -> int:
        """None: indexing costs next to nothing."""
        return 0

    def propose(self, num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Copy `num_draft_tokens` tokens; none where nothing repeats."""
        token_ids = self._text.token_ids
        self._index(token_ids)
        end = self._longest_match(token_ids)
        if end is None:
            return NO_PROPOSAL
        # A match that reaches to the end repeats itself: what is copied is copied again, as in LZ77.
        period = len(token_ids) - end
        return Proposal.of_copied([token_ids[end + i % period] for i in range(num_draft_tokens)])

    def observe(self, block: VerifiedBlock, output: Output) -> None:
        """Nothing is learned: the text's own tokens are searched."""

    def close(self) -> None:
        """Nothing is held."""

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
