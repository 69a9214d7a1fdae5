"""The options that generate and chat share: one for each field of `LoadConfig` and `GenerationConfig`.

`config.py` owns names and defaults; here stands only what a command line adds: the flag, the help and how a word
becomes a value. `with_model_options` puts them all on a command, which receives them as one `ModelOptions`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import typer

from edge_runtime.cli.parsing import auto_or_number, biases, properties, template_options, unescaped
from edge_runtime.config import GenerationConfig, LoadConfig
from edge_runtime.demo import or_demo
from edge_runtime.errors import ConfigError
from edge_runtime.text.chat_config import ChatConfig

COMMON, SAMPLING, DRAFTING, DEVICE, ADVANCED = "Options", "Sampling", "Drafting", "Device", "Advanced"
"""Headings of the help, in its order."""


class _Option(NamedTuple):
    group: str
    kind: Any
    metavar: str | None
    help: str
    flags: tuple[str, ...] = ()
    parse: Callable[[Any], Any] = lambda value: value


_OPTIONS: dict[str, _Option] = {
    "max_new_tokens": _Option(COMMON, int, "N", "Stop after N new tokens.", ("-n", "--max-new-tokens")),
    "temperature": _Option(
        COMMON, float, "T", "Sampling temperature; 0 always takes the most likely token.", ("-t", "--temperature")
    ),
    "stop": _Option(
        COMMON,
        list[str],
        "TEXT",
        r"Stop before TEXT appears in the answer; `\n`, `\t` and `\\` are understood. Repeatable.",
        (),
        unescaped,
    ),
    "stop_token_ids": _Option(
        ADVANCED, list[int], "ID", "Stop after the token with this id. Repeatable.", ("--stop-token-id",), tuple
    ),
    "ignore_eos": _Option(ADVANCED, bool, None, "Keep generating past the model's end-of-text token."),
    "logprobs": _Option(
        ADVANCED, int, "N", "With --json, report the log-probability of each token and of the N most likely tokens."
    ),
    "top_k": _Option(SAMPLING, int, "K", "Sample from the K most likely tokens; 0 disables this limit."),
    "top_p": _Option(
        SAMPLING, float, "P", "Sample from the fewest tokens whose probabilities add up to P; 1 disables this limit."
    ),
    "min_p": _Option(
        SAMPLING, float, "P", "Drop tokens less than P times as likely as the most likely one; 0 disables this limit."
    ),
    "repetition_penalty": _Option(
        SAMPLING, float, "X", "Make tokens that occurred before less likely; 1 disables the penalty."
    ),
    "presence_penalty": _Option(ADVANCED, float, "X", "Subtract X from the logit of every token generated so far."),
    "frequency_penalty": _Option(
        ADVANCED, float, "X", "Subtract X from a token's logit for each time that it was generated."
    ),
    "logit_bias": _Option(
        ADVANCED,
        list[str],
        "ID=BIAS",
        "Add BIAS to the logit of the token with this id; -inf forbids the token. Repeatable.",
        (),
        biases,
    ),
    "template_options": _Option(
        ADVANCED,
        list[str],
        "NAME=VALUE",
        "Set a variable of the model's chat template, such as enable_thinking=false. Repeatable.",
        ("--template-option",),
        template_options,
    ),
    "special_tokens_in_messages": _Option(
        ADVANCED,
        bool,
        None,
        "In chats, read special tokens written out in a message, such as <|im_end|>, as special tokens, not as text.",
    ),
    "seed": _Option(
        SAMPLING,
        int,
        "S",
        "Random seed; the same seed gives the same answer in f32; at default precision 10 of 80 answers differed.",
    ),
    "num_draft_tokens": _Option(
        DRAFTING,
        str,
        "auto|K",
        "Draft K tokens before each step of the model; auto follows measured costs, 0 disables drafting.",
        (),
        auto_or_number,
    ),
    "lookup": _Option(DRAFTING, bool, None, "Also draft by copying what followed the same words earlier in the text."),
    "max_draft_tokens": _Option(ADVANCED, int, "K", "Draft at most K tokens a step with --num-draft-tokens auto."),
    "device": _Option(DEVICE, str, "NAME", "Device that runs the model: CPU, GPU, GPU.1 or NPU."),
    "draft_device": _Option(DEVICE, str, "NAME", "Device that runs the draft; by default the model's device."),
    "precision": _Option(
        DEVICE,
        str,
        "TYPE",
        "Arithmetic precision: auto, f32, bf16 or f16; in f32 drafting never changes a greedy answer.",
    ),
    "num_threads": _Option(DEVICE, int, "N", "Number of CPU threads; 0 lets the device choose.", ("--threads",)),
    "context_length": _Option(
        DEVICE,
        int,
        "N",
        "Hold at most N tokens, prompt and answer together; by default the model's context, on NPU at most 2048.",
    ),
    "kv_precision": _Option(
        ADVANCED, str, "TYPE", "Precision in which keys and values are stored: auto, f32, bf16, f16, u8 or u4."
    ),
    "prefill_chunk_size": _Option(ADVANCED, int, "N", "Read the prompt N tokens at a time; fewer need less memory."),
    "activation_group_size": _Option(
        ADVANCED,
        int,
        "N",
        "CPU: round activations to int8 in groups of N, 0 for none; by default 128 or the weights' group, in f32 none.",
    ),
    "npu_step_tokens": _Option(ADVANCED, int, "N", "NPU: compute N tokens in each step; 1 or a multiple of 8."),
    "attention": _Option(
        ADVANCED, str, "KIND", "Attention op on CPU: auto, block_sparse (edge-run's own) or stock (OpenVINO's)."
    ),
    "mlp": _Option(
        ADVANCED, str, "KIND", "Ops that run fused MLPs on CPU: fused, stock (OpenVINO's), or auto, which times both."
    ),
    "cache_dir": _Option(
        DEVICE, str, "FOLDER", "Folder that keeps models compiled for GPU or NPU; on CPU they load no faster with it."
    ),
    "prefix_cache_bytes": _Option(
        ADVANCED, int, "N", "Keep up to N bytes of keys and values of earlier prompts for later ones that begin alike."
    ),
    "prefix_cache_dir": _Option(
        DEVICE, str, "FOLDER", "Folder that keeps keys and values of prompts, so that a later run need not read them."
    ),
    "properties": _Option(
        ADVANCED,
        list[str],
        "NAME=VALUE",
        "Set an OpenVINO property of the model, and of a draft on the same device. Repeatable.",
        ("--property",),
        properties,
    ),
    "draft_properties": _Option(
        ADVANCED,
        list[str],
        "NAME=VALUE",
        "Set an OpenVINO property of the draft, in place of those that --property sets. Repeatable.",
        ("--draft-property",),
        properties,
    ),
}

# A field's name in a message: its first word, in backticks, or with an underscore; `stop` may be an ordinary word.
_FIELD = re.compile("|".join(rf"\b{name}\b" if "_" in name else rf"^{name}\b|(?<=`){name}(?=`)" for name in _OPTIONS))


@dataclass(frozen=True)
class ModelOptions:
    """What a command line said about the model and the answer.

    Attributes:
        model: Folder of the target; the embedded one if none is named.
        draft: Folder of the draft; None for none.
        load: Fields of `config.LoadConfig`, valid ones.
        generation: Fields of `config.GenerationConfig` that were given, valid ones.
        chat: Fields of `chat_config.ChatConfig` that were given, valid ones.
    """

    model: str
    draft: str | None
    load: dict[str, Any]
    generation: dict[str, Any]
    chat: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, model: str | None, draft: str | None, words: dict[str, Any]) -> Self:
        """Turn the words of a command line into checked options.

        Raises:
            ConfigError: A value is bad.
        """
        target, drafter = or_demo(model, draft)
        given = {name: _OPTIONS[name].parse(word) for name, word in words.items() if word not in (None, [])}
        load, generation, chat = (_checked(config, given) for config in (LoadConfig, GenerationConfig, ChatConfig))
        return cls(str(target), None if drafter in (None, "none") else str(drafter), load, generation, chat)


def with_model_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `ModelOptions`, which it takes as the keyword `options`.

    Args:
        left_out: Fields of the configs that make no sense for this command.
    """
    shared = [_model, _draft, *(_parameter(name) for name in _OPTIONS if name not in left_out)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)

        @functools.wraps(command)
        def with_options(context: typer.Context, model: str | None, draft: str | None, **values: Any) -> None:
            shared_values = {name: values.pop(name) for name in _OPTIONS if name in values}
            words = {name: word for name, word in shared_values.items() if _is_given(context, name)}
            try:
                command(**values, options=ModelOptions.parse(model, draft, words))
            except ConfigError as error:
                hint = error.hint or "`--help` explains each option"
                raise ConfigError(_with_flags(str(error)), _with_flags(hint)) from error

        kind = inspect.Parameter.KEYWORD_ONLY  # so that the order is free: what is shared comes first in the help
        parameters = [p.replace(kind=kind) for name, p in own.parameters.items() if name != "options"]
        with_options.__signature__ = own.replace(parameters=[_context, *shared, *parameters])  # type: ignore[attr-defined]
        return with_options

    return decorate


