"""The shape that fits a latency budget, from made-up times and from measured ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_export.fastdraft import auto_shape as module
from edge_export.fastdraft.auto_shape import auto_shape
from edge_export.fastdraft.target import open_target

FIXED = {"vocab_size": 384, "context_length": 512, "special_tokens": {"eos_token_id": 0}}


def choose(monkeypatch, tiny_ir, *, target_ms, costs, share=0.1, layers=None):
    monkeypatch.setattr(module, "token_ms", lambda folder: target_ms)
    monkeypatch.setattr(module, "_costs", lambda target, fixed: np.array(costs))
    monkeypatch.setattr(module, "MAX_SHARE", 1e9)
    return auto_shape(open_target(str(tiny_ir("llama")), None), share, layers, **FIXED)


def test_the_budget_is_used_and_kept(monkeypatch, tiny_ir):
    shape = choose(monkeypatch, tiny_ir, target_ms=30, costs=[0.2, 0.1, 0.05])
    assert 2.0 < shape.draft_ms <= 3.0
    assert shape.num_layers == 6


def test_layers_that_cost_much_make_it_shallow(monkeypatch, tiny_ir):
    assert choose(monkeypatch, tiny_ir, target_ms=30, costs=[0.2, 1.5, 0.05]).num_layers == 1


def test_a_budget_for_nothing_gives_the_smallest(monkeypatch, tiny_ir):
    shape = choose(monkeypatch, tiny_ir, target_ms=1, costs=[0.2, 0.1, 0.05])
    assert shape.num_layers == 1
    assert shape.num_parameters < 60e3


def test_costs_that_noise_made_zero_and_a_target_of_unknown_size_still_end(monkeypatch, tiny_ir):
    """Wider cost nothing then, and was tried for ever."""
    target = open_target(str(tiny_ir("llama")), None)
    target = dataclasses.replace(target, manifest=dataclasses.replace(target.manifest, num_parameters=None))
    monkeypatch.setattr(module, "token_ms", lambda folder: 1.0)
    monkeypatch.setattr(module, "_costs", lambda target, fixed: np.zeros(3))
    assert auto_shape(target, 0.1, None, **FIXED).num_parameters > 0


@pytest.mark.slow
def test_measured_times_give_a_shape(tiny_ir):
    shape = auto_shape(open_target(str(tiny_ir("llama")), None), 10.0, None, **FIXED)
    assert shape.target_ms > 0
    assert shape.num_parameters > 0
