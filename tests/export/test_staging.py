"""The output appears whole or not at all, and never in the place of something else unasked."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import openvino as ov
import pytest

from edge_export import convert, staging
from edge_export.convert import STAGES, export_model
from edge_export.staging import check_free_disk, staged
from edge_runtime.errors import ConfigError, ExportError
from edge_runtime.manifest import Manifest, load_manifest

Usage = namedtuple("Usage", "total used free")


def test_block_that_ends_well_makes_the_folder(tmp_path):
    with staged(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_block_that_fails_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), staged(tmp_path / "out", overwrite=False) as folder:
        (folder / "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_overwrite_replaces_the_whole_folder_and_only_at_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(ValueError, match="bad"), staged(tmp_path / "out", overwrite=True):
        raise ValueError("bad")
    assert os.listdir(tmp_path / "out") == ["old"]
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_old_folder_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    replace = os.replace

    def refuse_partial(source, target):
        if ".partial-" in str(source):
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", refuse_partial)
    with pytest.raises(PermissionError), staged(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["old"]


def test_output_that_exists_is_refused_before_any_work(tiny_hf, tmp_path):
    (tmp_path / "mine").write_text("precious")
    stages = []
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        export_model(tiny_hf("llama"), tmp_path, progress=lambda *args: stages.append(args))
    assert "--overwrite" in caught.value.hint
    with pytest.raises(ConfigError, match="is a file"):
        export_model(tiny_hf("llama"), tmp_path / "mine", overwrite=True)
    assert stages == []
    assert (tmp_path / "mine").read_text() == "precious"


def test_source_cannot_be_overwritten(tiny_hf, tmp_path):
    shutil.copytree(tiny_hf("llama"), tmp_path / "models" / "hf")
    for output in (tmp_path / "models" / "hf", tmp_path / "models"):
        with pytest.raises(ConfigError, match="holds the source"):
            export_model(tmp_path / "models" / "hf", output, overwrite=True)
    assert (tmp_path / "models" / "hf" / "model.safetensors").is_file()


def test_stages_are_reported_in_order(tiny_hf, tmp_path):
    reported = []
    export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32", progress=lambda *args: reported.append(args))
    assert reported == [(name, done, len(STAGES)) for done, name in enumerate(STAGES)]
    assert load_manifest(tmp_path / "ir").architecture == "gpt2"


@pytest.mark.parametrize("place", ["model", "manifest"])
def test_full_disk_is_one_line_and_leaves_nothing(tiny_hf, tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((ov, "save_model") if place == "model" else (Manifest, "save")), fail)
    with pytest.raises(ExportError, match=r"the disk of .* is full") as caught:
        export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32")
    assert caught.value.hint
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("free", "message"), [(0, "Serialization failed"), (10**12, "basic_ios::clear: iostream error")]
)
def test_full_disk_is_recognised_without_an_errno(tmp_path, monkeypatch, free, message):
    """OpenVINO's writer gives none, and removes the file that did not fit."""
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(10**12, 10**12, free))
    with pytest.raises(ExportError, match="is full"), staged(tmp_path / "out", overwrite=False):
        raise RuntimeError(message)


def test_interrupt_in_any_stage_leaves_nothing(tiny_hf, tmp_path):
    for last in STAGES:

        def interrupt(stage, *_, last=last):
            if stage == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32", progress=interrupt)
        assert os.listdir(tmp_path) == []


def test_disk_that_is_too_small_is_refused_before_the_model_is_read(tiny_hf, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(10**9, 0, 10_000_000))
    stages = []
    with pytest.raises(ExportError, match=r"needs about 0\.1 GB of disk, .* has 0\.0 GB"):
        export_model(tiny_hf("llama"), tmp_path / "ir", progress=lambda stage, *_: stages.append(stage))
    assert stages == ["read"]
    assert os.listdir(tmp_path) == []


def test_free_disk_is_asked_where_the_output_will_be(tmp_path):
    check_free_disk(tmp_path / "not" / "yet" / "there", needed_bytes=1)


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8"])
def test_estimate_covers_what_is_written(tiny_hf, tmp_path, weights):
    report = export_model(tiny_hf("llama"), tmp_path / "ir", weights=weights)
    estimate = convert._disk_bytes(convert.open_source(tiny_hf("llama")), weights)
    source = (tiny_hf("llama") / "model.safetensors").stat().st_size
    assert report.num_bytes < estimate + staging.SPARE_BYTES
    assert estimate < 2.5 * source


def test_library_failure_becomes_one_line(tiny_hf, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Check 'x' failed at file.cpp:1:\nthe real reason")

    monkeypatch.setattr(ov, "save_model", fail)
    with pytest.raises(ExportError, match="cannot be exported: the real reason") as caught:
        export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_memory_that_runs_out_says_so(tiny_hf, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(ov, "save_model", fail)
    with pytest.raises(ExportError, match="not enough memory"):
        export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32")


def test_no_package_is_imported_to_say_no(tmp_path):
    """A wrong call must not cost the seconds that torch takes."""
    code = (
        "import sys\n"
        "from edge_export.convert import export_model\n"
        "try:\n    export_model('./nowhere', sys.argv[1])\n"
        "except Exception as error:\n    print(type(error).__name__, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.split() == ["ExportError", "False"]
