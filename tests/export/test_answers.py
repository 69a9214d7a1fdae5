"""Which temperature an answer is written at, and how answers become windows."""

from __future__ import annotations

import json

from edge_export.fastdraft.answer_windows import WRITTEN, answer_windows
from edge_export.fastdraft.answers import TEMPERATURES, temperature_of


def test_prompts_whose_kinds_take_turns_get_every_temperature():
    """Text had only 0.6 and 1.0, code only 0.8 and greedy."""
    for kind in (0, 1):
        given = [temperature_of(number, TEMPERATURES) for number in range(kind, 16, 2)]
        assert sorted(given) == sorted(TEMPERATURES * 2)


def test_answers_are_apart_and_only_what_the_target_wrote_is_marked(tmp_path):
    """The next prompt followed the last answer without an end of text."""
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"prompt_ids": [5], "answer_ids": [6, 7], "top": [[[6, 0.0]], [[7, 0.0]]]},
        {"prompt_ids": [8], "answer_ids": [9], "top": [[[9, 0.0]]]},
    ]
    answers.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    windows, teacher = answer_windows(answers, 7, end_of_text=0, top=1)
    assert windows.tolist() == [[5, 6 | WRITTEN, 7 | WRITTEN, 0, 8, 9 | WRITTEN, 0]]
    assert teacher is not None
    assert (teacher.probabilities[0, :, 0] > 0).tolist() == [(token & WRITTEN) > 0 for token in windows[0].tolist()]
