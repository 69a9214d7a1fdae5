"""Prompts for a measurement: JSON lines with `prompt` and, if there are several kinds, `category`.

MT-bench and Spec-Bench have `turns`, a list, in place of `prompt`: the first is taken.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ConfigError

ONE_CATEGORY = "all"
"""Category of a prompt that names none."""
HINT = 'each line must be an object such as {"prompt": "Once upon a time", "category": "stories"}'


class Prompt(NamedTuple):
    """One prompt of a file.

    Attributes:
        text: What is to be continued.
        category: Prompts of a category are reported together.
        line: Where it stands, from 1: errors name it, and it seeds the sampling.
    """

    text: str
    category: str
    line: int


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Return the prompts of a file in their order; empty lines are skipped.

    Args:
        path: JSON lines, UTF-8.
        limit: Most prompts of each category, the first ones; None for all.

    Raises:
        ConfigError: A line is not a prompt, or there is none at all.
        OSError: The file cannot be read.
    """
    lines = enumerate(path.read_bytes().splitlines(), 1)
    taken: Counter[str] = Counter()
    prompts = []
    for prompt in (_read_prompt(path, number, line) for number, line in lines if line.strip()):
        taken[prompt.category] += 1
        if limit is None or taken[prompt.category] <= limit:
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"`{path}` holds no prompt", HINT)
    return prompts


def _read_prompt(path: Path, number: int, line: bytes) -> Prompt:
    try:
        content = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"line {number} of `{path}` is not JSON: {error}", HINT) from error
    fields = content if isinstance(content, dict) else {}
    turns = fields.get("turns")
    text = fields.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
    category = fields.get("category", ONE_CATEGORY)
    if not (isinstance(text, str) and text and isinstance(category, str) and category):
        raise ConfigError(f"line {number} of `{path}` is not a prompt: {line.decode():.60}", HINT)
    return Prompt(text, category, number)
