"""`edge-run` starts fast and describes itself."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import __version__
from edge_runtime.cli.app import COMMANDS, COMPLETION_VARIABLE, FAMILIES, grouped, load_command, run

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"openvino", "numpy", "tokenizers", "jinja2", "huggingface_hub", "rich", "torch"}


@pytest.mark.parametrize(
    "args",
    [
        ["--version"],
        ["--help"],
        ["generate", "--help"],
        ["generate", "x", "--no-such-option"],
        ["plan", "--help"],
        ["bench"],
        ["bench", "draft", "--help"],
    ],
)
def test_what_needs_no_model_loads_no_library(args):
    script = (
        "import json, sys\nfrom edge_runtime.cli.app import run\n"
        f"run({args})\nprint(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_version(edge_run):
    assert edge_run("--version") == (0, f"edge-run {__version__}\n", "")


def test_module_runs_as_the_command_does():
    done = subprocess.run([sys.executable, "-m", "edge_runtime", "generat"], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1] == b"hint: did you mean `generate`?"


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_lists_the_commands(edge_run, args):
    done = edge_run(*args)
    assert (done.code, done.err) == (0, "")
    assert "on this computer." in done.out
    for name in COMMANDS:
        assert f"\n  {name} " in done.out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_help_of_a_first_word_lists_its_own_commands(edge_run, family, flags):
    done = edge_run(family, *flags)
    assert (done.code, done.err) == (0, "")
    assert FAMILIES[family] in done.out
    assert "\n  draft " in done.out
    assert "generate" not in done.out


@pytest.mark.parametrize("args", [["-h"], ["generate", "-h"], ["bench", "-h"], ["bench", "draft", "-h"]])
def test_h_and_the_word_help_are_the_help_flag(edge_run, args):
    *words, _ = args
    expected = edge_run(*words, "--help")
    assert expected.code == 0
    assert edge_run(*args) == edge_run("help", *words) == expected


def test_help_of_an_unknown_command_suggests(edge_run):
    done = edge_run("help", "generat")
    assert (done.code, done.err.splitlines()[1]) == (2, "hint: did you mean `generate`?")


COMPLETIONS = {
    "": {"generate", "chat", "train", "bench"},
    "ge": {"generate"},
    "bench ": {"draft", "cats", "attention"},
    "generate --pre": {"--precision", "--prefill-chunk-size", "--presence-penalty"},
    "bench draft --pl": {"--plot"},
    "no-such --pl": set(),
}


@pytest.mark.parametrize("typed", COMPLETIONS)
def test_shell_completion_knows_commands_and_options_and_loads_no_library(typed):
    script = (
        "import sys\nfrom edge_runtime.cli.app import run\n"
        "try:\n    run([])\nfinally:\n    print(*[name for name in sys.modules if '.' not in name], file=sys.stderr)"
    )
    words = ["edge-run", *typed.split(" ")]
    environment = {"_EDGE_RUN_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
    environment["COMP_CWORD"] = str(len(words) - 1)
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    offered = set(done.stdout.split("\n")) - {""}
    assert offered >= COMPLETIONS[typed]
    assert all(word.startswith(words[-1]) for word in offered)
    assert done.returncode == 0
    assert not set(done.stderr.split()) & HEAVY


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_completion_script_calls_edge_run(monkeypatch, capsys, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    with pytest.raises(SystemExit) as ended:
        run(["--show-completion", shell])
    said = capsys.readouterr().out
    assert not ended.value.code
    assert "edge-run" in said
    assert COMPLETION_VARIABLE in said


def test_common_options_come_first_and_rare_ones_last():
    for name in COMMANDS:
        command = load_command(name)
        titles = list(grouped(command.params))
        assert titles.index("Options") <= 1, name  # after the arguments
        assert "Advanced" not in titles[:-1], name
    first, *_, last = grouped(load_command("generate").params).items()
    assert [parameter.name for parameter in grouped(load_command("generate").params)["Options"]][:4] == [
        *("model", "draft", "max_new_tokens", "temperature")
    ]
    assert (first[0], last[0]) == ("Arguments", "Advanced")


FRAGMENTS = re.compile(r"^(Of|The same|Which|Where|Most|How many|To [a-z]+[,;.])\b|\bsee\b|\b(says|sees|seen by)\b")


def test_help_lines_make_sense_alone():
    """Each has a verb or names a thing, begins with a capital and ends with a full stop."""
    for name in COMMANDS:
        for option, text in load_command(name).help_texts.items():
            assert not FRAGMENTS.search(text), f"{name} {option}: {text}"
            assert len(text.split()) >= 3, f"{name} {option}: {text}"
            assert text.endswith("."), f"{name} {option}: {text}"


def test_families_are_the_first_words_of_the_commands():
    assert {name.split()[0] for name in COMMANDS if " " in name} == set(FAMILIES)
    assert not set(FAMILIES) & set(COMMANDS)


def test_documentation_is_what_the_commands_say():
    """Otherwise: `python tools/generate_cli_docs.py`."""
    spec = importlib.util.spec_from_file_location("generate_cli_docs", ROOT / "tools" / "generate_cli_docs.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.DOCS.read_text(encoding="utf-8") == generator.render()
