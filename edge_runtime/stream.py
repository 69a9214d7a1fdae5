"""One request as text: a stream of chunks, and its result.

The engine emits tokens; here they become text that never cuts a character, stop strings end it, and a cancel or a
consumer that leaves ends the request with what was generated so far.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from edge_runtime.config import GenerationConfig
from edge_runtime.engine import Token
from edge_runtime.metrics import Metrics
from edge_runtime.stop import StopStrings

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM


@dataclass(frozen=True)
class TextChunk:
    """What one token added to the text.

    Attributes:
        text: The text it completed; may be empty while a character or a stop string is undecided.
        token: The token; None for the last chunk, which only releases text held back.
    """

    text: str
    token: Token | None


@dataclass(frozen=True)
class GenerationResult:
    """A finished answer.

    Attributes:
        text: The answer, without the stop string.
        token_ids: Its tokens; with a stop string, up to the token that completed it.
        finish_reason: `stop` (a stop token or string), `length` (max_new_tokens or the context), `cancelled`.
        metrics: What was measured.
        logprobs: One entry for each token when they were asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: Metrics
    logprobs: list[Token] | None = None


class TextStream:
    """The chunks of one request as they are generated.

    Other threads' requests wait until it is exhausted, closed, cancelled or dropped; one of the same thread goes first,
    and this stream continues when it is asked for its next chunk. What was generated stays in `result`.
    """

    def __init__(
        self,
        llm: EdgeLLM,
        prompt_ids: list[int],
        config: GenerationConfig,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self._turns = llm.turns
        self._answer = _Answer(llm, prompt_ids, config, on_prefill)
        self._chunks = self._answer.run()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextChunk:
        if inspect.getgeneratorstate(self._chunks) == inspect.GEN_CLOSED:  # no turn is needed to say so
            raise StopIteration
        self._turns.take(self)
        try:
            return next(self._chunks)
        except BaseException:
            self._turns.give_back(self)
            raise

    def __del__(self) -> None:
        self.close()

    def cancel(self) -> None:
        """End the request after the current token; may be called from any thread."""
        self._answer.cancelled.set()

    def close(self) -> None:
        """End the request now; what follows is not generated."""
        self._chunks.close()
        self._turns.give_back(self)

    def finish(self) -> GenerationResult:
        """Generate the rest and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What was generated so far; complete once the iterator is exhausted."""
        return self._answer.result

    @property
    def is_computing(self) -> bool:
        """Whether a chunk is being generated right now."""
        return inspect.getgeneratorstate(self._chunks) == inspect.GEN_RUNNING


class _Answer:
    """What one request has produced so far, and the generator that produces it.

    Apart from `TextStream`, so that nothing but its user holds the stream: when it is dropped, the request ends.
    """

    def __init__(
        self,
        llm: EdgeLLM,
        prompt_ids: list[int],
        config: GenerationConfig,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self._llm, self._prompt_ids, self._config, self._on_prefill = llm, prompt_ids, config, on_prefill
        self._metrics = Metrics(load_s=llm.load_s)
        self._tokens: list[Token] = []
        self._text: list[str] = []
        self._finish_reason = "cancelled"
        self.cancelled = threading.Event()

    @property
    def result(self) -> GenerationResult:
        """What was generated so far."""
        return GenerationResult(
            text="".join(self._text),
            token_ids=[token.token_id for token in self._tokens],
            finish_reason=self._finish_reason,
            metrics=self._metrics,
            logprobs=None if self._config.logprobs is None else self._tokens,
        )

    def run(self) -> Generator[TextChunk, None, None]:
        """Generate."""
        try:
            yield from self._generate()
        except _CancelledError:
            return

    def _generate(self) -> Iterator[TextChunk]:
        config = self._config
        decoder = self._llm.tokenizer.decode_stream(self._prompt_ids)
        stop = StopStrings(config.stop)
        tokens = self._llm.engine.generate(
            self._prompt_ids, config, self._llm.stop_token_ids(config), self._metrics, self._check_cancelled
        )
        for token in tokens:
            self._tokens.append(token)
            yield self._chunk(stop.push(decoder.push(token.token_id)), token)
            if stop.is_found:
                self._finish_reason = "stop"
                return
            if self.cancelled.is_set():
                return
        at_limit = len(self._tokens) >= config.max_new_tokens
        yield self._chunk(stop.push(decoder.flush()) + stop.flush(), None)
        self._finish_reason = "length" if at_limit or self._is_context_full else "stop"

    @property
    def _is_context_full(self) -> bool:
        return len(self._prompt_ids) + len(self._tokens) >= self._llm.engine.target.model.context_length

    def _chunk(self, text: str, token: Token | None) -> TextChunk:
        self._text.append(text)
        return TextChunk(text, token)

    def _check_cancelled(self, done: int, wanted: int) -> None:
        if self.cancelled.is_set():
            raise _CancelledError
        if self._on_prefill:
            self._on_prefill(done, wanted)


class _CancelledError(Exception):
    """Ends a request between two chunks of its prompt."""
