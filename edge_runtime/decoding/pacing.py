"""How many tokens to draft next, from measured costs and measured acceptance, down to none.

With draft cost d per token, target cost t(w) of a forward over w tokens and a_i the chance that draft token i is
accepted once those before it were, a step with K drafted tokens emits 1 + a_1 + a_1 a_2 + ... tokens on average
and takes K d + t(K + 1). `Pacing` takes the K of the best ratio. Where K = 0 is best it sleeps, and pays for a
probe only when the probe's measured loss is at most MAX_LOSS of the time since the last one: drafting
that does not pay costs a few per cent, whatever the prompt.

Where other requests share the step, with r rows that emit s tokens on average, it emits s more tokens and takes
K d + t(r + K + 1): everybody waits for a draft, and rows that a wide step does not give away cost what they cost. So
drafts become shorter as the batch grows, and vanish where they no longer pay.

Text comes in stretches that a draft knows and stretches that it does not, so acceptance after a block that was wholly
accepted is learned apart from acceptance after any other.

Costs are medians of the last few steps, so one disturbed step does not decide; the first step of a width is not
counted, because the plugin prepares its kernels in it. Unknown widths are taken to cost as much as known ones, and
widths seen once or twice no more than those, so a promising K is tried and then known. What is learned is kept from
one request to the next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

MAX_LOSS = 0.02
"""Share of time that probing may cost while drafting does not pay."""
HALF_LIFE = 30.0
"""Drafted blocks after which an observation of acceptance counts half."""
PRIOR = 0.7
"""Acceptance assumed before any was seen: optimistic, so that drafting starts."""
PRIOR_WEIGHT = 4.0
"""Drafted tokens that an assumption counts for."""
STATE_WEIGHT = 10.0
"""Drafted tokens that acceptance in general counts for in acceptance after one kind of block."""
TRUSTED = 3
"""Steps of a width after which its cost is believed even where it is above its neighbours'."""
MIN_SLEEP = 16
"""Fewest plain steps between two probes."""
MARGIN = 1.02
"""Drafting must promise this much over a plain step: a tie is not worth the risk."""
STALL = 4.0
"""A step slower than expected by this factor was disturbed from outside: drafting does not pay for the rest."""


class Load(NamedTuple):
    """What other requests add to a step.

    Attributes:
        rows: Tokens that they give to the target.
        tokens: Tokens that they emit on average.
    """

    rows: int = 0
    tokens: float = 0.0


ALONE = Load()


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
        if width in known and (width == 1 or len(self._samples[width]) >= TRUSTED):
            return known[width]
        below = max((w for w in known if w < width), default=None)
        above = min((w for w in known if w > width), default=None)
        guess = self._between(below, above, width)
        return guess if width not in known else min(known[width], guess or known[width])

    def _between(self, below: int | None, above: int | None, width: int) -> float | None:
        known = self._estimate
        if below is None or above is None:
            nearest = below or above
            return None if nearest is None else known[nearest]
        part = (width - below) / (above - below)
        return known[below] + part * (known[above] - known[below])


