"""Fake models for tests of the engine: exact, fast, and without OpenVINO.

A `TableModel`'s logits are a row of a random table, chosen by the last two tokens of everything it holds: a cache that
holds the wrong tokens, or one too many, gives other rows and so another text. `uniforms` enumerates all that a random
generator could have answered, which turns a test of a sampling rule into exact arithmetic.
"""

from __future__ import annotations

import json
from collections import deque
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
from edge_runtime.decoding.drafters.draft_model import DraftModel
from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.request import Request, Token
from edge_runtime.manifest import Manifest
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import Output, Rows, Span, num_common
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
    """A `CausalModel` whose next-token logits depend on the last two tokens of a sequence.

    Args:
        table: (V, V, V) logits by last token but one and last token.
        context_length: Most tokens that fit.
        chunk_size: Most tokens of a span that is part of a prompt.
        max_sequences: Most spans of a forward.

    Attributes:
        num_forwards: Forwards so far.
        on_forward: Called with all spans' token ids before each.
        most_spans: Most spans that a forward had.
    """

    def __init__(
        self, table: NDArray[np.float32], context_length: int = 512, chunk_size: int = 512, max_sequences: int = 16
    ) -> None:
        self.vocab_size = table.shape[-1]
        self.context_length, self.chunk_size, self.max_sequences = context_length, chunk_size, max_sequences
        self.device = "CPU"
        self.kv_bytes = self.token_kv_bytes = 0
        self.num_forwards = self.most_spans = 0
        self.on_forward: Callable[[list[int]], None] = lambda token_ids: None
        self._table = table
        self.open_sequences: list[TableSequence] = []
        self._closed: deque[list[int]] = deque(maxlen=8)
        self._rows: list[Rows] = []

    def sequence(self, token_ids: list[int] | None = None) -> TableSequence:
        """Return a sequence that holds what any has held of the beginning of these tokens."""
        ids = token_ids or []
        known = max((num_common(ids, held) for held in self._held()), default=0)
        made = TableSequence(self, ids[: min(known, len(ids) - 1)])
        self.open_sequences.append(made)
        return made

    def forward(self, spans: Sequence[Span]) -> list[Output]:
        """Append tokens; the rows given out before become NaN."""
        self.on_forward([token_id for span in spans for token_id in span.token_ids])
        assert len({id(span.sequence) for span in spans}) == len(spans) <= self.max_sequences
        for rows in self._rows:
            rows[...] = np.nan
        self.num_forwards += 1
        self.most_spans = max(self.most_spans, len(spans))
        self._rows = [self._append(span) for span in spans]
        return [Output(rows) for rows in self._rows]

    def close(self) -> None:
        """Forget what closed sequences held."""
        self._closed.clear()

    def report(self) -> dict[str, Any]:
        """Return nothing of interest."""
        return {"device": self.device}

    def _held(self) -> list[list[int]]:
        return [*self._closed, *(sequence.token_ids for sequence in self.open_sequences)]

    def keep(self, sequence: TableSequence) -> None:
        """Take back a closed sequence."""
        self.open_sequences.remove(sequence)
        self._closed.append(sequence.token_ids)

    def drop(self, sequence: TableSequence) -> None:
        """Drop a sequence, and closed ones that begin with its first token."""
        self.open_sequences.remove(sequence)
        alike = [held for held in self._closed if held[:1] == sequence.token_ids[:1]]
        for held in alike:
            self._closed.remove(held)

    def _append(self, span: Span) -> Rows:
        assert span.sequence in self.open_sequences, "a closed sequence is used"
        held = span.sequence.token_ids
        held += span.token_ids
        assert len(held) <= self.context_length, "the engine overran the context"
        # An id beyond the vocabulary, from a wider target, reads some row: OpenVINO's Gather reads zeros.
        ids = np.minimum([0, *held], self.vocab_size - 1)
        first = len(ids) - span.num_rows
        return self._table[ids[first - 1 : -1], ids[first:]]


class TableSequence:
    """A sequence of a `TableModel`."""

    def __init__(self, model: TableModel, token_ids: list[int]) -> None:
        self._model = model
        self.token_ids = list(token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return len(self.token_ids)

    def rollback(self, num_tokens: int) -> int:
        """Keep the first `num_tokens` tokens and forget the rest; return how many are kept."""
        del self.token_ids[num_tokens:]
        return len(self.token_ids)

    def reserve(self, num_tokens: int) -> None:
        """Nothing to reserve."""

    def close(self) -> None:
        """Give the tokens back."""
        self._model.keep(self)

    def discard(self) -> None:
        """Give nothing back, nor keep what begins alike."""
        self._model.drop(self)


def make_engine(
    target: NDArray[np.float32],
    draft: NDArray[np.float32] | None = None,
    *,
    chunk_size: int = 512,
    context_length: int = 512,
    draft_context_length: int = 512,
    max_sequences: int = 16,
) -> Engine:
    """Return an engine over fake models."""
    drafter = None
    if draft is not None:
        drafter = DraftModel(TableModel(draft, draft_context_length, chunk_size), target.shape[-1])
    return Engine(TableModel(target, context_length, chunk_size, max_sequences), drafter)


class TokenList(list[Token]):
    """A `Reader` that keeps the tokens."""

    wants_more = has_reader = True

    def __init__(self) -> None:
        super().__init__()
        self.progress: list[tuple[int, int]] = []

    def take_progress(self, done: int, wanted: int) -> None:
        """Keep it."""
        self.progress.append((done, wanted))

    def take(self, token: Token) -> bool:
        """Keep it."""
        self.append(token)
        return False

    def wake(self, is_over: bool) -> None:
        """Nobody sleeps."""


def start(
    engine: Engine,
    prompt: Sequence[int],
    config: GenerationConfig,
    stop: Sequence[int] = (),
    metrics: Metrics | None = None,
) -> tuple[Request, TokenList]:
    """Open a request on an engine; return it with the list that its tokens come into."""
    reader = TokenList()
    request = Request(list(prompt), config, engine.target.context_length, reader, stop, metrics)
    engine.open(request)
    return request, reader


def generate(
    engine: Engine,
    prompt: Sequence[int],
    config: GenerationConfig,
    stop: Sequence[int] = (),
    metrics: Metrics | None = None,
) -> Iterator[Token]:
    """Step one request on an engine until it ends; its tokens come as they are emitted."""
    request, reader = start(engine, prompt, config, stop, metrics)
    taken = 0
    try:
        while request.finish_reason is None:
            engine.step([request])
            yield from reader[taken:]
            taken = len(reader)
        if request.error:
            raise request.error
    finally:
        if request.finish_reason is None:
            engine.finish(request, "cancelled")


def run(
    engine: Engine, prompt: Sequence[int], stop: Sequence[int] = (), metrics: Metrics | None = None, **options: Any
) -> list[int]:
    """Return the ids that an engine generates."""
    config = GenerationConfig(**{"max_new_tokens": 40, **options})
    return [token.token_id for token in generate(engine, prompt, config, stop, metrics)]


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
    model = engine.target
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
