"""Nothing that is read is written over, nothing of the user's is replaced, and two processes never share a place."""

import os
import subprocess
import sys
import threading

import pytest

from edge_runtime import outputs
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MANIFEST_NAME
from edge_runtime.outputs import LOCK_NAME, check_apart, check_output, check_work_folder, claimed

needs_links = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
HOLD = """
import sys, time
from pathlib import Path
from edge_runtime.outputs import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def source(tmp_path):
    """A folder that is read, with a file in it."""
    (tmp_path / "models" / "hf").mkdir(parents=True)
    (tmp_path / "models" / "hf" / "model.safetensors").write_text("precious")
    return tmp_path / "models" / "hf"


@pytest.fixture
def exported(tmp_path):
    """A folder as an export leaves it."""
    folder = tmp_path / "exported"
    folder.mkdir()
    for name in ("openvino_model.xml", "openvino_model.bin", MANIFEST_NAME, "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("models/hf", "is"), ("models/hf/", "is"), ("models/../models/hf", "is"), ("models", "holds"), (".", "holds"),
        ("models/hf/openvino", "lies in"), ("models/hf/a/b/c", "lies in"), ("models/hf/model.safetensors", "lies in"),
    ],
)  # fmt: skip
def test_output_that_is_holds_or_lies_in_an_input_is_refused(source, tmp_path, monkeypatch, output, relation):
    monkeypatch.chdir(tmp_path)
    for name in (outputs.Path(output), tmp_path / output):
        with pytest.raises(ConfigError, match=rf"output `.*` {relation} the source `.*hf`"):
            check_apart(name, source=source)


@pytest.mark.parametrize("output", ["models/hf-int8", "models/hfx", "models/other/hf", "hf"])
def test_neighbours_of_an_input_are_fine(source, tmp_path, output):
    check_apart(tmp_path / output, source=source, target="owner/name", draft=None, text=[source], code=())


def test_files_are_inputs_too(source, tmp_path):
    file = source / "model.safetensors"
    for output in (file, source, tmp_path):
        with pytest.raises(ConfigError, match="the calibration text"):
            check_apart(output, calibration_text=file)
    check_apart(source / "out", calibration_text=file)


def test_every_input_of_several_is_looked_at(source, tmp_path):
    with pytest.raises(ConfigError, match="lies in the code"):
        check_apart(source / "out", target="owner/name", code=[tmp_path / "none", source])


@needs_links
def test_links_do_not_hide_an_input(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "weights").symlink_to(source / "model.safetensors")
    with pytest.raises(ConfigError, match="is the source"):
        check_apart(tmp_path / "link", source=source)
    with pytest.raises(ConfigError, match="is the source"):
        check_apart(source, source=tmp_path / "link")
    with pytest.raises(ConfigError, match="lies in the source"):
        check_apart(tmp_path / "link" / "out", source=source)
    with pytest.raises(ConfigError, match="holds the source"):
        check_apart(tmp_path / "models", source=tmp_path / "link")
    with pytest.raises(ConfigError, match="holds the source"):  # a hub cache keeps its files elsewhere
        check_apart(tmp_path / "models", source=tmp_path / "far")


def test_letter_case_does_not_hide_an_input(source, tmp_path, monkeypatch):
    """On a file system that ignores it, `HF` is the folder `hf`; here, what such a file system answers."""
    monkeypatch.setattr(outputs, "_is_same", lambda one, other: str(one).lower() == str(other).lower())
    with pytest.raises(ConfigError, match="is the source"):
        check_apart(tmp_path / "models" / "HF", source=source)
    with pytest.raises(ConfigError, match="lies in the source"):
        check_apart(tmp_path / "Models" / "HF" / "out", source=source)


def test_overwrite_replaces_model_folders_only(exported, tmp_path):
    with pytest.raises(ConfigError, match="exists and is not empty") as caught:
        check_output(exported)
    assert "--overwrite" in caught.value.hint
    assert check_output(exported, overwrite=True) == exported
    (exported / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"also holds `thesis\.txt`, and only exported models are replaced"):
        check_output(exported, overwrite=True)
    with pytest.raises(ConfigError, match=f"holds no {MANIFEST_NAME}"):
        check_output(tmp_path, overwrite=True)


def test_hint_never_leads_to_the_next_refusal(tmp_path):
    """A folder that --overwrite would refuse is not answered with `--overwrite`."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="not empty") as caught:
        check_output(tmp_path)
    assert "--overwrite" not in caught.value.hint


def test_output_that_can_be_made_is_returned(tmp_path):
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "empty") == tmp_path / "empty"
    assert check_output(tmp_path / "a" / ".." / "b" / "c") == tmp_path / "b" / "c"
    assert sorted(os.listdir(tmp_path)) == ["empty"]


def test_output_in_the_way_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "here" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "deep")
    for output, told in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "`.*file` is a file"),
        (outputs.Path("."), "is the folder you are in"),
    ]:
        with pytest.raises(ConfigError, match=told):
            check_output(output)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path).endswith("empty"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a mount point"):
        check_output(tmp_path / "empty")


@needs_links
def test_link_is_followed_or_refused_but_never_replaced(exported, tmp_path):
    (tmp_path / "link").symlink_to(exported)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert check_output(tmp_path / "link", overwrite=True) == exported
    with pytest.raises(ConfigError, match=r"is a link to `.*nowhere`, which does not exist"):
        check_output(tmp_path / "dangling")


def test_parent_that_may_not_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="may not be written"):
        check_output(tmp_path / "out")


def test_work_folder_vanishes_with_all_it_was_put_into(tmp_path):
    with claimed(tmp_path / "a" / "b"):
        assert os.listdir(tmp_path / "a" / "b") == [LOCK_NAME]
    assert os.listdir(tmp_path) == []


def test_work_that_is_left_stays_for_the_next(tmp_path):
    for _ in range(2):
        with claimed(tmp_path / "work"):
            (tmp_path / "work" / "part").write_text("half")
        assert sorted(os.listdir(tmp_path / "work")) == [LOCK_NAME, "part"]


def test_second_process_at_one_place_is_refused_and_a_dead_one_forgotten(tmp_path):
    """The system releases the lock of a process that was killed; no process id is asked for."""
    work = tmp_path / "work"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(work)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline().strip() == b"held"
        with pytest.raises(ConfigError, match="another edge-run is at work in"), claimed(work):
            pass
        assert process.poll() is None
        process.kill()
    assert work.is_dir()
    with claimed(work):
        pass
    assert not work.exists()


def test_second_thread_at_one_place_is_refused(tmp_path):
    told = []

    def second():
        with pytest.raises(ConfigError) as caught, claimed(tmp_path / "work"):
            pass
        told.append(str(caught.value))

    with claimed(tmp_path / "work"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another edge-run is at work" in told[0]


def test_folder_of_the_users_is_not_taken_for_a_work_folder(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="edge-run did not create it"):
        check_work_folder(tmp_path / "work")
    assert os.listdir(tmp_path / "work") == ["thesis.txt"]
