"""Whatever goes wrong: its exit code, one line, a hint, no traceback, and nothing written."""

import errno
import json
import os
import subprocess
import sys

import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.cli import console
from edge_runtime.manifest import MODEL_NAME, load_manifest
from tests.cli.conftest import ROOT


@pytest.fixture
def refused(edge_run, tmp_path, monkeypatch):
    """Return a function from a call that must fail to its error line and its hint."""
    monkeypatch.chdir(tmp_path)

    def call(code, *args, has_hint=True, **terminal):
        before = sorted(tmp_path.rglob("*"))
        done = edge_run(*args, **terminal)
        assert (done.code, done.out) == (code, "")
        lines = done.err.splitlines()
        assert [line.split(":")[0] for line in lines] == (["error", "hint"] if has_hint else ["error"])
        assert sorted(tmp_path.rglob("*")) == before
        return done.err

    return call


def test_missing_folder(refused):
    assert "`nowhere` does not exist" in refused(1, "generate", "-m", "nowhere", "x")


def test_folder_without_a_model(refused, copy_of):
    folder = copy_of()
    (folder / MODEL_NAME).unlink()
    assert "edge-run export" in refused(1, "generate", "-m", folder, "x")


def test_truncated_weights(refused, copy_of):
    path = (copy_of() / MODEL_NAME).with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:1000])
    assert "openvino_model.bin` has 1,000 bytes" in refused(1, "generate", "-m", path.parent, "x")


def test_corrupt_graph(refused, copy_of):
    path = copy_of() / MODEL_NAME
    path.write_text(path.read_text()[:2000])
    load_manifest(path.parent).save(path.parent)
    assert "cannot be read" in refused(1, "generate", "-m", path.parent, "x")


def test_missing_tokenizer(refused, copy_of):
    folder = copy_of()
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(1, "generate", "-m", folder, "x")


def test_draft_of_another_vocabulary(refused, model, copy_of):
    path = copy_of() / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content), encoding="utf-8")
    load_manifest(path.parent).save(path.parent)
    assert "different vocabularies" in refused(1, "generate", "-m", model, "-d", path.parent, "x")


def test_missing_draft(refused, model):
    assert "`nowhere` does not exist" in refused(1, "generate", "-m", model, "-d", "nowhere", "x")


def test_prompt_longer_than_the_context(refused, model):
    assert "context holds 512" in refused(1, "generate", "-m", model, "fox " * 1000)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_absent_device(refused, model, command):
    assert "`GPU.9` is not on this machine" in refused(1, command, "-m", model, "--device", "GPU.9", stdin=b"x")


@pytest.mark.parametrize("stdin", [b"", b"\n"])
def test_empty_prompt(refused, stdin):
    """Said before a model is loaded, which may take long."""
    assert "the prompt is empty" in refused(2, "generate", "-m", "nowhere", stdin=stdin)


@pytest.mark.parametrize("prompt", [["\udcff"], []])
def test_prompt_that_is_not_utf8(refused, prompt):
    assert "UTF-8" in refused(2, "generate", "-m", "nowhere", *prompt, stdin=b"a\xff")


def test_no_prompt_on_a_terminal(refused):
    """It must not wait there for an end of file that nobody expects."""
    assert "no prompt" in refused(2, "generate", "-m", "nowhere", stdin=b"x", is_terminal=True)


BAD_CALLS = {
    "unknown command": (("generat",), "did you mean `generate`?"),
    "no such command": (("xyz",), "commands: generate"),
    "prompt without a command": (("Once upon a time",), '`edge-run generate "Once upon a time"`'),
    "unknown second word": (("bench", "drat"), "did you mean `bench draft`?"),
    "no such second word": (("bench", "xyz"), "commands: draft"),
    "unknown first word": (("trian", "draft"), "did you mean `train`?"),
    "two words in one": (("bench-draft",), "did you mean `bench draft`?"),
    "unknown option of a first word": (("bench", "--plot"), "`edge-run bench --help`"),
    "unknown option": (("generate", "--temprature", "1"), "did you mean `--temperature`?"),
    "beginning of an option": (("generate", "--temp", "1"), "did you mean `--temperature`?"),
    "option of another command": (("pull", "--no-such-thing", "1"), "`edge-run pull --help` lists the options"),
    "unknown short option": (("generate", "-x", "1"), "unknown option `-x`"),
    "unknown root option": (("--verison",), "did you mean `--version`?"),
    "not a number": (("generate", "-m", "x", "-t", "warm"), "--temperature"),
    "several words": (("generate", "-m", "x", "Once", "upon"), "in quotes"),
    "no hub id": (("pull",), "HUB_ID"),
    "bad hub id": (("pull", "a/b/c"), "OWNER/NAME"),
    "bias": (("generate", "-m", "x", "--logit-bias", "many", "x"), "ID=BIAS"),
    "empty stop": (("generate", "-m", "x", "--stop", "", "x"), "--stop holds an empty string"),
    "logprobs without json": (("generate", "-m", "x", "--logprobs", "2", "x"), "add `--json`"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_wrong_call(refused, name):
    args, said = BAD_CALLS[name]
    assert said in refused(2, *args)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--num-draft-tokens", -1), "--num-draft-tokens is -1, expected at least 0"),
        (("--num-draft-tokens", "few"), "--num-draft-tokens is 'few'"),
        (("--num-draft-tokens", "9" * 5000), "--num-draft-tokens is '9999"),
        (("--top-p", 2), "--top-p is 2.0, expected above 0 and at most 1"),
        (("--precision", "f8"), "--precision is 'f8', expected one of"),
        (("--threads", -1), "--threads is -1"),
        (("-n", 0), "--max-new-tokens is 0"),
    ],
)
def test_bad_value_names_the_flag(refused, args, said):
    assert said in refused(2, "generate", "-m", "nowhere", *args, "x")


