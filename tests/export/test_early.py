"""What can be known from a few files is said before torch is imported, which takes seconds."""

import json
import os
import subprocess
import sys

import pytest

from edge_export.families import KNOWN
from edge_export.quiet import quiet
from edge_runtime.errors import ExportError

CALL = """
import contextlib, io, json, sys, time
import edge_export.convert
from edge_runtime.cli.app import run
for command in json.loads(sys.argv[1]):
    began, err = time.process_time(), io.StringIO()
    with contextlib.redirect_stderr(err):
        code = run(command)
    heavy = [name for name in ("torch", "transformers", "nncf", "optimum") if sys.modules.get(name)]
    seconds = time.process_time() - began
    print(json.dumps({"code": code, "s": seconds, "heavy": heavy, "err": err.getvalue().splitlines()}))
"""
MOST_S = 1.0
"""Longest processor time of a refusal. Refusals take 0.05 to 0.15 s; importing torch and its users takes 6 s."""

TENSORLESS = (2).to_bytes(8, "little") + b"{}"
"""A safetensors file without a tensor."""

CASES = {
    "unknown family": (("FAMILY",), "model_type `nonsense` is not supported"),
    "no tokenizer": (("BARE",), "holds no tokenizer"),
    "no source": (("./nowhere",), "`./nowhere` does not exist"),
    "format": (("HF", "--weights", "int3"), "weights is 'int3'"),
    "group": (("HF", "--weights", "int4", "--group-size", "48"), "group_size 48 does not divide hidden_size"),
    "fused in fp16": (("HF", "--mlp", "fused", "--weights", "fp16"), "but fused MLPs need bf16, int8 or int4"),
    "fused in fp32": (("HF", "--cats", "0.5", "--weights", "fp32", "--calibration-text", "TEXT"), "fused MLPs need"),
    "fused in int4": (("HF", "--mlp", "fused", "--weights", "int4"), "need multiples of 128 as sizes"),
    "cats without text": (("HF", "--cats", "0.5"), "cats needs a calibration text"),
    "text that is not there": (("HF", "--cats", "0.5", "--calibration-text", "no.txt"), "`no.txt` cannot be read"),
    "pattern": (("HF", "--attention", "longgne"), "attention is `longgne`"),
    "pattern's numbers": (("HF", "--attention", "longgen:full=9"), "full"),
    "output exists": (("HF", "-o", "."), "exists and is not empty"),
    "output is the source": (("HF", "-o", "HF"), "is the source"),
    "output around the text": (
        ("HF", "--cats", "0.5", "--calibration-text", "TEXT", "-o", "."),
        "holds the calibration",
    ),
}


def outcomes(commands, tmp_path):
    """Return what `CALL` reports of command lines, one after another in one process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    call = [sys.executable, "-c", CALL, json.dumps([[str(word) for word in command] for command in commands])]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.kernels
def test_refusal_is_one_line_before_torch_is_imported(tiny_hf, tmp_path):
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    for folder, config in (("family", {"model_type": "nonsense"}), ("bare", {"model_type": "llama"})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
        (tmp_path / folder / "model.safetensors").write_bytes(TENSORLESS)
    (tmp_path / "family" / "tokenizer.json").write_text("{}")
    places = {"HF": tiny_hf("llama"), "FAMILY": "family", "BARE": "bare", "TEXT": "text.txt"}
    commands = [["export", *(places.get(arg, arg) for arg in args)] for args, _ in CASES.values()]
    for (name, (_, told)), report in zip(CASES.items(), outcomes(commands, tmp_path), strict=True):
        assert report["err"][0].startswith("error: "), name
        assert told in report["err"][0]
        assert len(report["err"]) <= 2
        assert report["code"] in (1, 2)
        assert report["heavy"] == [], name
        assert report["s"] < MOST_S, name


def test_training_refuses_before_torch_is_imported(tiny_hf, tmp_path):
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    hf, text = tiny_hf("llama"), ("--text", "text.txt")
    commands = [
        ("train", "cats", hf, *text, "-o", hf / "out"),
        ("train", "hybrid", hf, *text, "-o", "text.txt"),
        ("train", "draft", "--target", hf, *text, "-o", hf),
        ("train", "draft", "--target", hf, *text, "-o", "."),
        ("train", "hybrid", hf, *text, "-o", "out", "--attention", "longgne"),
    ]
    told = ("lies in the source", "is a file", "is the target", "holds the text", "attention is `longgne`")
    for report, words in zip(outcomes(commands, tmp_path), told, strict=True):
        assert words in report["err"][0]
        assert report["heavy"] == []
    assert os.listdir(tmp_path) == ["text.txt"]


def test_known_families_are_those_of_optimum_intel():
    """A new release may know more: `models.md` and this list are then to be looked at."""
    with quiet():
        from optimum.exporters.openvino import model_configs  # noqa: F401 - registers the architectures
        from optimum.exporters.tasks import TasksManager

    from edge_export import torch_source
    from edge_export.sources import Source

    def is_supported(family):
        source = Source(name="", folder=None, onnx=None, config={"model_type": family})
        try:
            torch_source.check_supported(source)
        except ExportError as error:
            return "is not supported" not in str(error)
        return True

    registered = TasksManager._LIBRARY_TO_SUPPORTED_MODEL_TYPES["transformers"]
    assert {family for family in registered if is_supported(family)} == KNOWN
