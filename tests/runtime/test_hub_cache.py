"""A folder of the hub's cache stands for the model in it, for every command that takes a model."""

import json

import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.errors import ModelFormatError
from edge_runtime.hub_cache import resolve
from edge_runtime.manifest import load_manifest


@pytest.fixture
def cached(tmp_path):
    """An empty cache folder of one model."""
    (tmp_path / "models--ORG--NAME" / "snapshots").mkdir(parents=True)
    return tmp_path / "models--ORG--NAME"


def snapshot(cached, commit):
    folder = cached / "snapshots" / commit
    folder.mkdir()
    return folder


def test_main_says_which_snapshot(cached):
    expected = snapshot(cached, "new")
    snapshot(cached, "old")
    with pytest.raises(ModelFormatError, match=r"2 snapshots and no refs/main: new, old"):
        resolve(cached)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("new\n")
    assert resolve(cached) == expected
    assert resolve(cached / "snapshots") == expected


def test_only_snapshot_needs_no_main(cached):
    assert resolve(snapshot(cached, "only").parent.parent).name == "only"


def test_cache_without_a_snapshot_says_how_to_fetch_it(cached):
    with pytest.raises(ModelFormatError, match="no downloaded snapshot of ORG/NAME") as caught:
        resolve(cached)
    assert caught.value.hint == "fetch it: `hf download ORG/NAME`"


def test_root_of_the_cache_lists_its_models(cached):
    with pytest.raises(ModelFormatError, match="the hub's cache of 1 models: ORG/NAME"):
        resolve(cached.parent)


def test_any_other_folder_is_itself(tmp_path):
    assert resolve(tmp_path) == tmp_path
    assert resolve(tmp_path / "absent") == tmp_path / "absent"


def test_model_is_loaded_from_the_cache(cached, tiny_ir):
    (cached / "snapshots" / "c0ffee").symlink_to(tiny_ir("llama"))
    assert EdgeLLM.load(cached).generate("Once", max_new_tokens=2).token_ids


@pytest.mark.parametrize("name", ["openvino_model.bin", "openvino_model.xml", "config.json"])
def test_pointer_that_git_left_is_named(tmp_path, name):
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelFormatError, match=f"{name}` is a Git LFS pointer") as caught:
        load_manifest(tmp_path)
    assert "git lfs pull" in (caught.value.hint or "")


def test_gguf_file_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(ModelFormatError, match="is a GGUF file, which edge-run does not read"):
        load_manifest(tmp_path / "model.gguf")
