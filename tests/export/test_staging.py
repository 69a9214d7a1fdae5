"""The output appears whole or not at all, and never in the place of something else unasked."""

import errno
import os
import shutil
import sys
from collections import namedtuple

import openvino as ov
import pytest

from edge_export import convert, staging
from edge_export.convert import STAGES, export_model
from edge_export.staging import check_free_disk, staged
from edge_runtime.errors import ConfigError, ExportError
from edge_runtime.manifest import MANIFEST_NAME, Manifest, load_manifest
from edge_runtime.outputs import LOCK_NAME

Usage = namedtuple("Usage", "total used free")


def make_exported(folder):
    """Make a folder that passes for an export."""
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text("{}")


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
    make_exported(tmp_path / "out")
    with pytest.raises(ValueError, match="bad"), staged(tmp_path / "out", overwrite=True):
        raise ValueError("bad")
    assert os.listdir(tmp_path / "out") == [MANIFEST_NAME]
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_old_folder_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    make_exported(tmp_path / "out")
    replace = os.replace

    def refuse_partial(source, target):
        if source.name == "new":
            raise PermissionError(errno.EACCES, "in use")
        replace(source, target)

    monkeypatch.setattr(staging.os, "replace", refuse_partial)
    with pytest.raises(PermissionError), staged(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == [MANIFEST_NAME]


@pytest.mark.parametrize("is_kept", [True, False])
def test_next_run_cleans_up_after_a_killed_one(tmp_path, is_kept):
    """Killed in its work, or between the two renames that put a new folder in the place of an old one."""
    make_exported(tmp_path / "out")
    work = tmp_path / "out.unfinished"
    (work / "new").mkdir(parents=True)
    (work / "new" / "half").write_text("half")
    (work / LOCK_NAME).touch()
    if not is_kept:
        os.replace(tmp_path / "out", work / "old")
    with pytest.raises(ValueError, match="bad"), staged(tmp_path / "out", overwrite=True):
        raise ValueError("bad")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == [MANIFEST_NAME]


def test_old_folder_that_comes_back_is_not_replaced_unasked(tmp_path):
    work = tmp_path / "out.unfinished"
    work.mkdir()
    (work / LOCK_NAME).touch()
    make_exported(work / "old")
    with pytest.raises(ConfigError, match="not empty"), staged(tmp_path / "out", overwrite=False):
        pass
    assert os.listdir(tmp_path / "out") == [MANIFEST_NAME]


def test_interrupt_between_the_renames_loses_nothing(tmp_path, monkeypatch):
    make_exported(tmp_path / "out")
    replace = os.replace

    def interrupted(source, target):
        replace(source, target)
        monkeypatch.setattr(staging.os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", overwrite=True):
        pass
    assert os.listdir(tmp_path / "out") == [MANIFEST_NAME]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_link_stays_a_link_and_its_folder_is_replaced(tmp_path):
    make_exported(tmp_path / "real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with staged(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert os.listdir(tmp_path / "real") == ["new"]
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


def test_second_export_to_one_place_is_refused(tmp_path):
    with (
        staged(tmp_path / "out", overwrite=False),
        pytest.raises(ConfigError, match="another edge-run is at work"),
        staged(tmp_path / "out", overwrite=False),
    ):
        pass
    assert os.listdir(tmp_path) == ["out"]


def test_output_that_exists_is_refused_before_any_work(tiny_hf, tmp_path):
    (tmp_path / "mine").write_text("precious")
    stages = []
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        export_model(tiny_hf("llama"), tmp_path, progress=lambda *args: stages.append(args))
    assert caught.value.hint == "give another folder"  # --overwrite would not replace this one
    with pytest.raises(ConfigError, match="is a file"):
        export_model(tiny_hf("llama"), tmp_path / "mine", overwrite=True)
    assert stages == []
    assert (tmp_path / "mine").read_text() == "precious"


def test_source_cannot_be_overwritten(tiny_hf, tmp_path):
    shutil.copytree(tiny_hf("llama"), tmp_path / "models" / "hf")
    for output, relation in (("hf", "is"), ("", "holds"), ("hf/openvino", "lies in")):
        with pytest.raises(ConfigError, match=f"{relation} the source"):
            export_model(tmp_path / "models" / "hf", tmp_path / "models" / output, overwrite=True)
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
    with pytest.raises(ExportError, match=r"cannot write .*: the disk is full") as caught:
        export_model(tiny_hf("gpt2"), tmp_path / "ir", weights="fp32")
    assert caught.value.hint
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("free", "message"), [(0, "Serialization failed"), (10**12, "basic_ios::clear: iostream error")]
)
def test_full_disk_is_recognised_without_an_errno(tmp_path, monkeypatch, free, message):
    """OpenVINO's writer gives none, and removes the file that did not fit."""
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: Usage(10**12, 10**12, free))
    with pytest.raises(ExportError, match="disk is full"), staged(tmp_path / "out", overwrite=False):
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
