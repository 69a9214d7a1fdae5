"""What is reported of a draft, over fake models whose acceptance is known."""

import itertools

import pytest

from edge_runtime.bench.draft import DraftBench
from edge_runtime.bench.prompts import Prompt
from edge_runtime.bench.settings import DraftSettings
from edge_runtime.errors import ConfigError, ContextOverflowError
from edge_runtime.metrics import mbsu
from tests.runtime.fakes import make_engine, make_llm, random_table

TARGET, OTHER = random_table(24, 1), random_table(24, 2)
LENGTHS = (1, 3, 5)
WHOLE_BLOCKS = 1 + 24
"""New tokens: the prompt's, then whole blocks of 2, 4 and 6 tokens."""
PROMPTS = [Prompt("abcab", "x", 1), Prompt("abcdabcd", "x", 2), Prompt("hello", "y", 3)]
SETTINGS = DraftSettings(num_draft_tokens=LENGTHS, max_new_tokens=WHOLE_BLOCKS)


@pytest.fixture
def measured(tmp_path):
    """Return a function from a draft's table and settings to the bench after its run."""

    def measure(draft, settings=SETTINGS, relative_size=0.1, prompts=PROMPTS):
        bench = DraftBench(make_llm(tmp_path, make_engine(TARGET, draft)), prompts, settings, relative_size)
        for _ in bench.run():
            pass
        return bench

    return measure


def row_of(bench, drafter, length, category="x"):
    (row,) = [
        row
        for row in bench.rows()
        if (row["drafter"], row["num_draft_tokens"], row["category"]) == (drafter, length, category)
    ]
    return row


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draft_that_is_the_target_is_always_accepted(measured, temperature):
    settings = DraftSettings(num_draft_tokens=LENGTHS, max_new_tokens=WHOLE_BLOCKS, temperature=temperature)
    bench = measured(TARGET, settings)
    for length, category in itertools.product(LENGTHS, "xy"):
        row = row_of(bench, "draft", length, category)
        assert row["acceptance_rate"] == 1
        assert row["acceptance_rate_ci"] == [1, 1]
        assert row["acceptance_by_position"] == [1] * length
        assert row["block_efficiency"] == length + 1
        assert row["mbsu"] == pytest.approx(mbsu(length + 1, length, 0.1), abs=1e-4)


def test_random_draft_is_hardly_ever_accepted(measured):
    bench = measured(TARGET)
    for length in LENGTHS:
        row = row_of(bench, "random", length)
        assert row["acceptance_rate"] < 0.2
        assert row["block_efficiency"] < 1.3
        assert row["mbsu"] == row["block_efficiency"]  # it has no weights to read


def test_useless_draft_has_an_mbsu_below_one(measured):
    row = row_of(measured(OTHER), "draft", 5)
    assert row["acceptance_rate"] < 0.2
    assert row["mbsu"] < 1


def test_plain_row_is_the_unit(measured):
    row = row_of(measured(OTHER), "plain", 0)
    assert (row["speedup"], row["speedup_ci"], row["predicted_speedup"]) == (1, [1, 1], 1)
    assert (row["block_efficiency"], row["mbsu"]) == (1, 1)
    assert (row["acceptance_rate"], row["acceptance_rate_ci"], row["acceptance_by_position"]) == (None, None, [])


def test_greedy_answers_are_compared_with_plain_ones(measured):
    rows = measured(OTHER).rows()
    assert {row["category"]: row["prompts"] for row in rows} == {"x": 2, "y": 1}
    assert all(row["equal_to_plain"] == row["prompts"] for row in rows)
    assert all(row["new_tokens"] == row["prompts"] * WHOLE_BLOCKS for row in rows)


