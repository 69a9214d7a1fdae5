"""Logits to a distribution to a token: numpy, with an explicit source of randomness.

One order for target and draft alike: logit bias, penalties, temperature, top-k, top-p, min-p. Greedy decoding is the
limit temperature -> 0, a distribution with all its mass on one token, so that speculation needs a single acceptance
rule (`speculative.py`). Distributions keep only the tokens that survived the filters: with a vocabulary of 150 000
this is what makes sampling cheap.

With a seed the randomness of a position is fixed before anything is drafted (`noise.py`): its distribution is then a
point mass too, on the token that the seed draws, and speculation keeps a draft while it equals that token.
"""

from __future__ import annotations

import math
from random import Random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.logits_processors import TokenCounts, processors_for
from edge_runtime.decoding.noise import Noise
from edge_runtime.errors import LogitsError

Logits = NDArray[np.float32]

SMALLEST_TEMPERATURE = 1e-30
"""Below this float32 cannot divide; the distribution is the most likely token's long before."""
FIRST_NUCLEUS = 64
"""Most likely tokens that are looked at first for top-p; eight times as many each time that they do not suffice."""
RUN = 64
"""Length of the runs whose maxima bound the largest values."""


class UniformSource(Protocol):
    """What randomness is drawn from: `random.Random`, `numpy.random.Generator`."""

    def random(self) -> float:
        """Return a number from [0, 1)."""


class Distribution(Protocol):
    """A probability distribution over token ids."""

    def probability(self, token_id: int) -> float:
        """Return the probability of one token."""

    def sample(self, random: UniformSource) -> int:
        """Draw one token."""

    def residual(self, other: Distribution) -> Distribution:
        """Return max(0, self - other), normalised: what a rejected draft token is replaced from."""


class PointMass:
    """All probability on one token: greedy decoding, and the drafts of prompt lookup."""

    __slots__ = ("token_id",)

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id

    def probability(self, token_id: int) -> float:
        """Return 1 for the token, 0 for every other."""
        return 1.0 if token_id == self.token_id else 0.0

    def sample(self, random: UniformSource) -> int:
        """Return the token; draws nothing from `random`."""
        return self.token_id

    def residual(self, other: Distribution) -> PointMass:
        """Return itself: what is left of a point mass is a point mass."""
        return self


class Categorical:
    """Probabilities of the tokens that survived the filters.

    Args:
        token_ids: (N,) ascending ids; None when all of the vocabulary survived.
        weights: (N,) non-negative, not all zero, not necessarily normalised.
    """

    __slots__ = ("probabilities", "token_ids")

    def __init__(self, token_ids: NDArray[np.int64] | None, weights: NDArray[np.float64]) -> None:
        self.token_ids = token_ids
        self.probabilities = weights / weights.sum()

    def probability(self, token_id: int) -> float:
        """Return the probability of one token; 0 for filtered ones."""
        if self.token_ids is None:
            return float(self.probabilities[token_id]) if token_id < len(self.probabilities) else 0.0
        index = int(np.searchsorted(self.token_ids, token_id))
        found = index < len(self.token_ids) and self.token_ids[index] == token_id
        return float(self.probabilities[index]) if found else 0.0

    def sample(self, random: UniformSource) -> int:
        """Draw one token by inverting the cumulative distribution with one uniform number."""
        cumulative = np.cumsum(self.probabilities)
        # Strictly below the total, so that rounding can never pick a token without mass.
        target = min(random.random() * cumulative[-1], np.nextafter(cumulative[-1], 0))
        index = int(np.searchsorted(cumulative, target, side="right"))
        return index if self.token_ids is None else int(self.token_ids[index])

    def residual(self, other: Distribution) -> Distribution:
        """Return max(0, self - other), normalised (Leviathan et al. 2023, section 2.3)."""
        left = np.maximum(self.probabilities - self._probabilities_of(other), 0.0)
        # Only rounding can reject a token when both distributions are equal; the target's own is then right.
        return Categorical(self.token_ids, left) if left.sum() > 0 else self

    def _probabilities_of(self, other: Distribution) -> NDArray[np.float64]:
        """Return `other`'s probability of each token of this distribution's support, (N,)."""
        aligned = np.zeros(len(self.probabilities))
        if isinstance(other, Categorical) and self.token_ids is None and other.token_ids is None:
            size = min(len(aligned), len(other.probabilities))
            aligned[:size] = other.probabilities[:size]
        elif isinstance(other, Categorical):
            theirs = np.arange(len(other.probabilities)) if other.token_ids is None else other.token_ids
            mine = np.arange(len(aligned)) if self.token_ids is None else self.token_ids
            _, here, there = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
            aligned[here] = other.probabilities[there]
        elif isinstance(other, PointMass):
            index = other.token_id if self.token_ids is None else int(np.searchsorted(self.token_ids, other.token_id))
            if index < len(aligned) and (self.token_ids is None or self.token_ids[index] == other.token_id):
                aligned[index] = 1.0
        return aligned


