"""A model folder that is not what its export wrote says so: in size at every load, in content once for each file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import checksums
from edge_runtime.api import EdgeLLM
from edge_runtime.checksums import checked, damaged, facts_of
from edge_runtime.demo import demo_draft, demo_target
from edge_runtime.errors import ModelFormatError
from edge_runtime.manifest import CHECKED_NAMES, MANIFEST_NAME, load_manifest

BIN = "openvino_model.bin"
NUM_MUTATIONS = 31


@pytest.fixture
def copy(tiny_ir, tmp_path) -> Path:
    """A model folder with checksums."""
    return Path(shutil.copytree(tiny_ir("llama"), tmp_path / "model"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The user's cache folder, and files of this test count as large."""
    monkeypatch.setattr(checksums, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(checksums, "KEPT_FROM_BYTES", 1)
    return tmp_path / "cache" / "verified"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of files that were read in full."""
    names: list[str] = []
    real = checksums._sha256
    monkeypatch.setattr(checksums, "_sha256", lambda path, *stop: names.append(path.name) or real(path, *stop))
    return names


def flip(path: Path, at: int) -> None:
    """Change one bit, and let the file look as old as it was."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def places(path: Path, count: int) -> list[int]:
    """Return byte positions all over a file, its first and its last among them."""
    return np.linspace(0, path.stat().st_size - 1, count).astype(int).tolist()


def test_every_mutated_file_is_found(copy):
    """25 of 31 mutated files of weights answered without a word."""
    files = load_manifest(copy).files
    assert set(files) == set(CHECKED_NAMES)
    for name in CHECKED_NAMES:
        for at in places(copy / name, NUM_MUTATIONS):
            flip(copy / name, at)
            assert damaged(copy, files) == [name]
            flip(copy / name, at)
    assert damaged(copy, files) == []


def test_mutated_weights_are_found_at_load(copy):
    for at in places(copy / BIN, 5):
        flip(copy / BIN, at)
        with pytest.raises(ModelFormatError, match=rf"{BIN}` is damaged: its SHA-256"):
            EdgeLLM.load(copy)
        flip(copy / BIN, at)
    assert EdgeLLM.load(copy).generate("Once", max_new_tokens=2).token_ids


@pytest.mark.parametrize("name", CHECKED_NAMES)
@pytest.mark.parametrize("change", [-1, 1, -100_000])
def test_truncation_and_extension_are_found_at_every_load(copy, name, change):
    size = (copy / name).stat().st_size
    os.truncate(copy / name, max(0, size + change))
    with pytest.raises(ModelFormatError, match=rf"{name}` has [\d,]+ bytes, but was exported with {size:,}"):
        EdgeLLM.load(copy)


def test_missing_file_is_named(copy):
    (copy / BIN).unlink()
    with pytest.raises(ModelFormatError, match=rf"{BIN}` is missing"):
        EdgeLLM.load(copy)


def test_damaged_draft_is_found_at_load(tiny_ir, copy):
    flip(copy / BIN, 1000)
    with pytest.raises(ModelFormatError, match="is damaged"):
        EdgeLLM.load(tiny_ir("llama"), draft=copy)


def test_large_file_is_read_once_and_again_when_it_changes(copy, cache, hashed):
    """Also where its time of modification was put back."""
    models = [(copy, load_manifest(copy).files)]
    for wanted in (CHECKED_NAMES, ()):
        with checked(models):
            pass
        assert tuple(hashed) == tuple(wanted)
        hashed.clear()
    assert len(list(cache.iterdir())) == len(CHECKED_NAMES)
    flip(copy / BIN, 1000)
    with pytest.raises(ModelFormatError, match="is damaged"), checked(models):
        pass
    assert hashed == [BIN]
    flip(copy / BIN, 1000)
    with checked(models):
        pass


def test_small_file_is_read_at_each_load_and_nothing_is_kept(copy, tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(checksums, "cache_folder", lambda: tmp_path / "cache")
    for _ in range(2):
        with checked([(copy, load_manifest(copy).files)]):
            pass
    assert hashed == [*CHECKED_NAMES] * 2
    assert not (tmp_path / "cache").exists()


def test_cache_that_cannot_be_written_or_read_costs_time_only(copy, cache, hashed):
    cache.parent.write_text("a file, where a folder is wanted")
    for _ in range(2):
        with checked([(copy, load_manifest(copy).files)]):
            pass
    assert hashed == [*CHECKED_NAMES] * 2


def test_failure_of_the_load_is_not_held_up(copy, monkeypatch):
    """What went wrong is said at once, however much there is to be read."""
    monkeypatch.setattr(checksums, "_CHUNK", 1)
    with pytest.raises(ValueError, match="bad"), checked([(copy, load_manifest(copy).files)] * 1000):
        raise ValueError("bad")


def test_folder_without_checksums_is_not_checked(copy, hashed):
    content = json.loads((copy / MANIFEST_NAME).read_text(encoding="utf-8"))
    del content["files"]
    (copy / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    flip(copy / BIN, 1000)
    assert EdgeLLM.load(copy).generate("Once", max_new_tokens=2).token_ids
    assert hashed == []


def test_the_embedded_pair_has_checksums_and_is_whole():
    for folder in (demo_target(), demo_draft()):
        files = load_manifest(folder).files
        assert files == facts_of(folder, CHECKED_NAMES)
        assert set(files) == set(CHECKED_NAMES)


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the variable of Linux")
def test_cache_is_where_the_system_keeps_such_things(tmp_path):
    code = "from edge_runtime.user_folders import cache_folder; print(cache_folder())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == str(tmp_path / "edge-run")
