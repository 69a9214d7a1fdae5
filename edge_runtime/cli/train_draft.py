"""`edge-run train draft`: train a small draft for a target and align it with what the target writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import parse_number

if TYPE_CHECKING:
    from edge_export.fastdraft.data import OnProgress

_DATA, _SHAPE, _ALIGNMENT, _TRAINING = "Data", "Shape", "Alignment", "Training"
_Files = list[Path] | None


def train_draft(
    target: Annotated[str, typer.Option(metavar="MODEL", help="The target: checkpoint, hub id or model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="To make, or to go on with.")],
    text: Annotated[
        _Files, typer.Option(metavar="PATH", help="Text files or folders. Repeatable.", rich_help_panel=_DATA)
    ] = None,
    code: Annotated[
        _Files, typer.Option(metavar="PATH", help="The same of source code. Repeatable.", rich_help_panel=_DATA)
    ] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="N", help="Most tokens of a stage, such as 20M.", rich_help_panel=_DATA)
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens trained on at once; by default the context, at most 1024.", rich_help_panel=_DATA
        ),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            metavar="N|auto", help="Parameters, such as 50M; auto fits the time below.", rich_help_panel=_SHAPE
        ),
    ] = "auto",
    num_layers: Annotated[
        int | None,
        typer.Option(
            "--layers", metavar="N", help="Depth, which costs time; width costs little.", rich_help_panel=_SHAPE
        ),
    ] = None,
    latency_share: Annotated[
        float,
        typer.Option(
            metavar="X", help="Of the target's time for a token, what auto lets the draft take.", rich_help_panel=_SHAPE
        ),
    ] = 0.1,
    start: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A draft to start from.", rich_help_panel=_SHAPE)
    ] = None,
    prompts: Annotated[
        str,
        typer.Option(
            metavar="text|self|FILE",
            help="What the target answers: beginnings of the texts, prompts of its own, or a file's.",
            rich_help_panel=_ALIGNMENT,
        ),
    ] = "text",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask in the chat template; by default where there is one.",
            rich_help_panel=_ALIGNMENT,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="ce, kl, tvd, lk, ce+kl or ce+tvd; all but ce keep the target's likeliest tokens.",
            rich_help_panel=_ALIGNMENT,
        ),
    ] = "ce",
    top: Annotated[int, typer.Option(metavar="K", help="How many of those.", rich_help_panel=_ALIGNMENT)] = 16,
    answer_tokens: Annotated[
        str, typer.Option(metavar="N", help="Tokens the target writes in all, about.", rich_help_panel=_ALIGNMENT)
    ] = "1M",
    num_answers: Annotated[
        int | None, typer.Option(metavar="N", help="Answers, instead of tokens.", rich_help_panel=_ALIGNMENT)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Of one answer.", rich_help_panel=_ALIGNMENT)] = 256,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where the target writes.", rich_help_panel=_ALIGNMENT)
    ] = "CPU",
    stages: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Which of pretrain, continue, align to run, comma-separated.",
            rich_help_panel=_TRAINING,
        ),
    ] = "pretrain,continue,align",
    batch_size: Annotated[int, typer.Option(metavar="N", help="Windows of one update.", rich_help_panel=_TRAINING)] = 8,
    micro_batch_size: Annotated[
        int, typer.Option(metavar="N", help="Windows computed at once.", rich_help_panel=_TRAINING)
    ] = 2,
    learning_rate: Annotated[float, typer.Option(metavar="X", help="Peak.", rich_help_panel=_TRAINING)] = 4e-3,
    align_learning_rate: Annotated[
        float, typer.Option(metavar="X", help="Peak of align after another stage.", rich_help_panel=_TRAINING)
    ] = 1e-3,
    precision: Annotated[
        str, typer.Option(metavar="TYPE", help="auto, bf16 or no (f32).", rich_help_panel=_TRAINING)
    ] = "auto",
    seed: Annotated[int, typer.Option(metavar="S", help="Of weights and orders.", rich_help_panel=_TRAINING)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
) -> None:
    """Train a draft in three stages: on text, on code mixed with text, on what the target itself writes. Run the same
    command again to go on after an interruption; under `accelerate launch` it trains on many processes."""
    from edge_export.extra import require_export_extra

    require_export_extra()
    from edge_export.fastdraft.recipe import DraftRecipe
    from edge_export.fastdraft.stages import train_draft as run

    given = dict(locals())
    options = {field.name: given[field.name] for field in dataclasses.fields(DraftRecipe)}
    options["text"], options["code"] = tuple(text or ()), tuple(code or ())
    options["size"] = None if size == "auto" else parse_number("--size", size)
    options["max_tokens"] = max_tokens and parse_number("--max-tokens", max_tokens)
    options["answer_tokens"] = parse_number("--answer-tokens", answer_tokens)
    options["stages"] = tuple(name.strip() for name in stages.split(","))
    with _StageBars() as on_progress:
        run(DraftRecipe(**options), output, on_progress)
    if as_json:
        console.write((output / "training.json").read_text(encoding="utf-8"))
    else:
        print(f"{output}: the draft; {output / 'openvino'}: its int8 form, for `--draft`")


class _StageBars:
    """A bar for each stage on a terminal's stderr; elsewhere a line as a stage begins."""

    def __init__(self) -> None:
        from rich.progress import TextColumn, TimeRemainingColumn

        counts = TextColumn("{task.completed:,.0f}/{task.total:,.0f}")
        self._bars = console.progress(counts, TimeRemainingColumn(), TextColumn("{task.fields[figure]}"))
        self._stage = ""

    def __enter__(self) -> OnProgress:
        self._bars.start()
        return self._show

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def _show(self, stage: str, done: int, wanted: int, figure: str) -> None:
        if stage != self._stage:
            self._stage = stage
            self._task = self._bars.add_task(stage, total=wanted, figure="")
            if self._bars.disable:
                console.note(f"{stage}: {wanted:,} to do")
        self._bars.update(self._task, completed=done, total=wanted, figure=figure)
