"""Draft with a small model that shares the target's vocabulary."""

from __future__ import annotations

import logging

from edge_runtime.decoding.drafters.base import Text
from edge_runtime.decoding.sampling import Distribution, Sampler
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, VerifiedBlock
from edge_runtime.errors import LogitsError
from edge_runtime.models.base import CausalModel, Output, advance, catch_up

_log = logging.getLogger(__name__)


class DraftModel:
    """A draft model; implements `Drafter`.

    Args:
        model: The draft.
        vocab_size: The target's; a draft row may be wider or narrower by padding, whose tokens are never drafted.
    """

    def __init__(self, model: CausalModel, vocab_size: int) -> None:
        self.model = model
        self._vocab_size = vocab_size

    def open(self, text: Text) -> ModelDraft:
        """Begin to draft for a text; earlier turns of a chat are held already."""
        return ModelDraft(self.model, self._vocab_size, text)


class ModelDraft:
    """A draft model's part in one text; implements `Draft`.

    The draft's sequence is brought up to date only when a draft is wanted: pacing that falls to 0 costs nothing.
    """

    def __init__(self, model: CausalModel, vocab_size: int, text: Text) -> None:
        self._model, self._vocab_size, self._text = model, vocab_size, text
        self._sequence = model.sequence(text.token_ids)
        self._num_read = self._sequence.num_tokens
        self._has_failed = False

    @property
    def num_unread(self) -> int:
        """Tokens of the text that the draft has not read yet."""
        return len(self._text.token_ids) - min(self._num_read, self._sequence.num_tokens)

    def propose(self, num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draft tokens one by one; fewer where the draft's own context ends, or its logits are NaN or infinite."""
        token_ids = self._text.token_ids
        num_draft_tokens = min(num_draft_tokens, self._model.context_length - len(token_ids))
        if num_draft_tokens <= 0 or self._has_failed:
            return NO_PROPOSAL
        drafted: list[int] = []
        drawn_from: list[Distribution] = []
        rows = catch_up(self._model, self._sequence, token_ids, self._num_read)
        self._num_read = len(token_ids)
        try:
            while True:
                drawn_from.append(sampler.distribution(rows[-1, : self._vocab_size]))
                drafted.append(drawn_from[-1].sample(sampler.random))
                sampler.push(drafted[-1])
                if len(drafted) == num_draft_tokens:
                    break
                rows = advance(self._model, self._sequence, drafted[-1:])
        except LogitsError as error:
            self._give_up(error)
        for token_id in drafted:
            sampler.pop(token_id)
        return Proposal(drafted, drawn_from)

    def observe(self, block: VerifiedBlock, output: Output) -> None:
        """Nothing is learned: the next draft begins with the tokens that the sequence and the text share."""

    def close(self) -> None:
        """Let the model keep what was read, for a later text that begins with it."""
        self._sequence.close()

    def _give_up(self, error: LogitsError) -> None:
        """Draft no more in this request, whose answer is the target's; forget keys and values that may be NaN."""
        _log.warning("the draft model is not used for the rest of this answer: %s", error)
        self._has_failed = True
        self._sequence.discard()
        self._sequence = self._model.sequence()
