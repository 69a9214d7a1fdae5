"""What the draft benchmark makes of its figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture(scope="module")
def speedup(script: Callable[[str], ModuleType]) -> Any:
    return script("draft_speedup")


def answers(speedup: Any, speeds: dict[str, list[float]], temperature: float = 0.0) -> list[Any]:
    """One answer of each variant to each of three prompts, in the order of a round."""
    return [
        speedup.Answer(temperature, "code", prompt, variant, speeds[variant][prompt], 2.0, (1, 2))
        for prompt in range(3)
        for variant in speeds
    ]


def test_ratios_pair_answers_to_the_same_prompt(speedup: Any) -> None:
    speeds = {"edge_plain": [10, 20, 30], "edge_auto": [30, 40, 45], "peer_plain": [9, 9, 9], "peer_draft_3": [15] * 3}
    row = speedup.summary(answers(speedup, speeds))
    assert row["speedup"].median == 2
    assert row["worst prompt"] == 1.5
    assert row["peer's best"] == "peer_draft_3"
    assert row["over peer's best"].median == pytest.approx(40 / 15)
    assert row["equal to plain"] == 1


def test_worst_prompt_is_a_median_over_rounds(speedup: Any) -> None:
    """One disturbed answer is not a prompt on which drafting loses."""
    rounds = []
    for auto in (20, 4, 20):
        rounds += answers(speedup, {"edge_plain": [10] * 3, "edge_auto": [auto, 20, 20], "peer_plain": [9] * 3})
    assert speedup.summary(rounds)["worst prompt"] == 2


def test_predictions_are_compared_over_rounds(speedup: Any) -> None:
    """The formula itself: tests/runtime/test_bench_steps.py."""
    rounds = [{"predicted_speedup": 2.2, "speedup": 2.0}, {"predicted_speedup": 1.8, "speedup": 2.0}]
    row = speedup.prediction_summary([*rounds, {"predicted_speedup": 2.1, "speedup": 2.0}])
    assert row["predicted / measured"] == pytest.approx(1.05)
    checks = speedup.checks_of({}, {"code 0 K=3": row, "text 0 K=3": {**row, "predicted / measured": 0.89}})
    assert list(checks.values()) == [True, False]


def test_checks_name_category_temperature_and_bound(speedup: Any) -> None:
    speeds = {"edge_plain": [10] * 3, "edge_auto": [19] * 3, "peer_plain": [9] * 3, "peer_draft_3": [16] * 3}
    checks = speedup.checks_of({"code 0": speedup.summary(answers(speedup, speeds))}, {})
    assert checks == {
        "code 0: 2.0 times plain": False,
        "code 0: 1.15 times the peer's best": True,
        "code 0: 0.97 times plain on the worst prompt": True,
    }


def test_chart_is_a_picture_with_a_bar_for_each_name(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    measure = script("measure")
    bars = {"x": measure.Spread(2, 1, 3), "<y>": measure.Spread(1, 1, 1)}

    def patches(some: dict[str, Any]) -> int:
        measure.bar_chart(tmp_path / "a.svg", "a & b", some)
        groups = ElementTree.parse(tmp_path / "a.svg").getroot().findall(".//{*}g")
        return sum(group.get("id", "").startswith("patch_") for group in groups)

    assert patches(bars) == patches({"x": bars["x"]}) + 1
