"""What drafts tokens, and its part in one request.

A draft is asked for up to K tokens that continue a request and says from which distribution each was drawn; it never
decides what is emitted (`speculative.verify` does). It may return fewer, or none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edge_runtime.decoding.sampling import Sampler
from edge_runtime.decoding.speculative import Proposal, VerifiedBlock
from edge_runtime.models.base import Output

if TYPE_CHECKING:
    from edge_runtime.decoding.request import Request


class Draft(Protocol):
    """Drafts for one request."""

    @property
    def num_unread(self) -> int:
        """Tokens of the request that have to be read before drafting can begin."""

    def propose(self, num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draft up to `num_draft_tokens` tokens that continue the request; the sampler is left as it was."""

    def observe(self, block: VerifiedBlock, output: Output) -> None:
        """Learn what the target made of the last step, before the block is added to the request.

        Args:
            block: The tokens that are emitted.
            output: The target's, valid until its next forward: a row after each token that it was given.
        """

    def close(self) -> None:
        """Hold nothing any more."""


class Drafter(Protocol):
    """A source of drafts, for any number of requests."""

    def open(self, request: Request) -> Draft:
        """Begin to draft for a request."""
