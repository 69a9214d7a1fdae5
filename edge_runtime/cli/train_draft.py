"""`edge-run train draft`: train a small draft for a target and align it with what the target writes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_runtime.cli import console
from edge_runtime.cli.options import ADVANCED, COMMON
from edge_runtime.cli.parsing import parse_number
from edge_runtime.cli.training import TRAINING, AsJson, BatchSize, MicroBatchSize, Output, Precision, StageBars

_DATA, _SHAPE, _ALIGNMENT = "Data", "Shape", "Alignment"
_Files = list[Path] | None


def _option(group: str, metavar: str, help: str, *flags: str) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=group)


def train_draft(
    target: Annotated[
        str, typer.Option(metavar="MODEL", help="Target model: a Hugging Face folder or hub id, or an exported folder.")
    ],
    output: Output,
    text: Annotated[_Files, _option(COMMON, "PATH", "Text file or folder to train on. Repeatable.")] = None,
    code: Annotated[_Files, _option(COMMON, "PATH", "Source code file or folder to train on. Repeatable.")] = None,
    size: Annotated[
        str, _option(COMMON, "N|auto", "Number of parameters, such as 50M; auto fits them to --latency-share.")
    ] = "auto",
    as_json: AsJson = False,
    max_tokens: Annotated[
        str | None,
        _option(_DATA, "N", "Train each stage on at most N tokens, such as 20M; by default all of the text."),
    ] = None,
    window: Annotated[
        int | None,
        _option(_DATA, "N", "Train on windows of N tokens; by default the target's context length, at most 1024."),
    ] = None,
    num_layers: Annotated[
        int | None,
        _option(_SHAPE, "N", "Number of layers; more layers slow the draft down, more width hardly does.", "--layers"),
    ] = None,
    latency_share: Annotated[
        float,
        _option(_SHAPE, "X", "Largest draft time per token, as a fraction of the target's (with --size auto)."),
    ] = 0.1,
    start: Annotated[
        Path | None, _option(_SHAPE, "FOLDER", "Existing draft to start from instead of random weights.")
    ] = None,
    prompts: Annotated[
        str,
        _option(
            _ALIGNMENT,
            "text|self|FILE",
            "Prompts that the target answers: beginnings of the texts, its own inventions (self), or lines of a file.",
        ),
    ] = "text",
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask the target in its chat template; by default if it has one.",
            rich_help_panel=_ALIGNMENT,
        ),
    ] = None,
    loss: Annotated[
        str,
        _option(_ALIGNMENT, "NAME", "Alignment loss: ce, kl, tvd, lk, ce+kl or ce+tvd."),
    ] = "ce",
    top: Annotated[
        int,
        _option(_ALIGNMENT, "K", "Number of most likely target tokens kept per position, for every loss but ce."),
    ] = 16,
    answer_tokens: Annotated[
        str, _option(_ALIGNMENT, "N", "Approximate number of tokens that the target writes in total.")
    ] = "1M",
    num_answers: Annotated[
        int | None, _option(_ALIGNMENT, "N", "Number of answers that the target writes; replaces --answer-tokens.")
    ] = None,
    max_new_tokens: Annotated[int, _option(_ALIGNMENT, "N", "Longest answer of the target, in tokens.")] = 256,
    device: Annotated[str, _option(_ALIGNMENT, "NAME", "Device on which the target writes its answers.")] = "CPU",
    stages: Annotated[
        str, _option(TRAINING, "NAMES", "Stages to run, separated by commas: pretrain, continue, align.")
    ] = "pretrain,continue,align",
    learning_rate: Annotated[float, _option(TRAINING, "X", "Peak learning rate.")] = 4e-3,
    align_learning_rate: Annotated[
        float, _option(ADVANCED, "X", "Peak learning rate of the align stage after another stage.")
    ] = 2e-3,
    batch_size: BatchSize = 8,
    micro_batch_size: MicroBatchSize = 2,
    precision: Precision = "auto",
    seed: Annotated[int, _option(ADVANCED, "S", "Random seed of the initial weights and the order of the text.")] = 0,
) -> None:
    """Train a draft model for a target. Three stages follow each other: text, code mixed with text, and answers that
    the target writes. Run the same command again to resume after an interruption. Under `accelerate launch` it trains
    on many GPUs, under `torchrun` in several CPU processes."""
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
        print(f"draft: {output}\nits int8 export, for `--draft`: {output / 'openvino'}")
