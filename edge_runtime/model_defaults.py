"""The sampling that a model's makers recommend, from generation_config.json, as options of ours.

`edge-run chat` follows it; `generate` and the API stay greedy unless told otherwise, and a caller may pass it on:
`llm.chat(messages, **llm.recommended_options)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.manifest import read_json

NAME = "generation_config.json"
SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}
"""What sampling takes, and what transformers takes where it is not given."""


class Recommended(NamedTuple):
    """What generation_config.json asks for.

    Attributes:
        options: Fields of `config.GenerationConfig` that differ from its defaults.
        ignored: One sentence for each entry that cannot be used.
    """

    options: dict[str, Any]
    ignored: list[str]


def read_recommended(folder: Path, vocab_size: int) -> Recommended:
    """Read the recommended options of a model folder.

    As in transformers, temperature and its like count only where `do_sample` is true; penalties and suppressed tokens
    always do. Its length limits are not taken: an answer ends where the context or the caller ends it.

    Args:
        folder: Holds generation_config.json, or not.
        vocab_size: Bounds the ids of suppressed tokens.
    """
    try:
        content = read_json(folder / NAME)
    except ModelFormatError as error:
        return Recommended({}, [str(error)])
    options: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in _wanted(content).items():
        try:
            if name == "suppress_tokens":
                options["logit_bias"] = _forbidding(value, vocab_size)
            elif name == "do_sample":
                raise ConfigError(f"do_sample is {value!r:.60}, expected true or false")
            else:
                options[name] = getattr(GenerationConfig.from_options(**{name: value}), name)
        except ConfigError as error:
            ignored.append(f"{NAME} is not followed where {error}")
    if not options.get("temperature"):  # greedy, so what else is said about sampling means nothing
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    defaults = GenerationConfig()
    return Recommended({n: value for n, value in options.items() if value != getattr(defaults, n)}, ignored)


def _wanted(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that count."""
    wanted: dict[str, Any] = {}
    if content.get("do_sample") is True:
        wanted = {n: default if content.get(n) is None else content[n] for n, default in SAMPLING.items()}
    elif content.get("do_sample") is not False:
        wanted["do_sample"] = content.get("do_sample")
    wanted |= {name: content.get(name) for name in ("repetition_penalty", "suppress_tokens")}
    return {name: value for name, value in wanted.items() if value is not None}


def _forbidding(token_ids: Any, vocab_size: int) -> dict[int, float]:
    """Return the logit bias that forbids tokens."""
    is_list = isinstance(token_ids, list) and all(type(token_id) is int for token_id in token_ids)
    if not is_list or not all(0 <= token_id < vocab_size for token_id in token_ids):
        raise ConfigError(f"suppress_tokens is {token_ids!r:.60}, expected a list of token ids below {vocab_size}")
    return dict.fromkeys(token_ids, float("-inf"))
