"""What a caller may give `EdgeLLM`, brought into one form, or refused in one line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.text.chat_template import Message

Prompt = str | Sequence[int]


def with_configs(
    prompts: Iterable[Prompt], config: GenerationConfig | Sequence[GenerationConfig] | None
) -> list[tuple[Prompt, GenerationConfig | None]]:
    """Return each prompt with its options."""
    if isinstance(prompts, (str, bytes, bytearray, Mapping)) or not isinstance(prompts, Iterable):
        raise ConfigError(f"prompts is {prompts!r:.60}, expected a list of prompts", "use `generate` for one")
    prompts = list(prompts)
    configs: list[GenerationConfig | None] = list(config) if isinstance(config, Sequence) else [config] * len(prompts)
    if len(configs) != len(prompts):
        raise ConfigError(f"config holds the options of {len(configs)} prompts, expected {len(prompts)}")
    return list(zip(prompts, configs, strict=True))


def nth_config(config: GenerationConfig, number: int) -> GenerationConfig:
    """Return the options of one of several answers to the same prompt."""
    return config if config.seed is None else dataclasses.replace(config, seed=config.seed + number)


def check_count(name: str, value: Any) -> int:
    """Return how many are wanted, which is one or more."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} is {value!r:.60}, expected a whole number of at least 1")
    return int(value)


def check_path(name: str, value: Any) -> None:
    """Refuse what is no path, or one that cannot be looked at; it need not exist."""
    if value is None:
        return
    if not isinstance(value, (str, PathLike)):
        raise ConfigError(f"{name} is {value!r:.60}, expected a model folder")
    try:
        os.stat(value)
    except (FileNotFoundError, NotADirectoryError):
        return  # `load_manifest` says how to make one
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{name} is {str(value)!r:.60}, which cannot be read: {reason}") from error


def as_file(value: Any) -> Path:
    """Return the path of a file, which need not exist."""
    if not isinstance(value, (str, PathLike)):
        raise ConfigError(f"path is {value!r:.60}, expected the path of a file")
    path = Path(os.fsdecode(value))
    if not path.name or path.is_dir():
        raise ConfigError(f"path is `{path}`, expected a file, not a folder")
    return path


def as_messages(messages: Any) -> list[Message]:
    """Return a chat as a list; text is one message of the user."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if isinstance(messages, (bytes, bytearray, Mapping)) or not isinstance(messages, Iterable):
        raise ConfigError(f"the chat is {messages!r:.60}, expected text or a list of messages")
    turns = list(messages)
    if not turns:
        raise ConfigError("the chat holds no message", 'give at least one: {"role": "user", "content": "…"}')
    return turns


def as_ids(prompt: Any) -> list[int]:
    """Return a prompt that is not text as token ids."""
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Iterable):
        raise ConfigError(f"the prompt is {prompt!r:.60}, expected text or token ids")
    ids = list(prompt)
    for token_id in ids:
        if not isinstance(token_id, Integral):
            raise ConfigError(f"the prompt holds {token_id!r:.60}, expected text or token ids")
    return [int(token_id) for token_id in ids]
