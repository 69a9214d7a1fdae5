"""The ways to decode that are compared: a draft, and the baselines it has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

import numpy as np

from edge_runtime.api import EdgeLLM
from edge_runtime.decoding.drafters.base import Drafter, Text
from edge_runtime.decoding.drafters.lookup import PromptLookup
from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.sampling import Categorical, Sampler
from edge_runtime.decoding.speculative import Proposal, VerifiedBlock
from edge_runtime.models.base import Output


class RandomDraft:
    """Draft tokens drawn uniformly from the vocabulary: the draft to which every other one is compared.

    Since it keeps nothing of a text, it implements both `Drafter` and `Draft`.

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._uniform = Categorical(None, np.ones(vocab_size))

    def open(self, text: Text) -> Self:
        """Begin to draft for a text."""
        return self

    @property
    def num_unread(self) -> int:
        """None: nothing is read."""
        return 0

    def propose(self, num_draft_tokens: int, sampler: Sampler) -> Proposal:
        """Draw tokens."""
        drawn = [int(sampler.random.random() * self._vocab_size) for _ in range(num_draft_tokens)]
        return Proposal(drawn, [self._uniform] * num_draft_tokens)

    def observe(self, block: VerifiedBlock, output: Output) -> None:
        """Nothing is learned."""

    def close(self) -> None:
        """Nothing is held."""


class Variant(NamedTuple):
    """One way to decode.

    Attributes:
        drafter: `plain`, `draft`, `lookup` or `random`.
        num_draft_tokens: K.
        llm: Answers.
        source: Drafts for it; None for plain decoding.
    """

    drafter: str
    num_draft_tokens: int | Literal["auto"]
    llm: EdgeLLM
    source: Drafter | None


def make_variants(llm: EdgeLLM, lengths: Sequence[int]) -> list[Variant]:
    """Return plain decoding, then every drafter with every K, all over one loaded target.

    Args:
        llm: The target with its draft; without one only the baselines are returned.
        lengths: Every K.
    """
    target, draft = llm.target, llm.drafter

    def over(drafter: Drafter | None) -> EdgeLLM:
        return EdgeLLM(Engine(target, drafter), llm.tokenizer, llm.manifest, 0.0)

    alone, guess = over(None), RandomDraft(llm.vocab_size)
    variants = [Variant("plain", 0, alone, None)]
    if draft:
        variants += [Variant("draft", length, llm, draft) for length in lengths]
        variants += [Variant("draft", "auto", over(draft), draft)]  # an engine of its own: its pacing learns alone
    copy, guessing = PromptLookup(), over(guess)
    variants += [Variant("lookup", length, alone, copy) for length in lengths]
    return variants + [Variant("random", length, guessing, guess) for length in lengths]
