"""One request as text: a stream of chunks, and its result.

The engine's thread makes text of the tokens (`_Answer`), which never cuts a character, and lets a stop string end it.
Whoever reads the stream takes the chunks in a thread of its own, at its own pace: a few are written ahead of it, then
the request waits for it. A cancel ends the request after the current step; what was read so far stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

from edge_runtime.decoding.request import Request, Token
from edge_runtime.errors import ConfigError
from edge_runtime.metrics import Metrics
from edge_runtime.text.stop import StopStrings

if TYPE_CHECKING:
    from edge_runtime.decoding.scheduler import Scheduler
    from edge_runtime.forks import HomeProcess
    from edge_runtime.text.tokenizer import TextDecoder

AHEAD = 16
"""Tokens that are written before their reader asks for them: then a step of many need not wait for one."""
POLL_S = 0.1
"""How long a reader waits before it looks again: on Windows Ctrl-C does not end a wait."""


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
        finish_reason: `stop` (a stop token or string), `length` (max_new_tokens or the context), `cancelled`, `error`.
        metrics: What was measured.
        logprobs: One entry for each token when they were asked for.
        stop_token: The stop token that ended the answer, which is not one of its tokens; None where none did.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    metrics: Metrics
    logprobs: list[Token] | None = None
    stop_token: Token | None = None


class _Progress(NamedTuple):
    done: int
    wanted: int


class Answer:
    """What the engine's thread has written of one request and nobody has read yet; implements `request.Reader`.

    Args:
        decoder: Makes text of tokens.
        stop: Strings that end it.
        has_progress: Whether anyone wants to know how far the prompt is read.
    """

    def __init__(self, decoder: TextDecoder, stop: tuple[str, ...], has_progress: bool) -> None:
        self._decoder, self._stop, self._has_progress = decoder, StopStrings(stop), has_progress
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._asker = threading.current_thread()
        self.unread: deque[TextChunk | _Progress] = deque()
        self.is_wanted_whole = False
        self.on_wake: Callable[[], object] = self._release

    @property
    def wants_more(self) -> bool:
        """Whether fewer than AHEAD chunks are unread, or nobody reads before the end."""
        return self.is_wanted_whole or len(self.unread) < AHEAD

    @property
    def has_reader(self) -> bool:
        """Whether the thread that asked last lives, and is not ended with the process."""
        return self._asker.is_alive() and not self._asker.daemon

    def take_progress(self, done: int, wanted: int) -> None:
        """Keep it for the reader's callback."""
        if self._has_progress:
            self.unread.append(_Progress(done, wanted))
            self.on_wake()

    def take(self, token: Token) -> bool:
        """Keep what a token adds to the text; return whether a stop string is complete."""
        self.unread.append(TextChunk(self._stop.push(self._decoder.push(token.token_id)), token))
        return self._stop.is_found

    def flush(self) -> TextChunk | None:
        """Return the text held back, once no more tokens come; None where a stop string has ended it."""
        if self._stop.is_found:
            return None
        return TextChunk(self._stop.push(self._decoder.flush()) + self._stop.flush(), None)

    def wake(self, is_over: bool) -> None:
        """Wake the reader, unless it wants only the end."""
        if is_over or not self.is_wanted_whole:
            self.on_wake()

    def asked(self) -> None:
        """Note who reads."""
        self._asker = threading.current_thread()

    def sleep(self) -> None:
        """Wait for `wake`, or POLL_S."""
        self._asleep.acquire(timeout=POLL_S)

    def _release(self) -> None:
        with contextlib.suppress(RuntimeError):  # awake already
            self._asleep.release()