class Sampler:
    """One request's sampling state: options, position, token counts and randomness.

    Args:
        config: The request's options.
        prompt_ids: Tokens before the answer; the repetition penalty sees them too.
        random: Source of what is drawn without a seed, and by drafters of other kinds; None for one of its own.

    Attributes:
        processors: Change the logits of each position, in this order, before anything is drawn from them.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: list[int], random: UniformSource | None = None) -> None:
        self.config = config
        self.random = random or Random(None if config.seed is None else f"{config.seed:x}")
        self.processors = processors_for(config)
        self._noise = None if config.seed is None else Noise(config.seed)
        self._position = len(prompt_ids)
        self._counts = TokenCounts(prompt_ids)

    def push(self, token_id: int) -> None:
        """Go on to the next position, after a token that was emitted or drafted."""
        self._position += 1
        if self.processors:
            self._counts.push(token_id)

    def pop(self, token_id: int) -> None:
        """Go back over a drafted token."""
        self._position -= 1
        if self.processors:
            self._counts.pop(token_id)

    def distribution(self, logits: Logits) -> Distribution:
        """Return what the next token is drawn from: a point mass with a seed, and at temperature 0.

        Args:
            logits: (V,) raw logits of one position; not modified.

        Raises:
            LogitsError: The logits are NaN or infinite, or the options forbid every token.
        """
        adjusted = self._processed(logits) if self.processors else logits
        best = int(adjusted.argmax())  # the first NaN, if there is one
        if not math.isfinite(adjusted[best]):
            raise _no_token(float(adjusted[best]), logits)
        if self.config.is_greedy:
            return PointMass(best)
        if self._noise:
            return PointMass(self._noise.winner(self._position, *_surviving(adjusted, self.config)))
        return filtered_distribution(adjusted, self.config)

    def _processed(self, logits: Logits) -> Logits:
        logits = logits.astype(np.float32, copy=True)
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the largest logit that comes out
            for processor in self.processors:
                processor.process(logits, self._counts)
        return logits


def _no_token(largest: float, logits: Logits) -> LogitsError:
    """Return the error that names why no token can be drawn.

    Args:
        largest: Largest logit after bias and penalties; not finite.
        logits: (V,) raw logits.
    """
    if not math.isfinite(raw := float(logits.max())):
        return LogitsError(
            f"the model's largest logit is {raw}, expected a finite number",
            "load the model with precision=f32; if that does not help, export it again",
        )
    if largest == -math.inf:
        return LogitsError(
            "the options forbid every token: no logit is above -inf", "allow at least one token in logit_bias"
        )
    return LogitsError(
        f"logit_bias and penalties make the largest logit {largest}, expected a finite number",
        "use a smaller logit_bias or penalty",
    )


def filtered_distribution(logits: Logits, config: GenerationConfig) -> Categorical:
    """Apply temperature, top-k, top-p and min-p.

    Work over the whole vocabulary is in float32 and without sorting; sums are float64.

    Args:
        logits: (V,) logits after bias and penalties, the largest one finite.
        config: Options with temperature > 0.

    Returns:
        The normalised distribution over the surviving tokens; the most likely token always survives.
    """
    ids, weights = _surviving(logits, config)
    return Categorical(ids, weights.astype(np.float64))


def _surviving(logits: Logits, config: GenerationConfig) -> tuple[NDArray[np.int64] | None, Logits]:
    """Return the ids of the tokens that the filters keep, ascending, and their weights, the largest 1.

    The ids are None where all of the vocabulary survives.
    """
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the most likely token to -inf, rightly
        scaled = logits - logits.max()
        scaled /= np.float32(max(config.temperature, SMALLEST_TEMPERATURE))
    ids: NDArray[np.int64] | None = None
    if 0 < config.top_k < len(scaled):
        ids, scaled = _keep(ids, scaled, np.sort(_largest(scaled, config.top_k)))
    if config.top_p < 1:
        ids, scaled = _keep(ids, scaled, np.sort(_nucleus(scaled, config.top_p)))
    if config.min_p > 0:
        ids, scaled = _keep(ids, scaled, np.flatnonzero(scaled >= np.log(config.min_p)))
    return ids, np.exp(scaled)


def _nucleus(scaled: Logits, top_p: float) -> NDArray[np.int64]:
    """Return the positions of the smallest set of most likely tokens whose probability reaches top_p.

    Args:
        scaled: (N,) log-weights, the largest 0.
        top_p: Below 1.
    """
    wanted = top_p * float(np.exp(scaled).sum(dtype=np.float64))
    count = FIRST_NUCLEUS
    while True:
        best = _largest(scaled, count)
        best = best[np.argsort(-scaled[best], kind="stable")]
        mass = np.cumsum(np.exp(scaled[best], dtype=np.float64))
        if mass[-1] >= wanted or len(best) == len(scaled):
            return best[: int(np.searchsorted(mass, wanted)) + 1]
        count *= 8


def _largest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the positions of the `count` largest values, in no order; all positions where there are fewer.

    The count-th largest of the maxima of short runs is a bound that at least `count` values reach, and few more do:
    this is several times faster than partitioning a whole vocabulary.
    """
    if count >= len(values):
        return np.arange(len(values))
    num_runs = len(values) // RUN
    candidates = np.arange(len(values))
    if num_runs > count:
        maxima = values[: num_runs * RUN].reshape(num_runs, RUN).max(axis=1)
        candidates = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
    return candidates[np.argpartition(values[candidates], -count)[-count:]]


def _keep(ids: NDArray[np.int64] | None, values: Logits, kept: NDArray[np.int64]) -> tuple[NDArray[np.int64], Logits]:
    return kept if ids is None else ids[kept], values[kept]


def top_logprobs(logits: Logits, token_id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of one token and of the `count` most likely ones.

    Args:
        logits: (V,) raw logits: the model's own distribution, before penalties and temperature.
        token_id: The emitted token.
        count: How many most likely tokens to report; 0 for none. Fewer are reported where fewer are possible.
    """
    values = logits.astype(np.float64)
    values -= values.max()
    values -= np.log(np.exp(values).sum())
    best = _largest(values, count) if count else np.empty(0, np.int64)
    best = best[np.argsort(-values[best], kind="stable")]
    return float(values[token_id]), [(int(i), float(values[i])) for i in best if values[i] > -math.inf]
