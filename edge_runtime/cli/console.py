"""What the command line prints: the model's text on stdout as it comes, everything else on stderr.

Colour only on a terminal and never with NO_COLOR. rich is imported for tables alone: it costs more than the rest.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

import typer

from edge_runtime import strict_json

if TYPE_CHECKING:
    from edge_runtime.metrics import Metrics


class Bench(Protocol):
    """What `edge-run bench` runs."""

    def run(self) -> Iterator[Any]:
        """Measure; yield after each part."""

    def rows(self) -> list[dict[str, Any]]:
        """Return what is measured so far."""


STATUS_DELAY_S = 0.5
"""A wait shorter than this is not worth a word."""


def use_utf8() -> None:
    """Let the streams carry every character: a Windows pipe or an old terminal would refuse most of them."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def write(text: str) -> None:
    """Write a piece of the model's text and show it at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(value: Any) -> None:
    """Print one JSON object."""
    write(strict_json.dumps(value, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """Print a discreet line on stderr."""
    _print_stderr(_styled(text, dim=True))


def note_trial(folder: Path) -> None:
    """Suggest the command that suits a new model."""
    from edge_runtime.errors import EdgeError
    from edge_runtime.text.tokenizer import Tokenizer

    can_chat = False
    with contextlib.suppress(EdgeError):  # a folder without a tokenizer
        can_chat = Tokenizer(folder).has_chat_template
    chat, generate = f"edge-run chat -m {folder}", f'edge-run generate -m {folder} "Once upon a time"'
    note(f"try it: {chat if can_chat else generate}")


def print_error(message: str, hint: str | None) -> None:
    """Print an error and, on its own line, what to do about it."""
    _print_stderr(_styled("error:", fg="red", bold=True) + " " + _one_line(message))
    if hint:
        _print_stderr(_styled("hint:", fg="cyan", bold=True) + " " + _one_line(hint))


def is_closed_pipe(error: Exception) -> bool:
    """Whether writing failed because the reader has left, as after `| head`; Windows calls it an invalid argument."""
    if isinstance(error, BrokenPipeError):
        return True
    is_invalid = isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None
    return sys.platform == "win32" and is_invalid


def abandon_if_broken(stream: TextIO) -> bool:
    """Return whether a stream refuses what is left in it, which then goes nowhere.

    Otherwise the interpreter's last flush would fail again, and change the exit code.
    """
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


class Status:
    """One line on a terminal's stderr that says what is waited for, and vanishes."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    @property
    def elapsed_s(self) -> float:
        """Seconds waited so far."""
        return time.perf_counter() - self._started

    def show(self, text: str) -> None:
        """Replace the line, unless the wait has only begun."""
        if sys.stderr.isatty() and self.elapsed_s > STATUS_DELAY_S:
            self.clear()
            text = text[: shutil.get_terminal_size().columns - 1]
            self._width = len(text)
            sys.stderr.write(_styled(text, dim=True))
            sys.stderr.flush()

    def clear(self) -> None:
        """Remove the line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()
            self._width = 0


def progress(*columns: Any) -> Any:
    """Return a `rich.progress.Progress` on stderr that vanishes, and shows nothing where that is no terminal.

    Args:
        columns: What follows spinner, description and bar; the elapsed time if nothing is given.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    # The file is fixed now: libraries may send what they write on sys.stderr elsewhere meanwhile.
    stderr = Console(file=sys.stderr)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:8}"),
        BarColumn(),
        *(columns or (TimeElapsedColumn(),)),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def run_with_progress(bench: Bench, unit: str, total: int) -> bool:
    """Run a benchmark to its end; return whether Ctrl-C ended it first, with whole rows to report.

    Args:
        bench: `run` yields after each of `total` parts.
        unit: What the parts are, for the bar.
        total: How many there are.
    """
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    with progress(MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task(unit, total=total)
        try:
            for _ in bench.run():
                bar.advance(task)
        except KeyboardInterrupt:
            if not bench.rows():
                raise
            return True
    return False


def print_stats(metrics: Metrics, models: dict[str, dict[str, Any]]) -> None:
    """Print what was measured of one answer, for a person.

    Args:
        metrics: Metrics of the answer.
        models: How target and draft run, see `EdgeLLM.models`.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right")
    table.add_column()
    for name, value in [*_stats(metrics), *(row for item in models.items() for row in _model_stats(*item))]:
        table.add_row(name, value)
    with _dropped_where_stderr_fails():
        Console(stderr=True, highlight=False, markup=False).print(table)


def describe_arithmetic(properties: dict[str, Any]) -> str:
    """Return in words how a model computes and keeps keys and values, and why."""
    parts = [properties["inference_precision_hint"]]
    if group := properties.get("dynamic_quantization_group_size"):
        parts.append(f"activations rounded in groups of {group}")
    parts.append(f"{properties['kv_cache_precision']} keys and values")
    return f"{', '.join(parts)}: {properties['reason']}"


def _model_stats(name: str, properties: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "reason" in properties:
        yield f"{name} computes in", describe_arithmetic(properties)
    if threads := properties.get("inference_num_threads"):
        yield f"{name} threads", str(threads)
    if added := properties.get("properties"):
        yield f"{name} properties", ", ".join(f"{key}={value}" for key, value in added.items())
    if mlp := properties.get("mlp"):
        yield f"{name} fused MLPs", mlp


def _stats(metrics: Metrics) -> list[tuple[str, str]]:
    from edge_runtime.metrics import peak_rss_bytes

    reused = f", {metrics.reused_tokens} of them still held" if metrics.reused_tokens else ""
    first = f", the first after {_seconds(metrics.ttft_s)}" if metrics.new_tokens else ""
    rows = [
        ("prompt", f"{_tokens(metrics.prompt_tokens)}{reused}"),
        ("answer", f"{_tokens(metrics.new_tokens)}{first}"),
    ]
    if metrics.new_tokens > 1:
        rows.append(("speed", f"{metrics.tokens_per_second:.1f} tokens/s ({metrics.tpot_ms:.2f} ms each)"))
    if metrics.proposed_tokens:
        rows += _draft_stats(metrics)
    memory_mib = peak_rss_bytes() / (1 << 20)
    return [*rows, ("load", _seconds(metrics.load_s)), ("peak memory", f"{memory_mib:.0f} MiB")]


def _draft_stats(metrics: Metrics) -> list[tuple[str, str]]:
    counts = zip(metrics.accepted_by_position, metrics.proposed_by_position, strict=True)
    positions = " ".join(f"{accepted / proposed:.0%}" for accepted, proposed in counts)
    accepted = f"{metrics.accepted_tokens} of {metrics.proposed_tokens} tokens ({metrics.acceptance_rate:.0%})"
    return [
        ("accepted drafts", accepted),
        ("accepted by position", positions),
        ("per target step", f"{metrics.block_efficiency:.2f} tokens ({metrics.target_forwards} steps)"),
        ("drafting", f"{metrics.draft_share:.0%} of the time"),
    ]


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number} tokens"


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _styled(text: str, **style: Any) -> str:
    return text if os.environ.get("NO_COLOR") else typer.style(text, **style)


def _print_stderr(text: str) -> None:
    with _dropped_where_stderr_fails():
        typer.echo(text, err=True)  # leaves colour out where stderr is not a terminal


@contextlib.contextmanager
def _dropped_where_stderr_fails() -> Iterator[None]:
    """Let an answer, and the exit code, be what they are where nothing can be written beside them."""
    try:
        yield
    except OSError:
        abandon_if_broken(sys.stderr)
