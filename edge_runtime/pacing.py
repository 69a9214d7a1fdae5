"""How many tokens to draft next, from measured costs and measured acceptance, down to none.

With draft cost d per token, target cost t(w) of a forward over w tokens and a_i the chance that draft token i is
accepted once those before it were, a step with K drafted tokens emits 1 + a_1 + a_1 a_2 + ... tokens on average
and takes K d + t(K + 1). `Pacing` takes the K of the best ratio. Where K = 0 is best it sleeps, and pays for a
probe only when the probe's measured loss is at most MAX_LOSS of the time since the last one: drafting
that does not pay costs a few per cent, whatever the prompt.

Costs are medians of the last few steps, so one disturbed step does not decide; the first step of a width is not
counted, because the plugin prepares its kernels in it. Unknown widths are taken to cost as much as known ones, so a
promising K is tried and then known. What is learned is kept from one request to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

MAX_LOSS = 0.02
"""Share of time that probing may cost while drafting does not pay."""
HALF_LIFE = 30.0
"""Drafted tokens after which an observation of acceptance counts half."""
PRIOR = (1.4, 2.0)
"""Accepted and drafted tokens assumed at each position before any were seen: optimistic, so that drafting starts."""
MIN_SLEEP = 16
"""Fewest plain steps between two probes."""
MARGIN = 1.02
"""Drafting must promise this much over a plain step: a tie is not worth the risk."""


class TargetCosts:
    """Seconds of a target forward by its width (tokens in it): t(w)."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._estimate: dict[int, float] = {}

    def record(self, width: int, seconds: float) -> None:
        """Take one measured step of a width; the first one of a width only warms it up."""
        samples = self._samples.get(width)
        if samples is None:
            self._samples[width] = deque(maxlen=9)
            return
        samples.append(seconds)
        self._estimate[width] = median(samples)

    def seconds(self, width: int) -> float | None:
        """Return t(width): measured, else interpolated between measured neighbours, else the nearest one's.

        None before anything was measured.
        """
        known = self._estimate
        if width in known:
            return known[width]
        below = max((w for w in known if w < width), default=None)
        above = min((w for w in known if w > width), default=None)
        if below is None or above is None:
            nearest = below or above
            return None if nearest is None else known[nearest]
        part = (width - below) / (above - below)
        return known[below] + part * (known[above] - known[below])


class Pacing:
    """Chooses K for one source of drafts.

    Args:
        costs: The target's costs, shared by all sources.
    """

    def __init__(self, costs: TargetCosts) -> None:
        self._costs = costs
        self._draft_samples: deque[float] = deque(maxlen=9)
        self._read_samples: deque[float] = deque(maxlen=3)
        self._draft_seconds = 0.0
        self._accepted: list[float] = []
        self._drafted: list[float] = []
        self._is_warm = False
        self._asleep = 0
        self._lost_s = 0.0

    def choose(self, max_draft_tokens: int, lag: int = 0, remaining: int = 1 << 30) -> int:
        """Return K for the next step.

        Args:
            max_draft_tokens: Upper bound of K.
            lag: Tokens the draft has to read before it can draft.
            remaining: Tokens the request may still emit: a draft that must read much for little is not started.
        """
        if self._asleep > 1:
            self._asleep -= 1
            return 0
        plain = self._costs.seconds(1)
        if plain is None or max_draft_tokens <= 0:
            return 0
        if self._asleep == 1:
            return self._wake(max_draft_tokens)
        best, seconds_per_token = self.best(max_draft_tokens)
        gain = remaining * (plain - seconds_per_token)
        return best if gain > lag * self._seconds_to_read_one else 0

    def best(self, max_draft_tokens: int) -> tuple[int, float]:
        """Return the K of the least expected seconds per token, and those seconds."""
        plain = self._costs.seconds(1) or 0.0
        best, least = 0, plain / MARGIN
        tokens, chance = 1.0, 1.0
        for k in range(1, max_draft_tokens + 1):
            chance *= self.acceptance(k - 1)
            tokens += chance
            seconds = (k * self._draft_seconds + (self._costs.seconds(k + 1) or plain)) / tokens
            if seconds < least:
                best, least = k, seconds
        return (best, least) if best else (0, plain)

    def acceptance(self, position: int) -> float:
        """Return the chance that draft token `position` is accepted when those before it were."""
        accepted, drafted = PRIOR
        if self._drafted:
            position = min(position, len(self._drafted) - 1)
            accepted += self._accepted[position]
            drafted += self._drafted[position]
        return accepted / drafted

    def record(self, num_drafted: int, num_accepted: int, draft_s: float, target_s: float, lag: int = 0) -> None:
        """Learn from one step.

        Args:
            num_drafted: K of the step, at least 1.
            num_accepted: How many of them were kept.
            draft_s: Seconds spent drafting.
            target_s: Seconds of the target's forward and the verification.
            lag: Tokens the draft had to read before it could draft.
        """
        self._record_draft_seconds(num_drafted, draft_s, lag)
        self._observe(num_drafted, num_accepted)
        plain = self._costs.seconds(1)
        if plain is None:
            return
        self._lost_s = max(0.0, self._lost_s + draft_s + target_s - (1 + num_accepted) * plain)
        if self.best(num_drafted + 1)[0] == 0:
            self._asleep = max(MIN_SLEEP, int(self._lost_s / (MAX_LOSS * plain)))
            self._lost_s = 0.0

    def _wake(self, max_draft_tokens: int) -> int:
        """Probe, trusting old observations less: the text may have changed."""
        self._asleep = 0
        self._accepted = [count / 4 for count in self._accepted]
        self._drafted = [count / 4 for count in self._drafted]
        return max(1, self.best(max_draft_tokens)[0])

    @property
    def _seconds_to_read_one(self) -> float:
        """Seconds for the draft to read one token of a long lag; 0, the optimistic guess, before it was measured."""
        return median(self._read_samples) if self._read_samples else 0.0

    def _record_draft_seconds(self, num_drafted: int, draft_s: float, lag: int) -> None:
        if lag > num_drafted + 1:
            self._read_samples.append(max(0.0, draft_s - num_drafted * self._draft_seconds) / lag)
        elif self._is_warm:
            self._draft_samples.append(draft_s / num_drafted)
            self._draft_seconds = median(self._draft_samples)
        self._is_warm = True

    def _observe(self, num_drafted: int, num_accepted: int) -> None:
        decay = 0.5 ** (1 / HALF_LIFE)
        for position in range(min(num_drafted, num_accepted + 1)):
            if position == len(self._drafted):
                self._drafted.append(0.0)
                self._accepted.append(0.0)
            self._drafted[position] = self._drafted[position] * decay + 1
            self._accepted[position] = self._accepted[position] * decay + (position < num_accepted)


def median(samples: Iterable[float]) -> float:
    """Return the middle sample, the upper one of two."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]