def test_sampled_rows_repeat_and_are_not_compared(measured):
    """Every answer to a prompt has the prompt's seed; only the pacing decides by the clock."""
    settings = DraftSettings(num_draft_tokens=(3,), max_new_tokens=30, temperature=1.0)
    first, second = (
        [row for row in measured(OTHER, settings).rows() if row["num_draft_tokens"] != "auto"] for _ in "ab"
    )
    for name in ("acceptance_rate", "acceptance_rate_ci", "block_efficiency", "new_tokens"):
        assert [row[name] for row in first] == [row[name] for row in second]
    assert {row["equal_to_plain"] for row in first} == {None}


def test_counts_agree_with_each_other(measured):
    """Block efficiency is 1 + what was accepted for each step; here no answer ends early."""
    for row in measured(OTHER).rows():
        if row["drafter"] in ("draft", "random") and row["num_draft_tokens"] == 1:
            assert row["block_efficiency"] == pytest.approx(1 + row["acceptance_rate"], abs=0.02)
        assert row["acceptance_rate"] is None or 0 <= row["acceptance_rate_ci"][0] <= row["acceptance_rate"]


def test_first_prompt_is_answered_once_more_uncounted(tmp_path):
    bench = DraftBench(make_llm(tmp_path, make_engine(TARGET, OTHER)), PROMPTS, SETTINGS)
    assert sum(1 for _ in bench.run()) == bench.num_answers == (1 + len(PROMPTS)) * 11


def test_prompt_is_not_read_within_the_measured_time(tmp_path, monkeypatch):
    """Whichever variant came first would otherwise pay for the draft's reading."""
    engine = make_engine(TARGET, TARGET)
    llm = make_llm(tmp_path, engine)
    longest = []
    generate = llm.generate
    draft = engine.drafter.model

    def watched(prompt, **options):
        if options["max_new_tokens"] == SETTINGS.max_new_tokens:  # else it is not measured
            draft.on_forward = lambda token_ids: longest.append(len(token_ids))
        answer = generate(prompt, **options)
        draft.on_forward = lambda token_ids: None
        return answer

    monkeypatch.setattr(llm, "generate", watched)
    for _ in DraftBench(llm, [Prompt("abcdefgh" * 5, "x", 1)], SETTINGS).run():
        pass
    assert 0 < max(longest) <= 2


def test_steps_of_every_length_that_occurred_are_reported(measured):
    steps = measured(OTHER).steps()
    assert {(s["drafter"], s["num_draft_tokens"]) for s in steps if s["category"] == "x"} >= {
        ("plain", 0),
        *itertools.product(["draft", "random"], LENGTHS),
    }
    assert all(step["target_s"] > 0 for step in steps)


def test_answer_that_ends_at_once_is_no_division_by_zero(tmp_path):
    """Every token ends the text here: nothing is decoded, and nothing is claimed."""
    llm = make_llm(tmp_path, make_engine(TARGET, OTHER), range(24))
    bench = DraftBench(llm, PROMPTS, SETTINGS)
    for _ in bench.run():
        pass
    assert {(row["speedup"], row["block_efficiency"], row["new_tokens"]) for row in bench.rows()} == {(None, None, 0)}


def test_prompt_at_the_end_of_the_context_is_measured(tmp_path):
    llm = make_llm(tmp_path, make_engine(TARGET, OTHER, context_length=12))
    bench = DraftBench(llm, [Prompt("abcdefghijk", "x", 1)], SETTINGS)
    for _ in bench.run():
        pass
    assert {row["new_tokens"] for row in bench.rows()} == {1}


def test_prompt_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ContextOverflowError, match="line 2: the prompt has 12 tokens"):
        DraftBench(
            make_llm(tmp_path, make_engine(TARGET, context_length=12)),
            [Prompt("a", "x", 1), Prompt("abcdefghijkl", "x", 2)],
            SETTINGS,
        )


@pytest.mark.parametrize("length", [0, -1, 65])
def test_length_that_is_no_draft_is_refused(length):
    with pytest.raises(ConfigError, match="num_draft_tokens"):
        DraftSettings(num_draft_tokens=(1, length))
