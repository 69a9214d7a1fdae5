"""`edge-run train draft`: train a small draft for a target and align it with what the target writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import parse_number
from edge_runtime.cli.training import StageBars

_DATA, _SHAPE, _ALIGNMENT, _TRAINING = "Data", "Shape", "Alignment", "Training"
_Files = list[Path] | None


def _option(group: str, metavar: str, help: str, *flags: str) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=group)


def train_draft(
    target: Annotated[str, typer.Option(metavar="MODEL", help="The target: checkpoint, hub id or model folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="To make, or to go on with.")],
    text: Annotated[_Files, _option(_DATA, "PATH", "Text files or folders. Repeatable.")] = None,
    code: Annotated[_Files, _option(_DATA, "PATH", "The same of source code. Repeatable.")] = None,
    max_tokens: Annotated[str | None, _option(_DATA, "N", "Most tokens of a stage, such as 20M.")] = None,
    window: Annotated[
        int | None, _option(_DATA, "N", "Tokens trained on at once; by default the context, at most 1024.")
    ] = None,
    size: Annotated[str, _option(_SHAPE, "N|auto", "Parameters, such as 50M; auto fits the time below.")] = "auto",
    num_layers: Annotated[
        int | None, _option(_SHAPE, "N", "Depth, which costs time; width costs little.", "--layers")
    ] = None,
    latency_share: Annotated[
        float, _option(_SHAPE, "X", "Of the target's time for a token, what auto lets the draft take.")
    ] = 0.1,
    start: Annotated[Path | None, _option(_SHAPE, "FOLDER", "A draft to start from.")] = None,
    prompts: Annotated[
        str,
        _option(
            _ALIGNMENT,
            "text|self|FILE",
            "What the target answers: beginnings of the texts, prompts of its own, or a file's.",
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
        _option(_ALIGNMENT, "NAME", "ce, kl, tvd, lk, ce+kl or ce+tvd; all but ce keep the target's likeliest tokens."),
    ] = "ce",
    top: Annotated[int, _option(_ALIGNMENT, "K", "How many of those.")] = 16,
    answer_tokens: Annotated[str, _option(_ALIGNMENT, "N", "Tokens the target writes in all, about.")] = "1M",
    num_answers: Annotated[int | None, _option(_ALIGNMENT, "N", "Answers, instead of tokens.")] = None,
    max_new_tokens: Annotated[int, _option(_ALIGNMENT, "N", "Of one answer.")] = 256,
    device: Annotated[str, _option(_ALIGNMENT, "NAME", "Where the target writes.")] = "CPU",
    stages: Annotated[
        str, _option(_TRAINING, "NAMES", "Which of pretrain, continue, align to run, comma-separated.")
    ] = "pretrain,continue,align",
    batch_size: Annotated[int, _option(_TRAINING, "N", "Windows of one update.")] = 8,
    micro_batch_size: Annotated[int, _option(_TRAINING, "N", "Windows computed at once.")] = 2,
    learning_rate: Annotated[float, _option(_TRAINING, "X", "Peak.")] = 4e-3,
    align_learning_rate: Annotated[float, _option(_TRAINING, "X", "Peak of align after another stage.")] = 2e-3,
    precision: Annotated[str, _option(_TRAINING, "TYPE", "auto, bf16 or no (f32).")] = "auto",
    seed: Annotated[int, _option(_TRAINING, "S", "Of weights and orders.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
) -> None:
    """Train a draft in three stages: on text, on code mixed with text, on what the target itself writes. Run the same
    command again to go on after an interruption. Under `accelerate launch` it trains on many GPUs, under `torchrun` on
    several processes without one."""
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
    with StageBars() as on_progress:
        made = run(DraftRecipe(**options), output, on_progress)
    if made is None:
        return  # of several processes, the first speaks
    if as_json:
        console.write((output / "training.json").read_text(encoding="utf-8"))
    else:
        print(f"{output}: the draft; {output / 'openvino'}: its int8 form, for `--draft`")
