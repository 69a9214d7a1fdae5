"""The embedded pair: there, small, and able to do what the README's first line shows."""

from __future__ import annotations

import ast

import pytest

from edge_runtime import EdgeLLM
from edge_runtime.demo import demo_draft, demo_target
from edge_runtime.manifest import load_manifest

MOST_BYTES = 20e6
CODE, STORY = "def read_config(path):\n", "Once upon a time there was a little girl who"


@pytest.fixture(scope="module")
def pair():
    return EdgeLLM.load(precision="f32")


def test_it_is_small():
    files = [path for folder in (demo_target(), demo_draft()) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES
    target, draft = load_manifest(demo_target()), load_manifest(demo_draft())
    assert 5e6 <= target.num_parameters <= 12e6
    assert draft.num_parameters <= target.num_parameters / 10
    assert target.context_length >= 1024
    assert 8192 <= target.vocab_size <= 16384


@pytest.mark.parametrize("prompt", [CODE, STORY])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_the_draft_is_worth_something(pair, prompt, temperature):
    """A random draft of this vocabulary has an acceptance of about 0."""
    options = {"max_new_tokens": 80, "temperature": temperature, "seed": 0, "ignore_eos": True}
    metrics = pair.generate(prompt, num_draft_tokens=3, **options).metrics
    assert metrics.acceptance_rate > 0.2


@pytest.mark.parametrize("prompt", [CODE, STORY])
def test_speculative_answers_equal_plain_ones(pair, prompt):
    plain, drafted = (pair.generate(prompt, max_new_tokens=100, num_draft_tokens=k) for k in (0, 4))
    assert plain.token_ids == drafted.token_ids


def test_code_is_python(pair):
    """Not every continuation ends where a statement does: the longest part that parses must be most of it."""
    text = CODE + pair.generate(CODE, max_new_tokens=100).text
    lines = text.splitlines()
    parsed = next(count for count in range(len(lines), 0, -1) if parses("\n".join(lines[:count])))
    assert parsed >= 3


def parses(source):
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def test_a_draft_of_ones_own_goes_with_the_embedded_target():
    llm = EdgeLLM.load(draft=demo_target(), precision="f32")
    assert llm.generate(STORY, max_new_tokens=16, num_draft_tokens=3).metrics.acceptance_rate == 1
