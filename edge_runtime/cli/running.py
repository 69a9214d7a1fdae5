"""Load a model and run a request so that Ctrl-C ends either one cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edge_runtime.cli.console import Status

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM, GenerationResult, TextStream
    from edge_runtime.cli.options import ModelOptions

POLL_S = 0.1


def load_model(options: ModelOptions) -> EdgeLLM:
    """Load what the options name.

    A second thread does it: this one stays in Python, where Ctrl-C takes effect at once, while OpenVINO compiles.
    """
    outcome: list[EdgeLLM | BaseException] = []

    def work() -> None:
        try:
            from edge_runtime.api import EdgeLLM

            outcome.append(EdgeLLM.load(options.model, draft=options.draft, **options.load))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    with Status() as status:
        while thread.is_alive():
            thread.join(POLL_S)
            status.show(f"loading {options.model}, {status.elapsed_s:.0f} s")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def run_stream(
    start: Callable[..., TextStream], prompt: Any, on_text: Callable[[str], None] | None, options: dict[str, Any]
) -> GenerationResult:
    """Run a request to its end, or to Ctrl-C, after which `finish_reason` is `cancelled`.

    Args:
        start: `EdgeLLM.stream` or `EdgeLLM.stream_chat`.
        prompt: What it takes.
        on_text: Called with each piece of text.
        options: Fields of `config.GenerationConfig`.
    """
    with Status() as status:

        def on_prefill(done: int, wanted: int) -> None:
            status.show(f"reading the prompt, {done} of {wanted} tokens")

        stream = start(prompt, on_prefill=on_prefill, **options)
        previous = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
        try:
            for chunk in stream:
                status.clear()
                if on_text:
                    on_text(chunk.text)
        finally:
            signal.signal(signal.SIGINT, previous)
    return stream.result