def flag_of(field_name: str) -> str:
    """Return the long flag of a config field."""
    flags = _OPTIONS[field_name].flags
    return flags[-1] if flags else "--" + field_name.replace("_", "-")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line says a parameter's value, rather than its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"  # by name: typer's click is another than the installed one


def _with_flags(message: str) -> str:
    """Say flags where the Python API says field names."""
    return _FIELD.sub(lambda field: flag_of(field[0]), message)


def _checked(config: type[LoadConfig | GenerationConfig | ChatConfig], given: dict[str, Any]) -> dict[str, Any]:
    values = {name: given[name] for name in _defaults(config) if name in given}
    config.from_options(**values)
    return values


def _defaults(config: type[LoadConfig | GenerationConfig | ChatConfig]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config)}


def _parameter(name: str) -> inspect.Parameter:
    option = _OPTIONS[name]
    default = {**_defaults(LoadConfig), **_defaults(GenerationConfig), **_defaults(ChatConfig)}[name]
    if default in ((), dataclasses.MISSING):
        default = None  # a repeatable option that was not given
    return _typer_parameter(name, option, default, option.flags or (flag_of(name),))


def _typer_parameter(name: str, option: _Option, default: Any, flags: tuple[str, ...]) -> inspect.Parameter:
    info = typer.Option(default, *flags, help=option.help, metavar=option.metavar, rich_help_panel=option.group)
    kind = option.kind | None if default is None else option.kind
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)


_context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
_model = _typer_parameter(
    "model",
    _Option(COMMON, str, "FOLDER", "Model folder; by default the embedded pair of model and draft."),
    None,
    ("-m", "--model"),
)
_draft = _typer_parameter(
    "draft",
    _Option(
        COMMON,
        str,
        "FOLDER|none",
        "Folder of a smaller model with the same vocabulary, which drafts; none disables it.",
    ),
    None,
    ("-d", "--draft"),
)
