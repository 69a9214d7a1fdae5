"""The embedded pair: there, small, and able to do what the README's first line shows."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from edge_runtime import EdgeLLM
from edge_runtime.demo import demo_draft, demo_target
from edge_runtime.manifest import load_manifest

MOST_BYTES = 20e6
CODE, STORY = "def read_config(path):", "Once upon a time there was a little girl who"


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
def test_the_draft_is_worth_something(pair, prompt):
    """A draft that knows nothing has an acceptance of 0.01 here."""
    options = {"max_new_tokens": 60, "temperature": 0.6, "ignore_eos": True, "num_draft_tokens": 3}
    requests = [pair.generate(prompt, seed=seed, **options).metrics for seed in range(4)]
    accepted, proposed = (sum(getattr(m, f"{name}_tokens") for m in requests) for name in ("accepted", "proposed"))
    assert accepted / proposed > 0.25


@pytest.mark.parametrize("prompt", [CODE, STORY])
def test_speculative_answers_equal_plain_ones(pair, prompt):
    plain, drafted = (pair.generate(prompt, max_new_tokens=100, num_draft_tokens=k) for k in (0, 4))
    assert plain.token_ids == drafted.token_ids


@pytest.mark.parametrize("prompt", [CODE, STORY])
def test_seeded_answers_are_the_same_whatever_is_drafted(pair, prompt):
    """Pacing follows the clock, so drafting that consumed random numbers gave a seed several answers."""
    options = {"max_new_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    drafting = [{"num_draft_tokens": 1}, {"num_draft_tokens": 6}, {}, {"lookup": True}]
    for seed in range(2):
        plain = pair.generate(prompt, seed=seed, num_draft_tokens=0, **options)
        for asked in drafting:
            assert pair.generate(prompt, seed=seed, **asked, **options).token_ids == plain.token_ids


def test_code_goes_on_as_python_and_a_story_as_english(pair):
    def words(prompt):
        return Counter(re.findall(r"[a-z]+", pair.generate(prompt, max_new_tokens=100).text.lower()))

    code, story = words(CODE), words(STORY)
    python = {"self", "def", "return", "raise", "none", "path", "isinstance"}
    english = {"she", "he", "was", "the", "had", "her", "said"}
    assert sum(code[word] for word in python) >= 5 > sum(story[word] for word in python)
    assert sum(story[word] for word in english) >= 8


def test_a_draft_of_ones_own_goes_with_the_embedded_target():
    llm = EdgeLLM.load(draft=demo_target(), precision="f32")
    assert llm.generate(STORY, max_new_tokens=16, num_draft_tokens=3).metrics.acceptance_rate == 1
