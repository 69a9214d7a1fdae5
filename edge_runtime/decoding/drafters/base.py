"""What drafts tokens, and its part in one text.

A draft is asked for up to K tokens that continue a text and says from which distribution each was drawn; it never
decides what is emitted (`speculative.verify` does). It may return fewer, or none.
"""

from __future__ import annotations

from typing import Protocol

from edge_runtime.decoding.sampling import Sampler
from edge_runtime.decoding.speculative import Proposal, VerifiedBlock
from edge_runtime.models.base import Output


class Text(Protocol):
    """What is drafted for, such as a `request.Request`: it grows while it is written, and is never shortened."""

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, prompt and answer; not to be changed."""


class Draft(Protocol):
    """Drafts for one text."""

    @property
    def num_unread(self) -> int:
        """Tokens of the text that have to be read before drafting can begin."""

    def propose(self, num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draft up to `num_draft_tokens` tokens that continue the text; the sampler is left as it was."""

    def observe(self, block: VerifiedBlock, output: Output) -> None:
        """Learn what the target made of the last step, before the block is added to the text.

        Args:
            block: The tokens that are emitted.
            output: The target's, valid until its next forward: a row after each token that it was given.
        """

    def close(self) -> None:
        """Hold nothing any more."""


class Drafter(Protocol):
    """A source of drafts, for any number of texts."""

    def open(self, text: Text) -> Draft:
        """Begin to draft for a text."""
