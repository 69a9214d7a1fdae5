"""`edge-run train draft` as its user calls it."""

from __future__ import annotations

import dataclasses
import inspect
import json

from edge_export.fastdraft.recipe import DraftRecipe
from edge_runtime.cli.train_draft import train_draft

SPELLED = {"size": "auto", "answer_tokens": "1M", "stages": "pretrain,continue,align", "text": None, "code": None}
"""Options whose command-line form is another than the recipe's."""


def test_the_defaults_are_the_recipes():
    parameters = inspect.signature(train_draft).parameters
    for field in dataclasses.fields(DraftRecipe):
        if field.name not in SPELLED and field.default is not dataclasses.MISSING:
            assert parameters[field.name].default == field.default, field.name


def test_a_draft_from_the_targets_own_texts(edge_run, model, tmp_path):
    out = tmp_path / "draft"
    stage = ("--stages", "align", "--prompts", "self", "--no-chat", "--num-answers", "12", "--max-new-tokens", "24")
    options = (*stage, "--window", "32", "--size", "60k", "--batch-size", "2")
    outcome = edge_run("train", "draft", "--target", model, "-o", out, *options, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["stages"]["align"]["updates"] > 0
    assert (out / "openvino" / "openvino_model.xml").is_file()


def test_no_data_is_one_line_and_a_hint(edge_run, model, tmp_path):
    outcome = edge_run("train", "draft", "--target", model, "-o", tmp_path / "draft")
    assert outcome.code == 2
    assert "error: stage pretrain needs a text" in outcome.err
    assert "hint: add --text" in outcome.err


def test_a_bad_number_is_named(edge_run, model, tmp_path):
    outcome = edge_run("train", "draft", "--target", model, "-o", tmp_path / "draft", "--size", "many")
    assert outcome.code == 2
    assert "--size is 'many'" in outcome.err
