"""Every command and example of the README and of docs/faster.md runs, on a real model where one is named."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from edge_runtime.cli import app
from edge_runtime.cli.app import COMMANDS, load_command

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/faster.md", "docs/cli.md", "models.md", "CONTRIBUTING.md")
EDGE_RUN = "import sys; from edge_runtime.cli import main; main()"


def fenced(page: str, language: str) -> list[str]:
    """Return the contents of a page's fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """Return the words of every edge-run command of a page, without the program's name."""
    lines = [part.strip() for block in fenced(page, "sh") for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(line)[1:] for line in lines if line.startswith("edge-run ")]


def after(page: str, marker: str) -> list[list[str]]:
    """Return the edge-run commands of the block that follows `<!-- marker -->`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    block = re.search(rf"<!-- {marker} -->\s*```sh\n(.*?)```", text, re.DOTALL)
    assert block, f"{page} has no block after <!-- {marker} -->"
    return [shlex.split(line)[1:] for line in block[1].splitlines() if line.startswith("edge-run ")]


def run(words: list[str], folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "export")))}
    done = subprocess.run(
        [sys.executable, "-c", EDGE_RUN, *words],
        check=False,
        cwd=folder,
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"edge-run {' '.join(words)}: {done.stderr}"
    return done


@pytest.mark.parametrize("page", PAGES)
def test_every_command_shown_has_the_options_it_names(page: str) -> None:
    """A renamed option must not live on in a page."""
    for words in commands(page):
        name = next((name for name in COMMANDS if " ".join(words[:2]) == name), words[0])
        assert name in COMMANDS, f"{page}: edge-run {' '.join(words)}"
        known = {flag for parameter in load_command(name).params for flag in parameter.opts}
        given = {word for word in words if re.fullmatch(r"--?[a-z][\w-]*", word)}
        assert given <= known | {"--help", "-h"}, f"{page}: {name} has no {sorted(given - known)}"


def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = fenced("README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 50


def test_the_readmes_hub_commands_run(
    tiny_ir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub is a folder here; all else is as it would be."""
    model = tiny_ir("llama")
    siblings = [SimpleNamespace(rfilename=p.name, size=p.stat().st_size, lfs=None) for p in model.iterdir()]
    info = SimpleNamespace(sha="0123abcd" * 5, siblings=siblings)

    def download(hub_id: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copyfile(model / name, local_dir / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    pull, chat = after("README.md", "hub")
    assert app.run(pull) == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    capsys.readouterr()
    assert app.run([*chat, "-n", "8"]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_readmes_export_commands_run_on_a_real_chat_model(smollm2: Path, tmp_path: Path) -> None:
    """int4 has no group size there: 128 does not divide this model's 576 inputs, so export picks one that does."""
    (tmp_path / "my-model").symlink_to(smollm2)
    *exports, chat = after("README.md", "export")
    assert chat[0] == "chat"
    for words in exports:
        run(words, tmp_path)
    answer = run([*chat, "-t", "0", "-n", "24"], tmp_path, stdin="What is gravity? Explain in two sentences.\n").stdout
    assert answer.startswith("Gravity is a")
    assert "<|im_" not in answer
    run(["inspect", "my-model-int4", "--plot", "layers.png"], tmp_path)
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
