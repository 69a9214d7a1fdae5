"""What changes the logits of a position before anything is drawn from them: bias and penalties.

Target and draft go through the same list, so speculation stays exact whatever is in it. A processor sees the tokens of
an unverified draft as if they were emitted, and no longer once they are rejected.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.config import GenerationConfig

Logits = NDArray[np.float32]


class TokenCounts:
    """How often each token occurred: what the penalties need. Tokens of an unverified draft are pushed and popped."""

    def __init__(self, prompt_ids: list[int]) -> None:
        self._prompt = set(prompt_ids)
        self._generated: dict[int, int] = {}

    def push(self, token_id: int) -> None:
        """Count one generated token."""
        self._generated[token_id] = self._generated.get(token_id, 0) + 1

    def pop(self, token_id: int) -> None:
        """Forget one generated token."""
        left = self._generated[token_id] - 1
        if left:
            self._generated[token_id] = left
        else:
            del self._generated[token_id]

    def generated(self, limit: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the distinct generated ids below `limit`, (N,), and their counts, (N,)."""
        size = len(self._generated)
        ids = np.fromiter(self._generated.keys(), np.int64, size)
        counts = np.fromiter(self._generated.values(), np.float32, size)
        fits = ids < limit  # a draft's row may be narrower than the target's
        return ids[fits], counts[fits]

    def seen(self, limit: int) -> NDArray[np.int64]:
        """Return the distinct ids of prompt and answer below `limit`, (N,)."""
        ids = np.array(sorted(self._prompt | self._generated.keys()), np.int64)
        return ids[ids < limit]


class LogitsProcessor(Protocol):
    """Changes the logits of one position."""

    def process(self, logits: Logits, counts: TokenCounts) -> None:
        """Change logits in place.

        Args:
            logits: (V,); a draft may have fewer than the target.
            counts: The tokens before this position.
        """


class LogitBias:
    """Add a number to the logits of some tokens.

    Args:
        bias: Token id to number; -inf forbids the token.
    """

    def __init__(self, bias: dict[int, float]) -> None:
        self._bias = bias

    def process(self, logits: Logits, counts: TokenCounts) -> None:
        """Add the bias."""
        for token_id, bias in self._bias.items():
            if token_id < len(logits):
                logits[token_id] += bias


class RepetitionPenalty:
    """Divide positive logits of all tokens of prompt and answer, multiply negative ones (CTRL, Keskar 2019).

    Args:
        penalty: Above 1 to make them less likely.
    """

    def __init__(self, penalty: float) -> None:
        self._scale = np.float32(penalty)

    def process(self, logits: Logits, counts: TokenCounts) -> None:
        """Scale the logits of tokens seen."""
        seen = counts.seen(len(logits))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / self._scale, values * self._scale)


class OccurrencePenalty:
    """Subtract from the logits of tokens of the answer.

    Args:
        presence: Subtracted once.
        frequency: Subtracted for each time that a token was generated.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = np.float32(presence), np.float32(frequency)

    def process(self, logits: Logits, counts: TokenCounts) -> None:
        """Subtract the penalties."""
        ids, times = counts.generated(len(logits))
        logits[ids] -= self._presence + self._frequency * times


def processors_for(config: GenerationConfig) -> list[LogitsProcessor]:
    """Return what a request's options ask for, in the order in which it is applied."""
    processors: list[LogitsProcessor] = []
    if bias := {token_id: bias for token_id, bias in config.logit_bias.items() if bias != 0}:
        processors.append(LogitBias(bias))
    if config.repetition_penalty != 1:
        processors.append(RepetitionPenalty(config.repetition_penalty))
    if config.presence_penalty or config.frequency_penalty:
        processors.append(OccurrencePenalty(config.presence_penalty, config.frequency_penalty))
    return processors
