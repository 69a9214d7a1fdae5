"""What is written as JSON can be read by every reader, not only by Python's."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import strict_json

ROOT = Path(__file__).resolve().parents[2]
WRITERS = ("edge_runtime", "export", "benchmarks", "tools")
EXEMPT = {
    "edge_runtime/strict_json.py": "is what the others use",
}


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_are_not_finite_become_null(value):
    text = strict_json.dumps({"a": [1.5, (value, {"b": value})], "c": value})
    assert json.loads(text, parse_constant=refuse) == {"a": [1.5, [None, {"b": None}]], "c": None}


def test_everything_else_is_written_as_python_writes_it():
    value = {"a": [1, 2.5, None, True, "ü"], "b": {"c": ()}, 3: "x"}
    for options in ({}, {"indent": 2}, {"ensure_ascii": False}):
        assert strict_json.dumps(value, **options) == json.dumps(value, **options)
    assert strict_json.dumps([Path("a")], default=str) == '["a"]'


def test_all_json_is_written_strictly():
    """A NaN in one of some twenty writers made the whole file unreadable for others."""
    lax = []
    for path in (path for folder in WRITERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps"):
                lax.append(path.relative_to(ROOT).as_posix())
    assert set(lax) == set(EXEMPT)
