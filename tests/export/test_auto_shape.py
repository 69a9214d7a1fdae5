"""The shape that fits a latency budget, from made-up times and from measured ones."""

from __future__ import annotations

import numpy as np
import pytest

from edge_export.fastdraft import auto_shape as module
from edge_export.fastdraft.auto_shape import auto_shape

FIXED = {"vocab_size": 384, "context_length": 512, "special_tokens": {"eos_token_id": 0}}


def choose(monkeypatch, tiny_ir, *, target_ms, costs, share=0.1, layers=None):
    monkeypatch.setattr(module, "token_ms", lambda folder: target_ms)
    monkeypatch.setattr(module, "_costs", lambda target, fixed: np.array(costs))
    monkeypatch.setattr(module, "MAX_SHARE", 1e9)
    return auto_shape(tiny_ir("llama"), share, layers, **FIXED)


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


@pytest.mark.slow
def test_measured_times_give_a_shape(tiny_ir):
    shape = auto_shape(tiny_ir("llama"), 10.0, None, **FIXED)
    assert shape.target_ms > 0
    assert shape.num_parameters > 0