def test_what_the_model_refuses_names_the_flags(refused, model):
    """Known only when it is loaded."""
    said = refused(2, "generate", "-m", model, "--num-draft-tokens", 4, "x")
    assert "error: --num-draft-tokens is 4, but no draft model is loaded and `--lookup` is off" in said
    assert "`--lookup`" in said


def raises(error):
    def load(*args, **options):
        raise error

    return load


def test_a_bug_is_one_line_too(refused, model, monkeypatch):
    monkeypatch.setattr(EdgeLLM, "load", raises(RuntimeError("first\nsecond")))
    said = refused(1, "generate", "-m", model, "x")
    assert "internal error: RuntimeError: first second" in said
    assert "--debug" in said


def test_full_disk_and_forbidden_file_are_one_line(refused, model, monkeypatch):
    monkeypatch.setattr(EdgeLLM, "load", raises(PermissionError(errno.EACCES, "Permission denied", "model.xml")))
    assert refused(1, "generate", "-m", model, "x", has_hint=False) == "error: `model.xml`: Permission denied\n"


def test_out_of_memory(refused, model, monkeypatch):
    monkeypatch.setattr(EdgeLLM, "load", raises(MemoryError()))
    assert "not enough memory" in refused(1, "generate", "-m", model, "x")


@pytest.mark.parametrize("args", [("--debug", "generate", "-m", "no"), ("generate", "-m", "no", "--debug")])
def test_debug_shows_where_from_wherever_it_stands(edge_run, args):
    done = edge_run(*args, "x")
    assert done.code == 1
    assert done.err.startswith("Traceback")
    assert "load_manifest" in done.err
    assert done.err.splitlines()[-2].startswith("error: model folder `no`")


def test_what_follows_two_dashes_is_text(edge_run):
    done = edge_run("generate", "-m", "no", "--", "--debug")
    assert done.code == 1
    assert "Traceback" not in done.err


def test_hub_that_cannot_be_reached(start_edge_run, tmp_path):
    """A process of its own, since the hub's client reads its address when it is imported; port 9 refuses."""
    process = start_edge_run(
        "pull", "owner/name", "-o", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1"
    )
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, b"")
    lines = err.decode().splitlines()
    assert lines[0].startswith("error: the model hub http://127.0.0.1:9 cannot be reached")
    assert lines[1].startswith("hint: ")
    assert len(lines) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_stdout_on_a_full_disk(start_edge_run, model):
    before = "import sys; sys.stdout = open('/dev/full', 'w')"
    process = start_edge_run("generate", "-m", model, "-n", 3, "x", before=before)
    assert process.communicate()[1] == b"error: `stdout`: No space left on device\n"
    assert process.returncode == 1


def test_windows_closed_pipe_is_told_from_a_bad_file_name(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert console.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument"))
    assert not console.is_closed_pipe(OSError(errno.EINVAL, "Invalid argument", "C:?"))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_colour_on_a_terminal_unless_unwanted(monkeypatch, no_color):
    import pty

    monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        console.print_error("red", None)
        written = os.read(ours, 100)
    os.close(ours)
    assert (b"\x1b[" in written) == (no_color == "")
    assert b"red" in written


ANSWER = ("generate", "-m", "MODEL", "-n", "3", "--stats", "x")
CLOSED_STREAMS = [
    ((1,), ANSWER, 0),
    ((2,), ANSWER, 0),
    ((0,), ANSWER, 0),
    ((0, 1, 2), ANSWER, 0),
    ((0,), ("generate", "-m", "MODEL"), 2),
    ((0,), ("chat", "-m", "MODEL"), 0),
    ((1,), ("--help",), 0),
    ((2,), ("generat",), 2),
    ((1, 2), ("generate", "-m", "nowhere", "x"), 1),
]


@pytest.mark.skipif(sys.platform == "win32", reason="closes descriptors before exec")
@pytest.mark.parametrize(("closed", "args", "code"), CLOSED_STREAMS)
def test_closed_standard_streams_are_nothing_rather_than_an_error(model, closed, args, code):
    """As in `edge-run … >&-`: Python then has None for the stream."""
    script = "import os, sys\n" + "".join(f"os.close({number})\n" for number in closed)
    script += "os.execv(sys.executable, [sys.executable, '-m', 'edge_runtime', *sys.argv[1:]])"
    words = [str(model) if word == "MODEL" else word for word in args]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    assert done.returncode == code
    assert b"internal error" not in done.stderr
    assert b"Traceback" not in done.stderr


def test_streams_that_are_none_as_under_pythonw(start_edge_run, model):
    before = "import sys; sys.stdin = sys.stdout = sys.stderr = None"
    process = start_edge_run("generate", "-m", model, "-n", 3, "x", before=before)
    assert (*process.communicate(), process.returncode) == (b"", b"", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize(("args", "code"), [(("generate", "-m", "MODEL", "--stats", "x"), 0), (("generat",), 2)])
def test_full_stderr_changes_neither_the_answer_nor_the_exit_code(model, args, code):
    words = [str(model) if word == "MODEL" else word for word in args]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "edge_runtime", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=full, check=False)
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and POSIX descriptors")
def test_stdin_that_cannot_be_read_is_one_line(model):
    with open(os.devnull, "w") as unreadable:
        command = [sys.executable, "-m", "edge_runtime", "generate", "-m", str(model)]
        done = subprocess.run(command, cwd=ROOT, stdin=unreadable, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.splitlines()[0] == b"error: stdin cannot be read: Bad file descriptor"
