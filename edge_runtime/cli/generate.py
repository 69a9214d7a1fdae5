"""`edge-run generate`: continue a prompt."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge_runtime.cli import INTERRUPTED, console
from edge_runtime.cli.options import ModelOptions, flag_of, with_model_options
from edge_runtime.cli.running import load_model, run_stream
from edge_runtime.errors import ConfigError
from edge_runtime.metrics import Metrics

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM
    from edge_runtime.decoding.request import Token
    from edge_runtime.text.stream import GenerationResult


@with_model_options()
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="Text to continue; `-`, or no text at all, reads it from stdin."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send PROMPT as a chat message, in the model's chat template.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, accepted drafts and memory on stderr.")] = False,
    *,
    options: ModelOptions,
) -> None:
    """Continue a prompt and print the text as it is generated.

    The most likely token is always taken unless --temperature is given; only `edge-run chat` follows the model's
    generation_config.json.
    """
    if "logprobs" in options.generation and not as_json:
        raise ConfigError("--logprobs needs --json, which prints them", "add `--json`")
    if options.chat and not chat:
        raise ConfigError(f"{flag_of(next(iter(options.chat)))} is given without --chat", "add `--chat`")
    text = _read_prompt(prompt)
    try:
        llm = load_model(options)
        start = functools.partial(llm.stream_chat, **options.chat) if chat else llm.stream
        result = run_stream(start, text, None if as_json else console.write, options.generation)
    except KeyboardInterrupt:
        if as_json:
            console.write_json(_cancelled_early())
        raise
    if as_json:
        console.write_json(_as_dict(result, llm))
    else:
        console.write("\n")
    if stats:
        console.print_stats(result.metrics, llm.report())
    if result.finish_reason == "cancelled":
        raise typer.Exit(INTERRUPTED)


def _read_prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("no prompt is given", 'write it in quotes: `edge-run generate "Once upon a time"`')
    text = _read_stdin() if prompt in (None, "-") else str(prompt)
    if not text:
        raise ConfigError("the prompt is empty", "give at least one character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError("the prompt is not valid UTF-8", "set the terminal's encoding to UTF-8")
    return text


def _read_stdin() -> str:
    """Return stdin without its last line end, which `echo` and editors add."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"stdin cannot be read: {error.strerror}", "give the prompt as an argument") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"stdin is not UTF-8 at byte {error.start}: {error.reason}", "convert the input to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").removesuffix("\n")


def _as_dict(result: GenerationResult, llm: EdgeLLM) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "metrics": result.metrics.as_dict(),
        "models": llm.report(),
    }
    if result.logprobs is not None:
        answer["logprobs"] = [_logprob(token, llm) for token in result.logprobs]
    return answer


def _cancelled_early() -> dict[str, Any]:
    return {"text": "", "token_ids": [], "finish_reason": "cancelled", "metrics": Metrics().as_dict()}


def _logprob(token: Token, llm: EdgeLLM) -> dict[str, Any]:
    def named(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token_id": token_id, "token": llm.tokenizer.token(token_id), "logprob": logprob}

    top = [named(token_id, logprob) for token_id, logprob in token.top_logprobs or ()]
    return {**named(token.token_id, token.logprob), "top": top}
