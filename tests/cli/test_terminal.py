"""`edge-run chat` on a terminal: keys typed during an answer stay out of it, and the terminal is left as it was."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.cli.conftest import ROOT

termios = pytest.importorskip("termios")

ON_A_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
"""
MAIN = "from edge_runtime.cli import main\nmain()"


@pytest.fixture
def on_a_terminal():
    """Return a function that starts `edge-run chat` on a new terminal; `before` is Python that it runs first."""
    started = []

    def start(model, *flags, before="", terminal="dumb"):
        ours, theirs = os.openpty()
        started.append((ours, theirs, None))
        command = [
            sys.executable,
            "-c",
            ON_A_TERMINAL + before + MAIN,
            "chat",
            "-m",
            str(model),
            "--ignore-eos",
            *flags,
        ]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TERM": terminal, "NO_COLOR": "1"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        started[-1] = (ours, theirs, process)
        return Session(ours, theirs, process)

    yield start
    for ours, theirs, process in started:
        if process:
            process.kill()
            process.wait()
        os.close(ours)
        os.close(theirs)


class Session:
    """A terminal and the process on it."""

    def __init__(self, ours, theirs, process):
        self.ours, self.theirs, self.process = ours, theirs, process
        self.before = termios.tcgetattr(theirs)
        self.seen = b""
        os.set_blocking(ours, False)

    def read_until(self, is_enough, seconds=60):
        deadline = time.monotonic() + seconds
        while not is_enough(self):
            assert time.monotonic() < deadline, self.seen
            try:
                self.seen += os.read(self.ours, 4096)
            except BlockingIOError:
                time.sleep(0.002)

    def type(self, keys):
        os.write(self.ours, keys)

    @property
    def is_quiet(self):
        """Whether an answer streams: at its prompt, readline switches ICANON off as well."""
        flags = termios.tcgetattr(self.theirs)[3]
        return flags & termios.ICANON and not flags & termios.ECHO

    def ask(self):
        self.read_until(lambda session: session.seen.endswith(b"> "))
        self.type(b"Hello\r")
        self.read_until(lambda session: session.is_quiet)

    def is_as_before(self):
        return termios.tcgetattr(self.theirs) == self.before

    def wait(self):
        self.read_until(lambda session: session.process.poll() is not None)
        return self.process.returncode


def test_paste_of_several_lines_is_one_message(on_a_terminal, model, tmp_path):
    pytest.importorskip("readline")
    session = on_a_terminal(model, terminal="xterm")
    session.read_until(lambda session: session.seen.endswith(b"> "))
    session.type(b"\x1b[200~/system Be kind.\nBe brief.\x1b[201~\r")
    session.read_until(lambda session: b"message is set" in session.seen)
    session.type(f"/save {tmp_path / 'said.json'}\r/quit\r".encode())
    assert session.wait() == 0
    assert json.loads((tmp_path / "said.json").read_bytes())[0]["content"] == "Be kind.\nBe brief."


def test_keys_typed_during_an_answer_wait_for_the_next_prompt(on_a_terminal, model):
    session = on_a_terminal(model, "-n", "200")
    session.ask()
    session.type(b"/stats\r/quit\r")
    assert session.wait() == 0
    assert session.seen.count(b"/stats") == 1
    assert b"> /stats" in session.seen
    assert b"accepted" in session.seen or b"tokens/s" in session.seen
    assert session.is_as_before()


def test_terminal_is_as_before_after_ctrl_c_and_the_chat_goes_on(on_a_terminal, long_model):
    session = on_a_terminal(long_model, "-n", "90000")
    session.ask()
    session.type(b"\x03")
    session.read_until(lambda session: not session.is_quiet)
    session.type(b"/quit\r")
    assert session.wait() == 0
    assert session.is_as_before()


def test_terminal_is_as_before_after_sigterm(on_a_terminal, long_model):
    session = on_a_terminal(long_model, "-n", "90000")
    session.ask()
    session.process.send_signal(signal.SIGTERM)
    assert session.wait() == 128 + signal.SIGTERM
    assert session.is_as_before()


def test_terminal_is_as_before_after_an_error(on_a_terminal, model):
    broken = """
from edge_runtime.cli import chat
def fail(*args):
    import time
    time.sleep(0.5)
    raise RuntimeError("broken")
chat.run_stream = fail
"""
    session = on_a_terminal(model, before=broken)
    session.ask()
    assert session.wait() == 1
    assert b"internal error: RuntimeError: broken" in session.seen
    assert session.is_as_before()
