"""`edge-run export`: one line or one object on stdout, nothing but ours on stderr, no traceback."""

import json
import os
import re
import subprocess
import sys

import pytest

from edge_export import extra
from edge_runtime.manifest import load_manifest
from tests.tiny_models import make_hf_model


def test_one_line_says_what_was_made(edge_run, tiny_hf, tmp_path):
    code, out, err = edge_run(tiny_hf("llama"), "-o", tmp_path / "ir")
    assert code == 0
    assert out.startswith(f"{tmp_path / 'ir'}: int8, 0.1 M parameters, ")
    assert "same most likely token as the source at" in out
    assert "% at default precision" in out
    assert out.count("\n") == 1
    assert err == f"try it: edge-run chat -m {tmp_path / 'ir'}\n"


def test_json_is_one_object_and_the_libraries_are_silent(edge_run, tiny_hf, tmp_path):
    """Both streams, at the level of file descriptors: prints, warnings, progress bars and log lines would show."""
    code, out, err = edge_run(
        tiny_hf("llama"), "-o", tmp_path / "ir", "--weights", "int4", "--group-size", 32, "--symmetric", "--json"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["output"] == str(tmp_path / "ir")
    assert report["weights"] == "int4"
    assert report["group_size"] == 32
    assert report["num_parameters"] == 123_200
    assert report["bytes"] == sum(path.stat().st_size for path in (tmp_path / "ir").iterdir())
    assert (
        set(report["default_verification"])
        == set(report["verification"])
        == {
            "error",
            "max_abs_error",
            "kl_divergence",
            "top1_agreement",
            "num_positions",
        }
    )


def test_output_is_named_after_source_and_weights(edge_run, tiny_hf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert edge_run(tiny_hf("gpt2"), "--weights", "fp16")[0] == 0
    assert load_manifest(tmp_path / "hf-fp16").weights == "fp16"
    assert edge_run(tiny_hf("gpt2"), "--weights", "fp16")[0] == 2
    assert edge_run(tiny_hf("gpt2"), "--weights", "fp16", "--overwrite")[0] == 0
    assert edge_run(tiny_hf("gpt2"), "--weights", "f16")[0] == 0  # as every other option spells it
    assert load_manifest(tmp_path / "hf-f16").weights == "fp16"


@pytest.mark.parametrize(
    ("args", "code", "error", "hint"),
    [
        (("./nowhere",), 1, "`./nowhere` does not exist", "give a model folder"),
        (("HF", "--weights", "int3"), 2, "weights is 'int3', expected f32, f16", ""),
        (
            ("HF", "--weights", "int4", "--group-size", "128"),
            1,
            "group_size 128 does not divide hidden_size, which is 64",
            "use --group-size 64",
        ),
        (("HF", "--calibration-text", "x"), 2, "calibration_text has no effect on int8 weights", "--weights int4"),
        (
            ("HF", "--weights", "int4", "--group-size", "32", "--calibration-text", "nowhere.txt"),
            2,
            "calibration_text `nowhere.txt` cannot be read",
            "UTF-8",
        ),
    ],
)
def test_failure_is_an_error_and_a_hint(edge_run, tiny_hf, tmp_path, monkeypatch, args, code, error, hint):
    monkeypatch.chdir(tmp_path)
    got, out, err = edge_run(*(tiny_hf("llama") if arg == "HF" else arg for arg in args))
    assert (got, out) == (code, "")
    first, *rest = err.splitlines()
    assert first.startswith(f"error: {error}")
    assert not hint or (rest[0].startswith("hint: ") and hint in rest[0])
    assert len(rest) <= 1
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_names_the_command_that_installs_it(edge_run, tiny_hf, monkeypatch):
    monkeypatch.setattr(extra, "PACKAGES", ("torch", "a_package_that_is_not_there"))
    code, out, err = edge_run(tiny_hf("llama"))
    assert (code, out) == (1, "")
    assert "packages that are not installed: a_package_that_is_not_there" in err
    assert re.search(r'hint: pip install ".+\[export\]"', err)


def test_broken_torchvision_and_telemetry_are_never_imported():
    """A torchvision built for another torch makes every transformers model unimportable."""
    code = (
        "import sys\n"
        "from edge_export.quiet import quiet\n"
        "with quiet():\n"
        "    import openvino, nncf, transformers\n"
        "    from openvino.tools.ovc import convert_model\n"
        "    from transformers import LlamaForCausalLM\n"
        "print(sys.modules['torchvision'], sys.modules['openvino_telemetry'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split() == ["None", "None"]
    assert done.stderr == ""


@pytest.mark.parametrize("command", [("export",), ("train", "hybrid")])
def test_commands_work_beside_a_broken_torchvision(tmp_path, command):
    """Each in a process of its own: in this one it is hidden already."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
    info = tmp_path / "torchvision-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n")
    source = make_hf_model("llama", tmp_path / "hf", num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text("too short")
    flags = () if command == ("export",) else ("--text", str(text))
    done = subprocess.run(
        [sys.executable, "-m", "edge_runtime", *command, str(source), "-o", str(tmp_path / "out"), *flags],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    said = {"export": "try it: ", "train": "error: the text has 8 tokens, but a window needs 512"}[command[0]]
    assert f"\n{said}" in f"\n{done.stderr}"


def test_package_in_use_stays_visible(monkeypatch):
    from edge_export import quiet

    monkeypatch.setitem(sys.modules, "torchvision", sys)
    quiet.hide_packages()
    assert sys.modules["torchvision"] is sys


def test_quiet_gives_streams_and_levels_back(capsys):
    import logging
    import warnings

    from edge_export.quiet import quiet

    logger = logging.getLogger("transformers")
    logger.setLevel(logging.INFO)
    with pytest.raises(ValueError, match="through"), quiet():
        print("noise")
        print("noise", file=sys.stderr)
        warnings.warn("noise", stacklevel=1)
        logger.error("noise")
        raise ValueError("through")
    print("signal")
    assert tuple(capsys.readouterr()) == ("signal\n", "")
    assert logger.level == logging.INFO
    logger.setLevel(logging.NOTSET)
