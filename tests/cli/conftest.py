"""How a test calls `edge-run`: inside this process, or as a process of its own."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edge_runtime.cli.app import run
from edge_runtime.manifest import load_manifest

ROOT = Path(__file__).resolve().parents[2]
LONG_CONTEXT = 100_000
CTRL_C_WORKS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
"""Also where the tests are a background job of a shell, which has those ignore it."""


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        (line,) = self.out.splitlines()
        return json.loads(line)


@pytest.fixture
def edge_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function from arguments, and bytes of stdin, to what happened."""

    def call(*args: object, stdin: bytes = b"", is_terminal: bool = False) -> Outcome:
        kind = Terminal if is_terminal else io.TextIOWrapper
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(stdin)))
        capsys.readouterr()
        code = run([str(arg) for arg in args])
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def start_edge_run() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Return a function that starts `edge-run` as a process with pipes; `before` is Python that it runs first."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*args: object, before: str = "", **environment: str) -> subprocess.Popen[bytes]:
        script = f"{CTRL_C_WORKS}\n{before}\nfrom edge_runtime.cli import main\nmain()"
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def model(tiny_ir: Callable[[str], Path]) -> Path:
    """A model folder; as its own draft, every drafted token is accepted."""
    return tiny_ir("llama")


@pytest.fixture
def copy_of(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that copies the model, for a test to change."""
    return lambda: shutil.copytree(model, tmp_path_factory.mktemp("copy") / "model")


@pytest.fixture
def long_model(copy_of: Callable[[], Path]) -> Path:
    """The model with room for minutes of answer."""
    folder = copy_of()
    dataclasses.replace(load_manifest(folder), context_length=LONG_CONTEXT).save(folder)
    return folder