class TextStream:
    """The chunks of one request as they are generated.

        with llm.stream("Once upon a time") as stream:
            for chunk in stream:
                print(chunk.text, end="")

    The request begins when its first chunk is asked for, and is written a few tokens ahead of its reader. Requests of
    other streams are written at the same time, whoever reads them. What was read stays in `result`.
    """

    def __init__(
        self,
        request: Request,
        answer: Answer,
        scheduler: Scheduler,
        home: HomeProcess,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self._request, self._answer, self._scheduler, self._home = request, answer, scheduler, home
        self._on_prefill = on_prefill
        self._reading = threading.Lock()
        self._is_submitted = self._is_over = False
        self._text: list[str] = []
        self._tokens: list[Token] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self.__dict__:  # else Ctrl-C came as `__init__` began
            self._request.is_cancelled = True  # nothing else: this may be called within any call of the same thread

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TextChunk:
        with self._alone():
            while (chunk := self._poll()) is None:
                self._answer.sleep()
            return chunk

    def poll(self) -> TextChunk | None:
        """Return the next chunk, or None where it is not there yet.

        Raises:
            StopIteration: The request has ended.
            ConfigError: Another thread, or a callback of this one, is asking.
        """
        with self._alone():
            return self._poll()

    def cancel(self) -> None:
        """End the request after the current step; may be called from any thread and from a signal's handler."""
        self._request.is_cancelled = True
        self._answer.on_wake()

    def close(self) -> None:
        """End the request after the current step, and give its memory back; may be called from any thread."""
        self.cancel()
        if self._is_submitted:
            self._scheduler.go_on()

    def finish(self) -> GenerationResult:
        """Generate the rest and return the result."""
        self._answer.is_wanted_whole = True
        try:
            for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What was read so far; complete once the iterator is exhausted."""
        metrics, reason = self._request.metrics, self._request.finish_reason
        if len(self._tokens) < metrics.new_tokens:  # the rest was written ahead and not read
            metrics, reason = dataclasses.replace(metrics, new_tokens=len(self._tokens)), "cancelled"
        return GenerationResult(
            text="".join(self._text),
            token_ids=[token.token_id for token in self._tokens],
            finish_reason=reason or "cancelled",
            metrics=metrics,
            logprobs=None if self._request.config.logprobs is None else self._tokens,
            stop_token=self._request.stop_token if reason == "stop" else None,
        )

    def notify(self, on_wake: Callable[[], object]) -> None:
        """Have something called by the engine's thread when there may be a chunk, in place of waking `__next__`."""
        self._answer.on_wake = on_wake

    def _alone(self) -> threading.Lock:
        """Return the lock of whoever reads.

        Raises:
            ConfigError: It is taken.
        """
        if self._reading.locked():
            raise ConfigError(
                "a stream is asked for a chunk while it computes one", "read it in one thread, outside of its callbacks"
            )
        return self._reading

    def _poll(self) -> TextChunk | None:
        if self._is_over:
            raise StopIteration
        try:
            return self._next_chunk()
        except StopIteration:
            raise
        except BaseException:  # a callback's, or the request's own
            self._end()
            raise

    def _next_chunk(self) -> TextChunk | None:
        request, unread = self._request, self._answer.unread
        self._go_on()
        while True:
            is_complete = request.finish_reason is not None
            if request.is_cancelled or request.finish_reason == "cancelled":
                self._end()
                raise StopIteration
            if not unread:
                return self._last_chunk() if is_complete else None
            item = unread.popleft()
            if isinstance(item, TextChunk):
                return self._read(item)
            if self._on_prefill:
                self._on_prefill(*item)

    def _go_on(self) -> None:
        """Let the request be stepped, if it is not and may be."""
        self._home.check()
        self._answer.asked()
        if self._request.finish_reason is not None or self._request.is_cancelled:
            return
        if self._is_submitted:
            self._scheduler.go_on()
        else:
            self._is_submitted = True
            self._scheduler.submit([self._request])

    def _last_chunk(self) -> TextChunk:
        self._is_over = True
        if self._request.error:
            raise self._request.error
        chunk = self._answer.flush()
        if chunk is None:
            raise StopIteration
        return self._read(chunk)

    def _end(self) -> None:
        self._is_over = self._request.is_cancelled = True
        if self._is_submitted:
            self._scheduler.go_on()

    def _read(self, chunk: TextChunk) -> TextChunk:
        self._text.append(chunk.text)
        if chunk.token is not None:
            self._tokens.append(chunk.token)
        return chunk


def finish_together(streams: list[TextStream]) -> list[GenerationResult]:
    """Generate several streams of one model at the same time, from the first step on, and return their results.

    Where one fails the others are ended, and its error is raised.
    """
    try:
        for stream in streams:
            stream._answer.is_wanted_whole = stream._is_submitted = True
        if streams:
            streams[0]._scheduler.submit([stream._request for stream in streams])
        return [stream.finish() for stream in streams]
    finally:
        for stream in streams:
            stream.close()