class _Acceptance:
    """Accepted and drafted tokens by position in the block; old blocks fade."""

    def __init__(self) -> None:
        self._counts: list[tuple[float, float]] = []  # accepted and drafted; replaced in one piece

    @property
    def num_positions(self) -> int:
        """Positions that were seen."""
        return len(self._counts)

    def chance(self, position: int, assumed: float, weight: float) -> float:
        """Return the chance of a position, before which `assumed` counts for `weight` tokens."""
        if position >= len(self._counts):
            return assumed
        accepted, drafted = self._counts[position]
        return (weight * assumed + accepted) / (weight + drafted)

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Count one block; all positions fade, so that one which was unlucky and then avoided gets another chance."""
        seen = min(num_drafted, num_accepted + 1)
        decay = 0.5 ** (1 / HALF_LIFE)
        counts = [(decay * accepted, decay * drafted) for accepted, drafted in self._counts]
        counts += [(0.0, 0.0)] * (seen - len(counts))
        for position in range(seen):
            accepted, drafted = counts[position]
            counts[position] = accepted + (position < num_accepted), drafted + 1
        self._counts = counts

    def copy(self) -> _Acceptance:
        """Return one that has seen the same."""
        made = _Acceptance()
        made._counts = self._counts
        return made

    def forgive(self) -> None:
        """Forget most rejections: the text may have changed."""
        self._counts = [(accepted, accepted + (drafted - accepted) / 4) for accepted, drafted in self._counts]


class DraftCosts:
    """Seconds of a source of drafts: d for each drafted token, and those of reading what it has not read."""

    def __init__(self) -> None:
        self._drafted: deque[float] = deque(maxlen=9)
        self._read: deque[float] = deque(maxlen=3)
        self._is_warm = False
        self.seconds = 0.0
        self.seconds_to_read_one = 0.0  # the optimistic guess, before a long lag was measured

    def record(self, num_drafted: int, draft_s: float, lag: int) -> None:
        """Take one measured draft; the first one only warms the source up."""
        if lag > num_drafted + 1:
            self._read.append(max(0.0, draft_s - num_drafted * self.seconds) / lag)
            self.seconds_to_read_one = median(self._read)
        elif self._is_warm:
            self._drafted.append(draft_s / num_drafted)
            self.seconds = median(self._drafted)
        self._is_warm = True


class Pacing:
    """Chooses K for one source of drafts in one request.

    Args:
        costs: The target's costs, shared by all sources.
        draft_costs: The source's, shared by all requests; None for new ones.
    """

    def __init__(self, costs: TargetCosts, draft_costs: DraftCosts | None = None) -> None:
        self._costs = costs
        self._draft_costs = draft_costs or DraftCosts()
        self._overall = _Acceptance()
        self._after_whole = {False: _Acceptance(), True: _Acceptance()}
        self._was_whole = False
        self._asleep = 0
        self._lost_s = 0.0

    def for_request(self) -> Pacing:
        """Return a pacing for another request: it shares the costs, and begins with the acceptance learned here."""
        made = Pacing(self._costs, self._draft_costs)
        made._overall = self._overall.copy()
        made._after_whole = {was: acceptance.copy() for was, acceptance in self._after_whole.items()}
        made._was_whole, made._asleep, made._lost_s = self._was_whole, self._asleep, self._lost_s
        return made

    def choose(self, max_draft_tokens: int, lag: int = 0, remaining: int = 1 << 30, load: Load = ALONE) -> int:
        """Return K for the next step.

        Args:
            max_draft_tokens: Upper bound of K.
            lag: Tokens the draft has to read before it can draft.
            remaining: Tokens the request may still emit: a draft that must read much for little is not started.
            load: What other requests add to the step.
        """
        if self._asleep > 1:
            self._asleep -= 1
            return 0
        if max_draft_tokens <= 0 or self._costs.seconds(load.rows + 1) is None:
            return 0
        if self._asleep == 1:
            return self._wake(max_draft_tokens, load)
        best, seconds = self.best(max_draft_tokens, load)
        if best == 0 or lag == 0:
            return best
        gain = remaining * (self.best(0, load)[1] - seconds) * (load.tokens + 1)
        return best if gain > lag * self._draft_costs.seconds_to_read_one else 0

    def best(self, max_draft_tokens: int, load: Load = ALONE) -> tuple[int, float]:
        """Return the K of the least expected seconds per token of the step, and those seconds."""
        plain_s = self._costs.seconds(load.rows + 1) or 0.0
        plain = plain_s / (load.tokens + 1)
        best, least = 0, plain / MARGIN
        tokens, chance = load.tokens + 1.0, 1.0
        for k, acceptance in enumerate(self.acceptances(max_draft_tokens), 1):
            chance *= acceptance
            tokens += chance
            seconds = self._step_seconds(k, plain_s, load) / tokens
            if seconds < least:
                best, least = k, seconds
        return (best, least) if best else (0, plain)

    def expected_tokens(self, num_drafted: int) -> float:
        """Return how many tokens a step with so many drafted ones emits on average."""
        tokens, chance = 1.0, 1.0
        for acceptance in self.acceptances(num_drafted):
            chance *= acceptance
            tokens += chance
        return tokens

    def acceptances(self, count: int) -> list[float]:
        """Return, for each of the first `count` draft tokens, the chance of it once those before it were accepted.

        A position is assumed to be like the one before it until it was seen itself, and after the last kind of block
        like after any.
        """
        overall, chance, chances = PRIOR, PRIOR, []
        for position in range(count):
            if position < self._overall.num_positions:
                overall = self._overall.chance(position, overall, PRIOR_WEIGHT)
                chance = self._after_whole[self._was_whole].chance(position, overall, STATE_WEIGHT)
            chances.append(chance)
        return chances

    def record(
        self,
        num_drafted: int,
        num_accepted: int,
        draft_s: float,
        target_s: float,
        lag: int = 0,
        load: Load = ALONE,
    ) -> None:
        """Learn from one step.

        Args:
            num_drafted: K of the step, at least 1.
            num_accepted: How many of them were kept.
            draft_s: Seconds spent drafting.
            target_s: Seconds of the target's forward and the verification, other requests' included.
            lag: Tokens the draft had to read before it could draft.
            load: What other requests added to the step, their drafts included.
        """
        self._draft_costs.record(num_drafted, draft_s, lag)
        for acceptance in (self._overall, self._after_whole[self._was_whole]):
            acceptance.observe(num_drafted, num_accepted)
        self._was_whole = num_accepted == num_drafted
        plain = self._costs.seconds(load.rows + 1)
        if plain is None:
            return
        expected = lag * self._draft_costs.seconds_to_read_one + self._step_seconds(num_drafted, plain, load)
        spent = min(draft_s + target_s, STALL * expected)
        self._lost_s = max(0.0, self._lost_s + spent - plain - num_accepted * plain / (load.tokens + 1))
        if self.best(num_drafted + 1, load)[0] == 0:
            self._asleep = max(MIN_SLEEP, int(self._lost_s / (MAX_LOSS * plain)))
            self._lost_s = 0.0

    def _wake(self, max_draft_tokens: int, load: Load) -> int:
        """Probe, forgiving old rejections."""
        self._asleep = 0
        for acceptance in (self._overall, *self._after_whole.values()):
            acceptance.forgive()
        return max(1, self.best(max_draft_tokens, load)[0])

    def _step_seconds(self, num_drafted: int, plain: float, load: Load) -> float:
        """Return K d + t(r + K + 1)."""
        return num_drafted * self._draft_costs.seconds + (self._costs.seconds(load.rows + num_drafted + 1) or plain)


def median(samples: Iterable[float]) -> float:
    """Return the middle sample, the upper one of two."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 2]
