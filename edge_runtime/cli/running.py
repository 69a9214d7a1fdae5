"""Do what takes long so that Ctrl-C ends it cleanly: load a model, run a request, download."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from edge_runtime.background import Background
from edge_runtime.cli.console import Status
from edge_runtime.demo import is_demo

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM
    from edge_runtime.cli.options import ModelOptions
    from edge_runtime.text.stream import GenerationResult, TextStream

T = TypeVar("T")

POLL_S = 0.1


def load_model(options: ModelOptions, *, warm_up: bool = False) -> EdgeLLM:
    """Load what the options name."""

    def load() -> EdgeLLM:
        from edge_runtime.api import EdgeLLM

        llm = EdgeLLM.load(options.model, draft=options.draft, **options.load)
        if warm_up:
            llm.warm_up()
        return llm

    name = "the embedded pair" if is_demo(options.model) else options.model
    with Status() as status:
        return in_background(load, lambda: status.show(f"loading {name}, {status.elapsed_s:.0f} s"))


def in_background(work: Callable[[], T], on_wait: Callable[[], None] = lambda: None) -> T:
    """Do something in a second thread and return its result.

    This thread stays in Python meanwhile, where Ctrl-C takes effect at once, be it in the middle of a compilation or a
    download. The other one is then left behind: the process is about to end.

    Args:
        work: What takes long.
        on_wait: Called every now and then.
    """
    background = Background(work)
    while not background.is_done(POLL_S):
        on_wait()
    return background.result()


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

        with start(prompt, on_prefill=on_prefill, **options) as stream:
            previous = signal.signal(signal.SIGINT, lambda *_: stream.cancel())
            try:
                for chunk in stream:
                    status.clear()
                    if on_text:
                        on_text(chunk.text)
            finally:
                signal.signal(signal.SIGINT, previous)
    return stream.result
