"""A stream of text for asyncio: other tasks run while it waits. Only this file imports asyncio, which is slow."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Self

from edge_runtime.text.stream import GenerationResult, TextChunk, TextStream


class AsyncTextStream:
    """The chunks of one request, for asyncio; other tasks run while it waits.

    async for chunk in llm.astream("Once upon a time"):
        print(chunk.text, end="")
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextChunk:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(ready.set)

        self._stream.notify(wake)
        while True:
            ready.clear()
            try:
                chunk = self._stream.poll()
            except StopIteration:
                raise StopAsyncIteration from None
            if chunk is not None:
                return chunk
            await ready.wait()

    def cancel(self) -> None:
        """End the request after the current step; may be called from any thread."""
        self._stream.cancel()

    def close(self) -> None:
        """End the request after the current step, and give its memory back."""
        self._stream.close()

    async def finish(self) -> GenerationResult:
        """Generate the rest and return the result."""
        try:
            async for _ in self:
                pass
        except BaseException:
            self.close()
            raise
        return self.result

    @property
    def result(self) -> GenerationResult:
        """What was read so far; complete once the iterator is exhausted."""
        return self._stream.result
