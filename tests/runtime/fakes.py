"""Fake models for tests of the engine: exact, fast, and without OpenVINO.

A `TableModel`'s logits are a row of a random table, chosen by the last two tokens of everything it holds: a cache that
holds the wrong tokens, or one too many, gives other rows and so another text. `uniforms` enumerates all that a random
generator could have answered, which turns a test of a sampling rule into exact arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters import DraftModel
from edge_runtime.decoding.engine import Engine, Token
from edge_runtime.manifest import Manifest
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import CachedModel, Rows
from edge_runtime.text.tokenizer import Tokenizer

SPREAD = 2.0
"""Standard deviation of the logits: distributions with a few likely tokens and a long tail."""


def random_table(vocab_size: int, seed: int, spread: float = SPREAD) -> NDArray[np.float32]:
    """Return logits for each pair of last tokens, (V, V, V); nearby seeds share nothing."""
    random = np.random.default_rng(seed)
    return (spread * random.standard_normal((vocab_size, vocab_size, vocab_size))).astype(np.float32)


def blended_table(table: NDArray[np.float32], other: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    """Return a table that agrees with `table` the more, the smaller `share` is: a draft of chosen quality."""
    return (1 - share) * table + share * other


class TableModel:
    """A `CausalModel` whose next-token logits depend on the last two tokens it holds.

    Args:
        table: (V, V, V) logits by last token but one and last token.
        context_length: Most tokens that fit.
    """

    def __init__(self, table: NDArray[np.float32], context_length: int = 512) -> None:
        self.vocab_size = table.shape[-1]
        self.context_length = context_length
        self.num_forwards = 0
        self.on_forward: Callable[[list[int]], None] = lambda token_ids: None
        self._table = table
        self._ids: list[int] = []
        self._rows: Rows = table[:0, 0]

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self._ids)

    @property
    def kv_bytes(self) -> int:
        """Nothing is allocated."""
        return 0

    def forward(self, token_ids: list[int], num_rows: int) -> Rows:
        """Append tokens and return the logits of the last `num_rows`; those given out before become NaN."""
        self.on_forward(token_ids)
        self._rows[...] = np.nan
        self.num_forwards += 1
        self._ids += token_ids
        assert len(self._ids) <= self.context_length, "the engine overran the context"
        # An id beyond the vocabulary, from a wider target, reads some row: OpenVINO's Gather reads zeros.
        ids = np.minimum([0, *self._ids], self.vocab_size - 1)
        first = len(ids) - num_rows
        self._rows = self._table[ids[first - 1 : -1], ids[first:]]
        return self._rows

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept."""
        del self._ids[num_tokens:]
        return len(self._ids)

    def reserve(self, num_tokens: int) -> None:
        """Nothing to reserve."""


def make_engine(
    target: NDArray[np.float32],
    draft: NDArray[np.float32] | None = None,
    *,
    chunk_size: int = 512,
    context_length: int = 512,
    draft_context_length: int = 512,
) -> Engine:
    """Return an engine over fake models."""
    drafter = None
    if draft is not None:
        drafter = DraftModel(CachedModel(TableModel(draft, draft_context_length), chunk_size), target.shape[-1])
    return Engine(CachedModel(TableModel(target, context_length), chunk_size), drafter)


def run(
    engine: Engine, prompt: Sequence[int], stop: Sequence[int] = (), metrics: Metrics | None = None, **options: Any
) -> list[int]:
    """Return the ids that an engine generates."""
    config = GenerationConfig(**{"max_new_tokens": 40, **options})
    return [token.token_id for token in generate(engine, prompt, config, stop, metrics)]


def generate(
    engine: Engine, prompt: Sequence[int], config: GenerationConfig, stop: Sequence[int], metrics: Metrics | None
) -> Iterator[Token]:
    """Start a request on an engine."""
    return engine.generate(list(prompt), config, stop, metrics)


LETTERS = "abcdefghijklmnopqrstuvwx"
"""One token each, in this order, for models of 24 tokens."""


def letter_tokenizer(folder: Path) -> Tokenizer:
    """Return a tokenizer whose tokens are letters, so that texts and token ids are easily told from each other."""
    made = tokenizers.Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return Tokenizer(folder)


def make_llm(folder: Path, engine: Engine, eos_token_ids: Sequence[int] = ()) -> EdgeLLM:
    """Return the public interface over an engine of fake models; `folder` takes its tokenizer."""
    model = engine.target.model
    manifest = Manifest(
        architecture="table",
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        eos_token_ids=tuple(eos_token_ids),
    )
    return EdgeLLM(engine, letter_tokenizer(folder), manifest, 0.0)


class EnumeratedRandom:
    """Stands for a `numpy.random.Generator`: answers `random()` with the middles of N equal parts of [0, 1).

    Args:
        parts: N; comparisons with multiples of 1 / N come out with exact frequencies.
        path: Answers given before, by number of the part; further ones are 0 and extend it.
    """

    def __init__(self, parts: int, path: list[int]) -> None:
        self.path = path
        self._parts = parts
        self._used = 0

    def random(self) -> float:
        """Return the next answer."""
        if self._used == len(self.path):
            self.path.append(0)
        self._used += 1
        return (self.path[self._used - 1] + 0.5) / self._parts


def exact_distribution(experiment: Callable[[Any], tuple[int, ...]], parts: int) -> dict[tuple[int, ...], Fraction]:
    """Return the exact distribution of what a random experiment returns.

    Args:
        experiment: Called with a random generator for every possible course of its answers.
        parts: N of `EnumeratedRandom`.
    """
    outcomes: dict[tuple[int, ...], Fraction] = {}
    path: list[int] = []
    while True:
        outcome = experiment(EnumeratedRandom(parts, path))
        outcomes[outcome] = outcomes.get(outcome, Fraction(0)) + Fraction(1, parts ** len(path))
        while path and path[-1] == parts - 1:
            path.pop()
        if not path:
            return outcomes
        path[-1] += 1
