"""`edge-run plan`."""

import inspect

import pytest

from edge_export.one_epoch import PAPER_RATIO
from edge_runtime.cli.plan import plan


def test_one_quantity_is_completed_by_the_papers_ratio(edge_run):
    done = edge_run("plan", "--params", "50M", "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert (report["ratio"], report["start"], report["width_factor"], report["predicted_speedup"]) == (5, *[None] * 3)
    assert report["plan"]["parameters"] == 50e6
    assert report["plan"]["tokens"] == 250e6
    assert report["plan"]["flops"] == pytest.approx(6 * 50e6 * 250e6)


@pytest.mark.parametrize(("word", "value"), [("2e9", 2e9), ("1.5B", 1.5e9), ("300k", 3e5), ("2t", 2e12), ("7", 7.0)])
def test_numbers_may_have_a_unit(edge_run, word, value):
    assert edge_run("plan", "--tokens", word, "--json").json["plan"]["tokens"] == pytest.approx(value)


def test_two_quantities_are_a_start_that_is_moved_at_equal_cost(edge_run):
    """The example that the rule was derived with: 10M on 500M tokens becomes 31.6M on 158M, 1.78 times as wide."""
    report = edge_run("plan", "--params", "10M", "--tokens", "500M", "--json").json
    assert report["start"]["tokens_per_parameter"] == pytest.approx(50)
    assert report["plan"]["tokens_per_parameter"] == pytest.approx(5)
    assert report["plan"]["flops"] == pytest.approx(report["start"]["flops"])
    assert report["plan"]["parameters"] == pytest.approx(31.6e6, rel=1e-2)
    assert report["width_factor"] == pytest.approx(1.78, abs=0.01)


def test_prediction_may_speak_against_the_rule(edge_run):
    """By later fits, 5 tokens for each parameter are too few: the report must not hide that."""
    done = edge_run("plan", "--params", "10M", "--tokens", "500M")
    assert "keep the start" in done.out
    report = edge_run("plan", "--params", "10M", "--tokens", "500M", "--json").json
    assert report["predicted_speedup"] < 1
    assert report["plan"]["predicted_loss"] > report["start"]["predicted_loss"]


def test_text_is_a_short_table(edge_run):
    done = edge_run("plan", "--flops", "1e15", "--params", "50M", "--ratio", "20")
    assert (done.code, done.err) == (0, "")
    assert "1.00e+15    1.00e+15" in done.out
    assert "times as wide" in done.out
    assert "the paper measured 1 to 2.7" in done.out
    assert "Chinchilla" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_default_ratio_is_the_papers():
    assert inspect.signature(plan).parameters["ratio"].default == PAPER_RATIO


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "none of parameters, tokens and flops is given"),
        (("--params", "many"), "--params is 'many'"),
        (("--tokens", "-5M"), "--tokens is '-5M'"),
        (("--flops", "1e40"), "--flops is '1e40'"),
        (("--params", "nan"), "--params is 'nan'"),
        (("--params", ""), "--params is ''"),
        (("--params", "M"), "--params is 'M'"),
        (("--params", "1", "--tokens", "1", "--flops", "6"), "all given"),
        (("--params", "1M", "--ratio", "0"), "'--ratio'"),
    ],
)
def test_nonsense_is_refused_in_one_line_with_a_hint(edge_run, args, said):
    done = edge_run("plan", *args)
    assert (done.code, done.out) == (2, "")
    error, hint = done.err.splitlines()
    assert said in error
    assert hint.startswith("hint: ")
