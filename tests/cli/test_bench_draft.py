"""`edge-run bench draft`: the report, its checks before anything is loaded, and what Ctrl-C leaves."""

import json
import shutil
from pathlib import Path

import pytest

from edge_runtime import demo
from edge_runtime.api import EdgeLLM
from edge_runtime.bench.draft import DraftBench
from edge_runtime.cli import INTERRUPTED

NUM_VARIANTS = 5  # plain, draft, draft at its own pace, lookup, random


@pytest.fixture
def prompts(tmp_path):
    """Four prompts of two kinds."""
    path = tmp_path / "prompts.jsonl"
    texts = {"stories": ["Once upon a time", "One day the bird"], "code": ["def add(left,", "def run(fox):"]}
    lines = [{"prompt": text, "category": category} for category, several in texts.items() for text in several]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


@pytest.fixture
def bench(edge_run, model, prompts):
    """Return a function that measures the model with itself as its draft."""

    def call(*flags, pair=("-m", model, "-d", model)):
        flags = ("--prompts", prompts, "--num-draft-tokens", 3, "--max-new-tokens", 9, "--precision", "f32", *flags)
        return edge_run("bench", "draft", *pair, *flags)

    return call


def test_json_is_one_object_with_a_row_for_each_category_and_variant(bench, model):
    done = bench("--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert (report["target"], report["draft"], report["relative_size"]) == (str(model), str(model), 1)
    rows = report["rows"]
    assert len(rows) == 2 * NUM_VARIANTS
    assert {row["category"] for row in rows} == {"stories", "code"}
    assert {(row["prompts"], row["equal_to_plain"]) for row in rows} == {(2, 2)}
    (draft,) = [r for r in rows if (r["category"], r["drafter"], r["num_draft_tokens"]) == ("code", "draft", 3)]
    assert draft["acceptance_rate"] == 1
    assert draft["acceptance_by_position"] == [1, 1, 1]
    assert draft["speedup_ci"][0] <= draft["speedup"] <= draft["speedup_ci"][1]
    assert draft["predicted_speedup"] > 0
    assert {step["drafter"] for step in report["steps"]} >= {"plain", "draft", "random"}


def test_table_for_a_person(bench):
    done = bench("--limit", 1)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("stories")
    assert "\ncode" in done.out
    assert "100% (100-100)" in done.out
    assert "1/1" in done.out
    assert "c = 1.0000" in done.out
    assert max(len(line.rstrip()) for line in done.out.splitlines()) <= 80


def test_sampled_answers_are_not_compared(bench):
    rows = bench("--temperature", 1, "--limit", 1, "--json").json["rows"]
    assert {(row["temperature"], row["equal_to_plain"], row["prompts"]) for row in rows} == {(1.0, None, 1)}


def test_embedded_pair_is_measured_where_no_target_is_named(bench, model, monkeypatch):
    monkeypatch.setattr(demo, "demo_target", lambda: model)
    monkeypatch.setattr(demo, "demo_draft", lambda: model)
    assert bench("--limit", 1, "--json", pair=()).json["target"] == str(model)


def test_answers_that_differ_in_f32_are_a_failure(bench, monkeypatch):
    """The report is printed all the same."""
    generate = EdgeLLM.generate

    def broken(self, prompt, **options):
        return generate(self, prompt, **{**options, "max_new_tokens": 5 if options["num_draft_tokens"] == 3 else 9})

    monkeypatch.setattr(EdgeLLM, "generate", broken)
    done = bench("--json", "--limit", 1)
    assert done.code == 1
    assert done.err.splitlines()[0] == "error: 6 answers differ from plain decoding in f32"
    assert done.json["rows"]


@pytest.mark.parametrize("num_answers", [2 * NUM_VARIANTS + 2, 2])
def test_interrupt_reports_whole_prompts(bench, monkeypatch, num_answers):
    run = DraftBench.run

    def interrupted(self):
        for count, _ in enumerate(run(self)):
            if count == num_answers:
                raise KeyboardInterrupt
            yield

    monkeypatch.setattr(DraftBench, "run", interrupted)
    if num_answers < 2 * NUM_VARIANTS:
        with pytest.raises(KeyboardInterrupt):
            bench("--json")
    else:
        done = bench("--json")
        assert (done.code, done.err) == (INTERRUPTED, "")
        assert [row["prompts"] for row in done.json["rows"]] == [1] * NUM_VARIANTS


def test_plot(bench, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("--limit", 1, "--plot", tmp_path / "out.svg").code == 0
    assert "<svg" in (tmp_path / "out.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num-draft-tokens", 0), "num_draft_tokens is 0"),
        (("--temperature", -1), "temperature is -1"),
        (("--limit", 0), "--limit"),
        (("--prompts", "no-such-file"), "`no-such-file`: No such file"),
        (("-d", "nowhere"), "`nowhere` does not exist"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_loaded(bench, monkeypatch, flags, said):
    monkeypatch.setattr(EdgeLLM, "load", None)
    done = bench(*flags)
    assert done.code in (1, 2)
    assert done.out == ""
    assert said in done.err.splitlines()[0]


def test_target_without_a_draft(bench, model):
    done = bench(pair=("-m", model))
    assert done.code == 2
    assert "--target is given without --draft" in done.err


def test_prompt_that_does_not_fit_is_named(bench, prompts):
    with prompts.open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps({"prompt": "fox " * 1000}))
    done = bench()
    assert done.code == 1
    assert done.err.startswith("error: prompt of line 5: the prompt has")


def test_size_is_that_of_the_files_where_parameters_are_unknown(bench, model, tmp_path):
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "edge_model.json").unlink()  # then config.json tells, which knows no number
    weights = other / "openvino_model.bin"
    report = bench("--limit", 1, "--json", pair=("-m", model, "-d", other)).json
    assert report["relative_size"] == weights.stat().st_size / (model / "openvino_model.bin").stat().st_size
