"""Verify a drafted block: accept, correct, or add the bonus token. Lossless for greedy and for sampling.

Source: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318).
A draft token x drawn from q is kept with probability min(1, p(x) / q(x)); after a rejection the token at that same
position is drawn from max(0, p - q), normalised. The emitted token then has distribution p exactly, whatever q is. p
and q are taken after bias, penalties, temperature and filters, so what is sampled is what the options say.

At temperature 0 p and q are point masses: the rule becomes "keep while equal to the target's own choice". With a seed
they are too: both are drawn by the noise of that position (`noise.py`), so that the text does not depend on the draft.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.decoding.sampling import Distribution, PointMass, Sampler, UniformSource
from edge_runtime.errors import LogitsError


class Proposal(NamedTuple):
    """Drafted tokens and the distribution each was drawn from; both of length K."""

    token_ids: list[int]
    distributions: list[Distribution]

    @classmethod
    def of_copied(cls, token_ids: list[int]) -> Proposal:
        """Propose tokens that were copied, not drawn: each from a point mass."""
        return cls(token_ids, [PointMass(token_id) for token_id in token_ids])


NO_PROPOSAL = Proposal([], [])


class VerifiedBlock(NamedTuple):
    """Tokens to emit: `num_accepted` draft tokens, then the correction or bonus token."""

    token_ids: list[int]
    num_accepted: int


def verify(logits: NDArray[np.float32], proposal: Proposal, sampler: Sampler) -> VerifiedBlock:
    """Decide which drafted tokens to keep, and draw the token that follows them.

    Args:
        logits: (K + 1, V) target logits; row i is the distribution of the token after i drafted ones.
        proposal: K drafted tokens; K may be 0, which is a plain decoding step.
        sampler: The request's sampler; every emitted token is pushed to it.

    Returns:
        Between 1 and K + 1 tokens. Where a row gives no token, those before it: the next block begins with that row.

    Raises:
        LogitsError: The first row gives no token.
    """
    emitted: list[int] = []
    try:
        for drafted, drafted_from, row in zip(proposal.token_ids, proposal.distributions, logits, strict=False):
            wanted = sampler.distribution(row)
            if not accepts(drafted, wanted, drafted_from, sampler.random):
                emitted.append(wanted.residual(drafted_from).sample(sampler.random))
                break
            emitted.append(drafted)
            sampler.push(drafted)
        else:
            emitted.append(sampler.distribution(logits[len(emitted)]).sample(sampler.random))
    except LogitsError:
        if not emitted:
            raise
    else:
        sampler.push(emitted[-1])
    return VerifiedBlock(emitted, len(emitted) - 1)


def accepts(token_id: int, wanted: Distribution, drafted_from: Distribution, random: UniformSource) -> bool:
    """Accept a token drawn from q with probability min(1, p / q).

    Args:
        token_id: The drafted token, drawn from `drafted_from`.
        wanted: p, the target's distribution.
        drafted_from: q, the draft's; q(token_id) > 0.
        random: Asked only where p < q and p > 0: greedy decoding draws nothing.
    """
    p, q = wanted.probability(token_id), drafted_from.probability(token_id)
    return p >= q or (p > 0 and random.random() * q < p)
