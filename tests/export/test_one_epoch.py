"""The size/iteration rule and the ledger of seen windows."""

from __future__ import annotations

import numpy as np
import pytest

from edge_export.one_epoch import Budget, Ledger, adjust, complete, predicted_speedup
from edge_runtime.errors import ConfigError, ModelFormatError


def test_adjusting_keeps_the_cost_and_meets_the_ratio():
    """10M parameters on 500M tokens are worked out in the derivation: 31.6M on 158M."""
    adjusted = adjust(Budget(parameters=10e6, tokens=500e6))
    assert adjusted.flops == pytest.approx(Budget(parameters=10e6, tokens=500e6).flops)
    assert adjusted.ratio == pytest.approx(5)
    assert adjusted.parameters == pytest.approx(31.6e6, rel=1e-2)
    assert adjusted.tokens == pytest.approx(158e6, rel=1e-2)


@pytest.mark.parametrize(("start", "grows"), [(80.0, True), (0.5, False)])
def test_a_long_trained_model_grows_and_a_short_trained_one_shrinks(start, grows):
    budget = Budget(parameters=1e6, tokens=start * 1e6)
    assert (adjust(budget).parameters > budget.parameters) is grows


def test_a_budget_at_the_ratio_stays():
    budget = Budget(parameters=2e6, tokens=1e7)
    assert adjust(budget) == budget
    assert predicted_speedup(budget) == pytest.approx(1)


def test_one_quantity_is_completed_by_the_ratio_and_two_fix_the_third():
    assert complete(parameters=1e6, ratio=20) == Budget(parameters=1e6, tokens=2e7)
    assert complete(tokens=1e7) == Budget(parameters=2e6, tokens=1e7)
    assert complete(flops=6e13, ratio=10).ratio == pytest.approx(10)
    assert complete(flops=6e13, parameters=1e6).tokens == pytest.approx(1e7)
    assert complete(flops=6e13, tokens=1e7).parameters == pytest.approx(1e6)


@pytest.mark.parametrize(
    "given", [{}, {"parameters": -1.0}, {"flops": float("nan")}, {"parameters": 1.0, "tokens": 1.0, "flops": 6.0}]
)
def test_a_plan_from_nonsense_is_refused(given):
    with pytest.raises(ConfigError):
        complete(**given)


def windows(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 1000, (count, 16)))


def test_a_killed_run_continues_where_its_ledger_ends(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.record(windows(5))
    ledger.save()
    ledger.record(windows(5, seed=1))  # lost with the process
    again = Ledger(tmp_path / "ledger")
    assert len(again) == 5
    assert all(window in again for window in windows(5))
    again.record(windows(5, seed=1))
    assert len(again) == 10


def test_no_window_twice(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.record(windows(5))
    with pytest.raises(ConfigError, match="second time"):
        ledger.record([*windows(2, seed=1), windows(5)[3]])
    assert len(ledger) == 5
    with pytest.raises(ConfigError, match="second time"):
        ledger.record([windows(1, seed=2)[0]] * 2)


def test_several_passes_where_they_are_studied(tmp_path):
    ledger = Ledger(tmp_path / "ledger", passes=2)
    ledger.record(windows(3))
    ledger.record(windows(3))
    ledger.save()
    with pytest.raises(ConfigError, match="more than 2 times"):
        Ledger(tmp_path / "ledger", passes=2).record(windows(1))


def test_a_damaged_ledger_is_refused(tmp_path):
    (tmp_path / "ledger").write_bytes(b"1234567")
    with pytest.raises(ModelFormatError, match="middle of a hash"):
        Ledger(tmp_path / "ledger")
    (tmp_path / "ledger").write_bytes(b"12345678" * 2)
    with pytest.raises(ModelFormatError, match="twice"):
        Ledger(tmp_path / "ledger")
