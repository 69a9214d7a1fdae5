"""Random numbers of a seeded request: a function of seed, position and token id, and of nothing else.

A token is drawn as the winner of a race: token i arrives at time E_i / p_i, where E_i is exponential, and the first one
is token i with probability p_i (the Gumbel-max trick, written with exponentials). Since the E_i of a position are known
before anything is drafted, the target's choice there does not depend on what a draft proposed, how many tokens it was
asked for, or whether it was asked at all. A draft that runs the same race over its own distribution often has the same
winner: two distributions of total variation d agree with probability (1 - d) / (1 + d) or more, where the best coupling
that knows both agrees with 1 - d.

Source: Daliri, Musco, Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding"
(arXiv 2408.07978), sections 3 and 5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN, FIRST_FACTOR, SECOND_FACTOR = (
    np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
"""Constants of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", figure 17)."""
UNIT = 2.0**-53
CHUNK = 1 << 14
"""Tokens that race at once: what they need stays in a core's own cache, where it takes a third of the time."""


class Noise:
    """The random numbers of one seed.

    Args:
        seed: Not negative; of any size.
    """

    def __init__(self, seed: int) -> None:
        from hashlib import blake2b  # 5 ms, for those who give a seed

        self._seed, self._hash = f"{seed:x}", blake2b

    def winner(self, position: int, token_ids: NDArray[np.int64] | None, weights: NDArray[Any]) -> int:
        """Draw one token id.

        Args:
            position: Position of the drawn token in the sequence.
            token_ids: (N,) distinct ids; None for 0 to N - 1.
            weights: (N,) non-negative, at least one above 0, not necessarily normalised.
        """
        start = self._start(position)
        best, winner = 0.0, 0
        for begin in range(0, len(weights), CHUNK):
            part = weights[begin : begin + CHUNK]
            ids = np.arange(begin, begin + len(part)) if token_ids is None else token_ids[begin : begin + CHUNK]
            uniforms = _uniforms(ids, start)
            # E = -log(1 - u) is at least u, so only tokens whose weight / u reaches the best score can win.
            bounds = part / uniforms
            promising = bounds.argmax()
            if bounds[promising] > best:
                least = _scores(part[[promising]], uniforms[[promising]])[0]
                candidates = np.flatnonzero(bounds >= max(best, float(least)))
                scores = _scores(part[candidates], uniforms[candidates])
                first = scores.argmax()
                if scores[first] > best:
                    best, winner = float(scores[first]), int(ids[candidates[first]])
        return winner

    def uniforms(self, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return a number between 0 and 1, never one of them, for each token id, (N,).

        Each position has its own SplitMix64 stream, and a token id is an index into it. Integer arithmetic gives the
        same numbers on every machine and with every version of numpy.
        """
        return _uniforms(token_ids, self._start(position))

    def _start(self, position: int) -> np.uint64:
        digest = self._hash(f"{self._seed} {position}".encode(), digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "little"))


def _uniforms(token_ids: NDArray[np.int64], start: np.uint64) -> NDArray[np.float64]:
    return mixed(token_ids.astype(np.uint64), start).astype(np.float64) * UNIT


def _scores(weights: NDArray[Any], uniforms: NDArray[np.float64]) -> NDArray[np.float64]:
    scores: NDArray[np.float64] = weights / np.maximum(-np.log1p(-uniforms), uniforms)
    return scores


def mixed(indices: NDArray[np.uint64], start: np.uint64) -> NDArray[np.uint64]:
    """Turn (N,) indices into a SplitMix64 stream's outputs, in place: odd numbers of 53 bits, so neither 0 nor 2^53."""
    indices *= GOLDEN
    indices += start
    for shift, factor in ((30, FIRST_FACTOR), (27, SECOND_FACTOR)):
        indices ^= indices >> np.uint64(shift)
        indices *= factor
    indices ^= indices >> np.uint64(31)
    indices >>= np.uint64(11)
    indices |= np.uint64(1)
    return indices
