"""What people download and is no whole checkpoint is named in one line, from its files alone, before torch is there."""

import json
import shutil
import sys

import pytest

from edge_export.sources import load_config, open_source
from edge_runtime.errors import EdgeError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def folder(tiny_hf, tmp_path):
    """A copy of the Llama that may be spoilt."""
    shutil.copytree(tiny_hf("llama"), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def without_torch(monkeypatch, folder):
    """Let nobody import torch or transformers: the files are to tell."""
    for name in ("torch", "transformers", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)


def _bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _config(**entries):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def _instead_of_weights(name, content=b"x"):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def _in_shards(*names, listed=None):
    """Replace the weights by an index and the files of these names."""

    def change(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).write_bytes(content)
        index = {"weight_map": {f"tensor{i}": name for i, name in enumerate(listed or names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _table(folder):
    """Let the table of the weights begin with something else."""
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8:10] = b"[["
    (folder / "model.safetensors").write_bytes(content)


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(
    ("spoil", "message", "hint"),
    [
        (_bytes("model.safetensors", POINTER), r"model\.safetensors` is a Git LFS pointer", "git lfs pull"),
        (_bytes("tokenizer.json", POINTER), r"tokenizer\.json` is a Git LFS pointer", "git lfs pull"),
        (_bytes("tokenizer.model", POINTER), r"tokenizer\.model` is a Git LFS pointer", "git lfs pull"),
        (_bytes("config.json", POINTER), r"config\.json` is a Git LFS pointer", "git lfs pull"),
        (_bytes("model.safetensors", b""), r"model\.safetensors` is empty", "download the model again"),
        (_bytes("model.safetensors", b"\x08"), "is no safetensors file", "download the model again"),
        (_bytes("model.safetensors", b"<!DOCTYPE html>" * 99), "is no safetensors file", "download the model again"),
        (_table, "is no safetensors file, or damaged", "download the model again"),
        (_in_shards("a.safetensors", listed=("a.safetensors", "b.safetensors")), "1 of the 2 files .*: b", "again"),
        (_in_shards("../a.safetensors"), r"names `\.\./a\.safetensors`, expected files beside it", "again"),
        (_instead_of_weights("model.safetensors.index.json", b"{}"), "has no weight_map", "again"),
        (_instead_of_weights("model.gguf"), "holds GGUF files, which edge-run does not read", "transformers reads"),
        (_instead_of_weights("consolidated.00.pth"), "weights in their makers' own format", "transformers reads"),
        (_instead_of_weights("tf_model.h5"), "holds TensorFlow weights only", "safetensors"),
        (_instead_of_weights("flax_model.msgpack"), "holds Flax weights only", "safetensors"),
        (_instead_of_weights("model.fp16.safetensors"), r"holds model\.fp16\.safetensors, expected", "rename it"),
        (_bytes("model_index.json", b"{}"), "is a diffusers pipeline", None),
        (_bytes("modules.json", b'[{"type": "sentence_transformers.models.Pooling"}]'), "sentence-transformers", None),
        (_config(quantization={"group_size": 64, "bits": 4}), "is an MLX checkpoint with int4 weights", "original"),
        (_bytes("config.json", '{"model_type": "llama"}'.encode("utf-16")), "is UTF-16 text, expected UTF-8", "UTF-8"),
        (_bytes("config.json", b'{"model_type": "llama"} // mine'), "is not readable JSON", "again"),
        (_bytes("config.json", b'{"a": 1, "a": 2}'), "`a` comes twice, as 1 and as 2", "again"),
        (_bytes("tokenizer.json", b"\xef\xbb\xbf{}"), "begins with a byte order mark", "without one"),
        (_bytes("config.json", b"[" * 100_000), "is not readable JSON", "again"),
    ],
)  # fmt: skip
def test_files_tell_what_cannot_be_exported(folder, spoil, message, hint):
    spoil(folder)
    with pytest.raises(EdgeError, match=message) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.hint is None if hint is None else hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"GGUF\3\0\0\0", "is a GGUF file, which edge-run does not read"),
        ("m.bin", b"GGUF\3\0\0\0", "is a GGUF file, which edge-run does not read"),
        ("model.safetensors", b"", "is a file of weights, expected the model folder around it"),
        ("model.zip", b"PK", r"is a \.zip file, expected a model folder"),
    ],
)
def test_file_given_for_its_folder_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EdgeError, match=message):
        open_source(tmp_path / name)


def test_byte_order_mark_does_no_harm(folder):
    from edge_export import torch_source

    _in_shards("a.safetensors")(folder)
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        if (folder / name).is_file():
            (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    source = open_source(folder)
    assert [file.name for file in source.weight_files] == ["a.safetensors"]
    assert torch_source.load(source, "fp32").config.hidden_size == 64


def test_number_that_is_none_is_refused_by_name(folder):
    _config(max_position_embeddings=float("nan"))(folder)
    with pytest.raises(EdgeError, match=r"config\.json` cannot be used: .*max_position_embeddings.*nan"):
        load_config(open_source(folder))


@pytest.mark.parametrize("model_type", ["llama", "mymodel"])
def test_model_with_code_of_its_own_is_refused(folder, model_type):
    _config(model_type=model_type, auto_map={"AutoModelForCausalLM": "modeling_mine.MyModel"})(folder)
    with pytest.raises(EdgeError, match=r"Python code .* which edge-run does not run"):
        load_config(open_source(folder))


def test_code_beside_a_known_architecture_is_not_needed(folder):
    """Phi-3 and others still carry the files from before transformers knew them."""
    _config(auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})(folder)
    assert load_config(open_source(folder)).model_type == "llama"


@pytest.fixture
def cache(folder, tmp_path):
    """A hub cache with one model."""
    snapshot = tmp_path / "hub" / "models--ORG--Some-Model" / "snapshots" / "c0ffee"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("c0ffee")
    return tmp_path / "hub"


def test_cache_folder_of_a_model_stands_for_its_snapshot(cache):
    source = open_source(cache / "models--ORG--Some-Model")
    assert (source.name, source.folder.name) == ("ORG/Some-Model", "c0ffee")
    assert open_source(source.folder).name == "ORG/Some-Model"


def test_cache_of_many_models_lists_them(cache):
    (cache / "models--other--model").mkdir()
    with pytest.raises(EdgeError, match="hub's cache of 2 models: ORG/Some-Model, other/model"):
        open_source(cache)
