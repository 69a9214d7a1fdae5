"""One request as text: a stream of chunks, and its result.

The engine emits tokens; here they become text that never cuts a character, stop strings end it, and a cancel or a
consumer that leaves ends the request with what was generated so far. Whether a stream computes is known from its
generator alone: no flag or lock of ours can be wrong after an exception that comes at any instruction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.engine import Token
from edge_runtime.errors import ConfigError
from edge_runtime.metrics import Metrics
from edge_runtime.text.stop import StopStrings
from edge_runtime.text.turns import Turn

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

        with llm.stream("Once upon a time") as stream:
            for chunk in stream:
                print(chunk.text, end="")

    Other threads' requests wait until it is exhausted or closed, or until its reader has not asked for a chunk for a
    while (`turns.IDLE_S`); one of the same thread goes first. A stream that has given way continues when it is asked
    for its next chunk. What was generated stays in `result`.
    """

    def __init__(
        self,
        llm: EdgeLLM,
        prompt_ids: list[int],
        config: GenerationConfig,
        on_prefill: Callable[[int, int], None] | None,
    ) -> None:
        self._answer = _Answer(llm, prompt_ids, config, on_prefill)
        self._chunks = self._answer.run()
        self._turn = self._answer.turn = Turn(llm.turns, self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextChunk:
        try:
            return next(self._chunks)
        except ValueError as error:
            if error.__traceback__ and error.__traceback__.tb_next:  # it comes from within
                raise
            raise ConfigError(
                "a stream is asked for a chunk while it computes one", "read it in one thread, outside of its callbacks"
            ) from None

    def cancel(self) -> None:
        """End the request after the current token; may be called from any thread and from a signal's handler."""
        self._turn.cancel()

    def close(self) -> None:
        """End the request after the current token, and let others go on at once; may be called from any thread."""
        self._turn.close()

    def finish(self) -> GenerationResult:
        """Generate the rest and return the result."""
        for _ in self:
            pass
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What was generated so far; complete once the iterator is exhausted."""
        return self._answer.result


class _Answer:
    """What one request has produced so far, and the generator that produces it.

    Apart from `TextStream`, so that nothing but its user holds the stream: when it is dropped, the request ends.
    """

    turn: Turn

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
        self._finish_reason: str | None = None

    @property
    def result(self) -> GenerationResult:
        """What was generated so far."""
        return GenerationResult(
            text="".join(self._text),
            token_ids=[token.token_id for token in self._tokens],
            finish_reason=self._finish_reason or "cancelled",
            metrics=self._metrics,
            logprobs=None if self._config.logprobs is None else self._tokens,
        )

    def run(self) -> Generator[TextChunk, None, None]:
        """Generate, while it is this request's turn."""
        chunks = self._generate()
        with contextlib.suppress(_CancelledError):
            while self._finish_reason is None and self.turn.take():
                chunk = next(chunks)
                if self._finish_reason is None:
                    self.turn.pause()
                else:
                    self.turn.give_back()
                yield chunk
        self.turn.give_back()

    def _generate(self) -> Iterator[TextChunk]:
        config = self._config
        decoder = self._llm.tokenizer.decode_stream(self._prompt_ids)
        stop = StopStrings(config.stop)
        tokens = self._llm.engine.generate(
            self._prompt_ids, config, self._llm.stop_token_ids(config), self._metrics, self._check_cancelled
        )
        for token in tokens:
            self._tokens.append(token)
            text = stop.push(decoder.push(token.token_id))
            if stop.is_found:
                self._finish_reason = "stop"
            yield self._chunk(text, token)
            if stop.is_found:
                return
        at_limit = len(self._tokens) >= config.max_new_tokens
        self._finish_reason = "length" if at_limit or self._is_context_full else "stop"
        yield self._chunk(stop.push(decoder.flush()) + stop.flush(), None)

    @property
    def _is_context_full(self) -> bool:
        return len(self._prompt_ids) + len(self._tokens) >= self._llm.engine.target.model.context_length

    def _chunk(self, text: str, token: Token | None) -> TextChunk:
        self._text.append(text)
        return TextChunk(text, token)

    def _check_cancelled(self, done: int, wanted: int) -> None:
        if self.turn.is_cancelled:
            raise _CancelledError
        if self._on_prefill:
            self._on_prefill(done, wanted)


class _CancelledError(Exception):
    """Ends a request between two chunks of its prompt."""
