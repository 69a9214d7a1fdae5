"""Ctrl-C at every stage: exit code 130, what there is is printed, no traceback."""

import json
import signal
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")

# What the terminal's status line would say goes to a pipe here, and tells when to interrupt.
REPORT_STATUS = """
import sys
from edge_runtime.cli import console
console.Status.show = lambda self, text: print(text, file=sys.stderr, flush=True)
"""
SLOW_LOAD = """
import time
from edge_runtime.api import EdgeLLM
EdgeLLM.load = lambda *args, **options: time.sleep(60)
"""


def interrupt(process, seen: bytes) -> tuple[int, bytes, bytes]:
    """Wait for a status line that begins with `seen`, press Ctrl-C, and return exit code, stdout and stderr."""
    while not process.stderr.readline().startswith(seen):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    return process.returncode, out, err


@pytest.mark.parametrize("wants_json", [True, False])
def test_while_loading(start_edge_run, model, wants_json):
    """Loading sleeps for a minute here: the wait for a compiler must not delay Ctrl-C."""
    flags = ["--json"] if wants_json else []
    process = start_edge_run("generate", "-m", model, *flags, "x", before=REPORT_STATUS + SLOW_LOAD)
    code, out, err = interrupt(process, b"loading")
    assert code == 130
    assert b"Traceback" not in err
    if wants_json:
        assert json.loads(out)["finish_reason"] == "cancelled"
    else:
        assert out == b""


def test_while_the_prompt_is_read(start_edge_run, long_model):
    process = start_edge_run("generate", "-m", long_model, "--prefill-chunk-size", 1, "--json", before=REPORT_STATUS)
    process.stdin.write(b"fox " * 20_000)
    process.stdin.close()
    process.stdin = None
    code, out, err = interrupt(process, b"reading the prompt")
    answer = json.loads(out)
    assert (code, answer["finish_reason"], answer["token_ids"]) == (130, "cancelled", [])
    assert answer["metrics"]["prompt_tokens"] > 10_000
    assert b"Traceback" not in err


def test_while_answering(start_edge_run, long_model):
    process = start_edge_run("generate", "-m", long_model, "-n", 90_000, "--ignore-eos", "--stats", "Once upon")
    first = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert (first + rest).endswith(b"\n")
    assert b"tokens/s" in err
    assert b"Traceback" not in err


def test_terminated_export_leaves_nothing(start_edge_run, tmp_path):
    """SIGTERM used to leave `NAME.partial-PID` for ever."""
    slow_export = """
import sys, time
from pathlib import Path
from edge_export import convert
from edge_export.staging import staged
def export_model(source, output, **options):
    with staged(Path(output), overwrite=False) as folder:
        (folder / "half").write_text("half")
        print("exporting", file=sys.stderr, flush=True)
        time.sleep(60)
convert.export_model = export_model
"""
    process = start_edge_run("export", "source", "-o", tmp_path / "out", before=slow_export)
    while process.stderr.readline() != b"exporting\n":
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (128 + signal.SIGTERM, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_chat_goes_on_after_a_stopped_answer(start_edge_run, long_model):
    process = start_edge_run("chat", "-m", long_model, "-n", 90_000, "--ignore-eos")
    process.stdin.write(b"Once upon\n")
    process.stdin.flush()
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b"/stats\n/undo\n/quit\n", timeout=20)
    assert process.returncode == 0
    assert out.endswith(b"\n")
    assert b"tokens/s" in err
    assert b"taken back: Once upon" in err
    assert b"Traceback" not in err


def test_while_downloading(start_edge_run):
    """The hub's client waits for its threads, which would hold Ctrl-C until a file of gigabytes is there."""
    slow_hub = """
import sys, time
from edge_runtime import hub
def pull(*args):
    print("downloading", file=sys.stderr, flush=True)
    time.sleep(60)
hub.pull = pull
"""
    code, out, err = interrupt(start_edge_run("pull", "owner/name", before=slow_hub), b"downloading")
    assert (code, out, err) == (130, b"", b"")
