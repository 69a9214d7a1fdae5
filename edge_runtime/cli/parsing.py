"""Words of a command line as values."""

from __future__ import annotations

import json
import re
from typing import Any

from edge_runtime.errors import ConfigError

LARGEST_NUMBER = 1e30
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def auto_or_number(word: str) -> int | str:
    """Return a number as a number, and any other word, such as `auto`, as it is."""
    return int(word) if re.fullmatch(r"[+-]?\d{1,18}", word) else word  # int refuses thousands of digits


def unescaped(words: list[str]) -> tuple[str, ...]:
    """Return texts in which line breaks, tabs and backslashes may be written as a backslash and a letter."""
    return tuple(re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], word) for word in words)


def biases(words: list[str]) -> dict[int, float]:
    """Return the logit biases of words such as `42=-5`.

    Raises:
        ConfigError: A word is something else.
    """
    made: dict[int, float] = {}
    for word in words:
        token_id, _, bias = word.partition("=")
        try:
            made[int(token_id)] = float(bias)
        except ValueError:
            raise ConfigError(f"--logit-bias is {word!r}, expected ID=BIAS", "for example 42=-5, or 42=-inf") from None
    return made


def template_options(words: list[str]) -> dict[str, Any]:
    """Return the options of words such as `enable_thinking=false`: JSON where a value is that, else text.

    Raises:
        ConfigError: A word is something else.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, is_given, value = word.partition("=")
        if not name or not is_given:
            raise ConfigError(
                f"--template-option is {word!r}, expected NAME=VALUE", "for example enable_thinking=false"
            )
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def parse_number(flag: str, word: str) -> float:
    """Return a number that may end in k, M, B or T, such as the size of a model or of a text.

    Raises:
        ConfigError: It is none, or beyond all use.
    """
    unit = _UNITS.get(word[-1:].lower())
    try:
        number = float(word[:-1]) * unit if unit else float(word)
    except ValueError:
        number = 0.0
    if not 0 < number <= LARGEST_NUMBER:
        raise ConfigError(f"{flag} is {word!r}, expected a number above 0", "for example 50M, 1.5B or 2e9")
    return number
