"""generation_config.json is followed where transformers would follow it, and never silently where it cannot be."""

from __future__ import annotations

import json
import math

import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.model_defaults import read_recommended

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}


def read(folder, content):
    (folder / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return read_recommended(folder, 100)


def test_sampling_is_taken_where_the_model_samples(tmp_path):
    made = read(tmp_path, {**SAMPLED, "repetition_penalty": 1.1, "max_new_tokens": 5, "eos_token_id": [1, 2]})
    assert made.options == {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    assert made.ignored == []
    GenerationConfig.from_options(**made.options)


@pytest.mark.parametrize("do_sample", [False, None, "absent"])
def test_without_do_sample_the_model_is_greedy_whatever_the_temperature(tmp_path, do_sample):
    """transformers' meaning; a penalty counts all the same."""
    content = {**SAMPLED, "do_sample": do_sample, "repetition_penalty": 1.05}
    if do_sample == "absent":
        del content["do_sample"]
    assert read(tmp_path, content) == ({"repetition_penalty": 1.05}, [])


def test_sampling_without_numbers_takes_those_of_transformers(tmp_path):
    assert read(tmp_path, {"do_sample": True}).options == {"temperature": 1.0, "top_k": 50}
    assert read(tmp_path, {"do_sample": True, "top_k": 0, "temperature": None}).options == {"temperature": 1.0}


def test_suppressed_tokens_are_forbidden(tmp_path):
    assert read(tmp_path, {"suppress_tokens": [3, 7]}).options == {"logit_bias": {3: -math.inf, 7: -math.inf}}
    assert read(tmp_path, {"suppress_tokens": []}) == ({}, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", [0.5]),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_k", 2.5),
        ("min_p", True),
        ("repetition_penalty", 0),
        ("suppress_tokens", [3, 100]),
        ("suppress_tokens", [-1]),
        ("suppress_tokens", [True]),
        ("suppress_tokens", "3"),
        ("suppress_tokens", [[3]]),
        ("do_sample", "yes"),
        ("do_sample", 1),
    ],
)
def test_entry_that_cannot_be_used_is_one_note_and_the_rest_is_taken(tmp_path, name, value):
    made = read(tmp_path, {**SAMPLED, name: value})
    assert len(made.ignored) == 1
    assert name in made.ignored[0]
    assert "\n" not in made.ignored[0]
    is_greedy = name in ("temperature", "do_sample")
    taken = {} if is_greedy else {n: SAMPLED[n] for n in ("temperature", "top_p", "top_k") if n != name}
    assert made.options == taken


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\x00"])
def test_damaged_file_is_one_note(tmp_path, content):
    made = read(tmp_path, content)
    assert made.options == {}
    assert len(made.ignored) == 1
    assert "\n" not in made.ignored[0]


def test_no_file_recommends_nothing(tmp_path):
    assert read_recommended(tmp_path, 100) == ({}, [])
