"""What is written of an answer, at which temperature, and how answers become windows."""

from __future__ import annotations

import json

import pytest

from edge_export.fastdraft import answers
from edge_export.fastdraft.answer_windows import WRITTEN, answer_windows
from edge_export.fastdraft.answers import TEMPERATURES, AnswerConfig, Job, temperature_of
from edge_runtime.api import EdgeLLM
from tests.runtime.fakes import make_engine, make_llm, random_table


def test_prompts_whose_kinds_take_turns_get_every_temperature():
    """Text had only 0.6 and 1.0, code only 0.8 and greedy."""
    for kind in (0, 1):
        given = [temperature_of(number, TEMPERATURES) for number in range(kind, 16, 2)]
        assert sorted(given) == sorted(TEMPERATURES * 2)


@pytest.mark.parametrize("top", [0, 3])
def test_an_answer_ends_with_its_stop_token(tmp_path, monkeypatch, top):
    """A draft that never sees it goes on where the target ends; with a teacher it has a distribution too."""
    llm = make_llm(tmp_path, make_engine(random_table(24, 1)), eos_token_ids=[5])
    monkeypatch.setattr(EdgeLLM, "load", lambda *_, **__: llm)
    writer = answers._Writer(AnswerConfig(model=tmp_path, max_new_tokens=40, top=top))
    lines = writer.write([Job(number, prompt) for number, prompt in enumerate(["abc", [1, 2], "x", None] * 4)])
    assert [line["index"] for line in lines] == list(range(16))
    ended = [line["answer_ids"] for line in lines if 5 in line["answer_ids"]]
    assert ended
    assert all(ids.index(5) == len(ids) - 1 for ids in ended)
    assert all(len(line["answer_ids"]) == 40 for line in lines if 5 not in line["answer_ids"])
    for line in lines:
        assert [len(tokens) for tokens in line.get("top", [])] == [top] * len(line["answer_ids"]) * bool(top)


def test_a_batch_that_is_written_again_is_the_same(tmp_path, monkeypatch):
    """A run that goes on after a kill begins with a batch of which some answers are there already."""
    jobs = [Job(number, "abc") for number in range(16)]
    written = []
    for _ in "ab":
        llm = make_llm(tmp_path, make_engine(random_table(24, 1), max_sequences=5))
        monkeypatch.setattr(EdgeLLM, "load", lambda *_, llm=llm, **__: llm)
        written.append(answers._Writer(AnswerConfig(model=tmp_path)).write(jobs))
    assert written[0] == written[1]
    assert len({str(line["answer_ids"]) for line in written[0]}) > 8, "each has a seed of its own"


def test_answers_are_apart_and_only_what_the_target_wrote_is_marked(tmp_path):
    """The next prompt followed the last answer without an end of text."""
    path = tmp_path / "answers.jsonl"
    lines = [
        {"prompt_ids": [5], "answer_ids": [6, 7], "top": [[[6, 0.0]], [[7, 0.0]]]},
        {"prompt_ids": [8], "answer_ids": [9], "top": [[[9, 0.0]]]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    windows, teacher = answer_windows(path, 7, end_of_text=0, top=1)
    assert windows.tolist() == [[5, 6 | WRITTEN, 7 | WRITTEN, 0, 8, 9 | WRITTEN, 0]]
    assert teacher is not None
    assert (teacher.probabilities[0, :, 0] > 0).tolist() == [(token & WRITTEN) > 0 for token in windows[0].tolist()]
