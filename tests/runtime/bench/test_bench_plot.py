"""The figure is drawn whole or not at all, and what it needs is asked for before anything is measured."""

import importlib.util
import re
from typing import Any

import pytest

from edge_runtime.bench.plot import check_plot, save_plot
from edge_runtime.errors import ConfigError, MissingExtraError


def row(drafter: str, num_draft_tokens: int | str, **values: Any) -> dict[str, Any]:
    made = {"acceptance_rate": 0.5, "acceptance_rate_ci": [0.4, 0.6], "speedup": 1.5, "speedup_ci": [1.4, 1.6]}
    made |= {"category": "x", "drafter": drafter, "num_draft_tokens": num_draft_tokens, "predicted_speedup": 1.4}
    return made | values


ROWS = [
    row("plain", 0, acceptance_rate=None, acceptance_rate_ci=None),
    row("draft", 1),
    row("draft", 3, category="y"),
    row("draft", "auto"),
    row("lookup", 3, acceptance_rate=None, acceptance_rate_ci=None, speedup=None, speedup_ci=None),
    row("random", 3, predicted_speedup=None),
]


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("c.PDF", b"%PDF")])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["all", "nothing drafted"])
def test_file_is_a_figure_of_its_format(tmp_path, name, begins, rows):
    pytest.importorskip("matplotlib")
    check_plot(tmp_path / name)
    save_plot(rows, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.fixture
def has_matplotlib(monkeypatch):
    """Return a function that says whether it is installed."""
    return lambda is_installed: monkeypatch.setattr(importlib.util, "find_spec", lambda name: is_installed or None)


def test_without_matplotlib_the_extra_is_named(has_matplotlib, tmp_path):
    has_matplotlib(False)
    with pytest.raises(MissingExtraError) as caught:
        check_plot(tmp_path / "a.png")
    assert re.search(r"pip install .*\[bench\]", caught.value.hint)


@pytest.mark.parametrize(("name", "said"), [("a.jpeg", "ends in"), ("a", "ends in"), ("no/a.png", "does not exist")])
def test_name_that_cannot_be_written_is_refused(has_matplotlib, tmp_path, name, said):
    has_matplotlib(True)
    with pytest.raises(ConfigError, match=said):
        check_plot(tmp_path / name)
