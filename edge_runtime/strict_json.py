"""JSON that every reader takes: Python writes NaN and Infinity as words that JSON does not have."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def dumps(
    value: Any,
    *,
    indent: int | None = None,
    ensure_ascii: bool = True,
    default: Callable[[Any], Any] | None = None,
) -> str:
    """Return a value as JSON, with null for each number that is not finite.

    Args:
        value: Dictionaries, lists, texts, numbers, None.
        indent: Spaces for each level; None for one line.
        ensure_ascii: Whether to write letters beyond ASCII as escapes.
        default: Called with what JSON cannot hold; returns what to write in its place.
    """
    return json.dumps(_finite(value), indent=indent, ensure_ascii=ensure_ascii, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
