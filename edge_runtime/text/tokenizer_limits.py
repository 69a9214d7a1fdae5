"""Bounds for what a tokenizer may do: its file came with a downloaded model and holds rules that run in native code.

Regular expressions can take exponential time, and replacements can multiply a text. Rules that multiply are refused
when the tokenizer is read; where an expression might be slow, encoding runs in a thread that is waited for no longer
than any honest tokenizer needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from edge_runtime.background import Background
from edge_runtime.errors import ConfigError, ModelFormatError

T = TypeVar("T")

LARGEST_FILE_BYTES = 1 << 28
"""Several times the largest vocabulary there is."""
LONGEST_TEXT = 1 << 26
"""Characters of a text that is encoded at once: more tokens than any context holds."""
LARGEST_GROWTH = 64
"""Times that rules may lengthen a text."""
LIMIT_S = 10.0
CHARACTERS_PER_S = 20_000
"""A slow tokenizer on a slow machine."""

_MOST_REPETITIONS = 3
"""In a row: each one more may multiply the time by the length of the text."""


def check_file(path: Path) -> None:
    """Refuse a tokenizer.json that is too large to be one."""
    if path.stat().st_size > LARGEST_FILE_BYTES:
        raise ModelFormatError(
            f"`{path}` has {path.stat().st_size >> 20} MiB, expected at most {LARGEST_FILE_BYTES >> 20}",
            "copy it from the original model",
        )


def check_text(text: Any) -> None:
    """Refuse a text that is too long to encode."""
    if isinstance(text, str) and len(text) > LONGEST_TEXT:
        raise ConfigError(f"the text has {len(text)} characters, expected at most {LONGEST_TEXT}", "shorten it")


def check_growth(tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Refuse rules that could make a text many times as long."""
    for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
        growth = 1.0
        for rule in _rules(part):
            growth *= _growth(rule)
        if growth > LARGEST_GROWTH:
            raise ModelFormatError(
                f"`{path}` has rules that make a text up to {growth:.0f} times as long, expected at most "
                f"{LARGEST_GROWTH} times",
                "copy it from the original model",
            )


def may_be_slow(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a regular expression could take more than proportional time."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer)
    patterns = [rule["pattern"].get("Regex") for part in parts for rule in _rules(part) if "pattern" in rule]
    return any(pattern is not None and _may_backtrack(pattern) for pattern in patterns)


def within_limit(work: Callable[[], T], num_characters: int) -> T:
    """Do work in a second thread, and wait for it no longer than encoding so many characters may take.

    Raises:
        ConfigError: It takes longer. The thread is left behind.
    """
    limit_s = LIMIT_S + num_characters / CHARACTERS_PER_S
    background = Background(work)
    if not background.is_done(limit_s):
        raise ConfigError(
            f"the model's tokenizer takes more than {limit_s:.0f} s for a text of {num_characters} characters",
            "use the tokenizer.json of the original model",
        )
    return background.result()


def _rules(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the rules of a normalizer, pre-tokenizer or decoder, those in sequences one by one."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        rule = waiting.pop()
        inner = [rules for name in ("normalizers", "pretokenizers", "decoders") for rules in rule.get(name, ())]
        waiting += inner
        if not inner:
            yield rule


def _growth(rule: dict[str, Any]) -> float:
    if rule.get("type") == "Prepend":
        return 1 + len(rule["prepend"]) / 8  # once for each stretch between special tokens
    if rule.get("type") != "Replace":
        return 1
    return max(1, len(rule["content"]) / max(1, len(rule["pattern"].get("String", "x"))))


def _may_backtrack(pattern: str) -> bool:
    """Whether a pattern repeats what repeats, refers back to what it found, or chains many repetitions."""
    plain = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "x", pattern)  # classes and escapes are single characters
    groups, closed = [0], 0  # repetitions in each open group, and in the one that has just been closed
    for token in re.findall(r"\{\d*,\d*\}|.", plain, re.DOTALL):
        is_repetition = token in "*+" or (token.startswith("{") and len(token) > 1)
        if is_repetition and closed:
            return True
        groups[-1] += is_repetition
        closed = 0
        if token == "(":
            groups.append(0)
        elif token == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] += closed
    longest = max(len(re.findall(r"[*+]|\{\d*,\d*\}", branch)) for branch in plain.split("|"))
    return longest > _MOST_REPETITIONS or bool(re.search(r"\\[1-9kg]", pattern))
