"""What a training was asked for, kept beside it, so that only the same training goes on in its folder."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from edge_runtime import strict_json
from edge_runtime.errors import ModelFormatError


def plain(value: Any) -> dict[str, Any]:
    """Return a dataclass as JSON has it: paths as text, tuples as lists."""
    made: dict[str, Any] = json.loads(strict_json.dumps(dataclasses.asdict(value), default=str))
    return made


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name("new-" + path.name)
    temporary.write_text(strict_json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_same(told: dict[str, Any], path: Path, hint: str) -> None:
    """Keep the options that decide what is learned; refuse to go on with a training that began with others.

    Args:
        told: These options.
        path: Where they are kept.
        hint: What to do about it.

    Raises:
        ModelFormatError: The folder's training began with others.
    """
    if not path.is_file():
        write_json(path, told)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in told.items():
        if before.get(name) != value:
            raise ModelFormatError(
                f"`{path.parent}` holds a training whose {name} was {before.get(name)}, not {value}", hint
            )
