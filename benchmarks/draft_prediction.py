"""How much faster drafting should be, from the costs of single forwards: the half of draft_speedup.py that predicts.

With fixed K and block efficiency τ (tokens for each target forward), speedup = τ t_target(1) / (K t_draft +
t_target(K + 1)). Costs, τ and the speedup that came out are measured prompt by prompt. Also here, because both halves
use it: how EdgeLLM answers a prompt.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from decode import PRECISIONS
from measure import interleave, paired_ratio, spread

from edge_runtime import EdgeLLM
from edge_runtime.tokenizer import Tokenizer

BLOCKS = (3, 5)
"""K of the peer, and of the prediction."""
REPEATS = 8
"""Timings of each forward for a prompt's prediction."""


class Settings(NamedTuple):
    """What all rounds share; `prompts` is a list of (category, text)."""

    target: Path
    draft: Path
    prompts: list[tuple[str, str]]
    temperatures: list[float]
    tokens: int
    precision: str


class Prediction(NamedTuple):
    """Measured speedup of one prompt at a fixed K, and what predicts it: τ and the costs of single forwards."""

    temperature: float
    category: str
    num_draft_tokens: int
    measured: float
    block_efficiency: float
    plain_ms: float
    draft_ms: float
    verify_ms: float

    @property
    def predicted(self) -> float:
        """τ t_target(1) / (K t_draft + t_target(K + 1))."""
        return self.block_efficiency * self.plain_ms / (self.num_draft_tokens * self.draft_ms + self.verify_ms)


def load_pair(settings: Settings) -> EdgeLLM:
    return EdgeLLM.load(settings.target, draft=settings.draft, **PRECISIONS[settings.precision][0])


def edge_answer(
    llm: EdgeLLM, settings: Settings, ids: list[int], temperature: float, num_draft_tokens: int | str
) -> tuple[float, float, tuple[int, ...]]:
    """Answer once; return tokens/s, block efficiency and the answer."""
    made = llm.generate(
        ids,
        max_new_tokens=settings.tokens,
        temperature=temperature,
        num_draft_tokens=num_draft_tokens,
        seed=0,
        ignore_eos=True,
    )
    return made.metrics.tokens_per_second, made.metrics.block_efficiency, tuple(made.token_ids)


def encoded(settings: Settings) -> list[tuple[str, int, list[int]]]:
    """Return category, number and token ids of each prompt."""
    tokenizer = Tokenizer(settings.target)
    return [(category, i, tokenizer.encode(text)) for i, (category, text) in enumerate(settings.prompts)]


def prediction_round(settings: Settings) -> list[Prediction]:
    """Compare predicted with measured speedups, prompt by prompt."""
    llm, draft = load_pair(settings), EdgeLLM.load(settings.draft, **PRECISIONS[settings.precision][0])
    return [
        prediction
        for temperature in settings.temperatures
        for category, _, ids in encoded(settings)
        for prediction in predict(llm, draft, settings, temperature, category, ids)
    ]


def predict(
    llm: EdgeLLM, draft: EdgeLLM, settings: Settings, temperature: float, category: str, ids: list[int]
) -> Iterator[Prediction]:
    """Yield the prediction of one prompt for each K."""
    efficiency: dict[int, float] = {}

    def seconds(k: int) -> float:
        speed, efficiency[k], _ = edge_answer(llm, settings, ids, temperature, k)
        return 1 / speed

    # The first answer of each, in which the draft reads the prompt, is not counted.
    measured = interleave({str(k): lambda k=k: seconds(k) for k in (0, *BLOCKS)}, rounds=2, warmup=1)
    plain = statistics.median(measured["0"])
    _, plain_ms = forward_ms(llm, draft, ids, 0)
    for k in BLOCKS:
        speedup = plain / statistics.median(measured[str(k)])
        costs = (plain_ms, *forward_ms(llm, draft, ids, k))
        yield Prediction(temperature, category, k, speedup, efficiency[k], *costs)


def forward_ms(llm: EdgeLLM, draft: EdgeLLM, ids: list[int], num_draft_tokens: int) -> tuple[float, float]:
    """Return t_draft and t_target(K + 1), medians over forwards in the order of decoding.

    The order matters: each target forward evicts the draft's weights from the caches.
    """
    target, drafter = llm.engine.target, draft.engine.target
    samples = []
    for _ in range(REPEATS):
        for model in (drafter, target):
            model.catch_up(ids)
        begin = time.perf_counter()
        for _ in range(num_draft_tokens):
            drafter.forward(ids[-1:])
        drafted = time.perf_counter()
        target.forward(ids[-1:] * (num_draft_tokens + 1), num_draft_tokens + 1)
        samples.append((drafted - begin, time.perf_counter() - drafted))
    draft_s, target_s = map(statistics.median, zip(*samples, strict=True))
    return 1000 * draft_s / max(num_draft_tokens, 1), 1000 * target_s


def prediction_summary(predictions: list[Prediction]) -> dict[str, Any]:
    """Return costs, and predicted and measured speedups, of one temperature, category and K."""
    costs = ("block_efficiency", "plain_ms", "draft_ms", "verify_ms", "predicted", "measured")
    figures = {name: [getattr(one, name) for one in predictions] for name in costs}
    ratio = paired_ratio(figures["predicted"], figures["measured"])
    return {**{name: spread(values) for name, values in figures.items()}, "predicted / measured": ratio}
