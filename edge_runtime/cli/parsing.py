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
    for token_id, bias in _pairs("--logit-bias", words, "ID=BIAS", "42=-5, or 42=-inf"):
        try:
            made[int(token_id)] = float(bias)
        except ValueError:
            told = f"--logit-bias is '{token_id}={bias}', expected ID=BIAS"
            raise ConfigError(told, "for example 42=-5, or 42=-inf") from None
    return made


def template_options(words: list[str]) -> dict[str, Any]:
    """Return the options of words such as `enable_thinking=false`: JSON where a value is that, else text.

    Raises:
        ConfigError: A word is something else.
    """
    options: dict[str, Any] = {}
    for name, value in _pairs("--template-option", words, "NAME=VALUE", "enable_thinking=false"):
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def properties(words: list[str]) -> dict[str, str]:
    """Return the OpenVINO properties of words such as `PERFORMANCE_HINT=LATENCY`.

    Raises:
        ConfigError: A word is something else.
    """
    return dict(_pairs("property", words, "NAME=VALUE", "PERFORMANCE_HINT=LATENCY"))


def _pairs(flag: str, words: list[str], form: str, example: str) -> list[tuple[str, str]]:
    """Return both sides of words such as `name=value`."""
    for word in words:
        if not re.match(r"\w+=", word):
            raise ConfigError(f"{flag} is {word!r}, expected {form}", f"for example {example}")
    return [(name, value) for name, _, value in (word.partition("=") for word in words)]


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
