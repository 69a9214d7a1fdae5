"""The facts of a model folder, from our manifest or from what others leave there; damage is named in one line."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from edge_runtime.errors import ModelFormatError
from edge_runtime.manifest import FORMAT_VERSION, MANIFEST_NAME, MODEL_NAME, Manifest, load_manifest
from edge_runtime.models.attention import longgen

WHOLE = Manifest(
    architecture="llama",
    context_length=2048,
    vocab_size=32_000,
    eos_token_ids=(2, 7),
    bos_token_id=1,
    weights="int4",
    group_size=128,
    num_parameters=1_000_000,
    source="folder",
    versions={"openvino": "2026.4.1"},
    attention=longgen(6, window=256, sink=64),
    hidden_layers=(1, 4),
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that looks like a model's."""
    (tmp_path / MODEL_NAME).write_text("<net/>")
    return tmp_path


def write(folder: Path, **files: object) -> Path:
    """Write JSON files by name without ending."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def changed(**changes: object) -> dict[str, object]:
    """Return the content of a manifest with changed entries."""
    return json.loads(json.dumps(asdict(WHOLE))) | changes


def assert_refused(folder: Path, told: str) -> None:
    with pytest.raises(ModelFormatError, match=told) as caught:
        load_manifest(folder)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_saved_manifest_is_read_back(folder):
    saved = WHOLE.save(folder)
    assert load_manifest(folder) == saved
    assert dataclasses.replace(saved, files={}) == WHOLE
    assert list(saved.files) == [MODEL_NAME]
    assert [path.name for path in sorted(folder.iterdir())] == [MANIFEST_NAME, MODEL_NAME]


def test_manifest_wins_over_config(folder):
    saved = WHOLE.save(folder)
    assert load_manifest(write(folder, config={"model_type": "gpt2", "vocab_size": 5})) == saved


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "\x00"])
def test_damaged_manifest_is_named(folder, content):
    assert_refused(write(folder, edge_model=content), MANIFEST_NAME)


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1, None, "1"])
def test_other_format_version_is_refused(folder, version):
    """An older edge-run must not guess at what a newer one means."""
    told = f"has format version {version}, but this edge-run reads version {FORMAT_VERSION}"
    assert_refused(write(folder, edge_model=changed(format_version=version)), told)


def test_unknown_entries_are_refused(folder):
    """One that changes the meaning of the others cannot be told from one that does not."""
    assert_refused(write(folder, edge_model=changed(window=5)), r"unknown entries \['window'\]")


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("context_length", "long"), ("context_length", -1), ("context_length", 0), ("vocab_size", [1]),
        ("eos_token_ids", 5), ("eos_token_ids", None), ("eos_token_ids", ["a"]), ("attention", [1]),
        ("hidden_layers", 1), ("hidden_layers", ["last"]), ("hidden_layers", [-1]),
        ("attention", {}), ("attention", {"block_size": 64, "patterns": [{"window": -1}], "layers": [0]}),
        ("attention", {"block_size": 64, "patterns": [{"windows": 64}], "layers": [0]}),
        ("attention", {"block_size": 64, "patterns": [{}], "layers": [0, 1]}),
        ("attention", {"block_size": 63, "patterns": [{}], "layers": [0]}),
        ("attention", {"block_size": 64, "patterns": [{"window": "a"}], "layers": [0]}),
        ("attention", {"block_size": 64, "patterns": [{"window": 64, "offsets": [True]}], "layers": [0]}),
        ("attention", {"block_size": 64, "patterns": 5, "layers": [0]}),
        ("files", [1]), ("files", 5), ("files", {MODEL_NAME: 5}), ("files", {MODEL_NAME: {"num_bytes": 1}}),
        ("files", {MODEL_NAME: {"num_bytes": "1", "sha256": ""}}), ("files", {"../x": {"num_bytes": 1, "sha256": ""}}),
        ("files", {MODEL_NAME: {"num_bytes": 1, "sha256": 5}}),
    ],
)  # fmt: skip
def test_entry_of_the_wrong_type_is_named(folder, entry, value):
    """A list for a number used to end in a TypeError."""
    assert_refused(write(folder, edge_model=changed(**{entry: value})), MANIFEST_NAME)


def test_folder_without_checksums_still_loads(folder):
    """As exports of before have it."""
    content = changed()
    del content["files"]
    assert load_manifest(write(folder, edge_model=content)) == WHOLE


def test_a_folder_that_is_rewritten_gets_new_checksums(folder):
    WHOLE.save(folder)
    before = load_manifest(folder)
    (folder / MODEL_NAME).write_text("<other/>")
    load_manifest(folder).save(folder)
    assert load_manifest(folder).files != before.files
    assert load_manifest(folder).files[MODEL_NAME].num_bytes == 8


@pytest.mark.parametrize("entry", ["architecture", "context_length", "vocab_size"])
def test_missing_entry_is_named(folder, entry):
    content = changed()
    del content[entry]
    assert_refused(write(folder, edge_model=content), entry)


def test_folder_without_manifest_is_read_from_its_config(folder):
    """As optimum-intel and the hub's OpenVINO organisation make them."""
    config = {"model_type": "llama", "max_position_embeddings": 256, "vocab_size": 105, "eos_token_id": 2}
    generation = {"bos_token_id": 1, "eos_token_id": [2, 3]}
    made = load_manifest(write(folder, config=config, generation_config=generation))
    assert (made.architecture, made.context_length, made.vocab_size) == ("llama", 256, 105)
    assert (made.eos_token_ids, made.bos_token_id) == ((2, 3), 1)


@pytest.mark.parametrize(
    ("config", "generation", "wanted"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": None}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": 5}, (5,)),
        ({"eos_token_id": [2, 4]}, {}, (2, 4)),
        ({"eos_token_id": 0}, {}, (0,)),
        ({"eos_token_id": 2, "text_config": {"eos_token_id": 3}}, {}, (3,)),
        ({"eos_token_id": 2, "text_config": {}}, {}, (2,)),
        ({"eos_token_id": 2, "text_config": None}, {}, (2,)),
        ({}, {}, ()),
    ],
)
def test_end_tokens_come_from_the_first_source_that_knows_them(folder, config, generation, wanted):
    """A null in generation_config.json used to hide the config's: answers then never ended."""
    assert load_manifest(write(folder, config=config, generation_config=generation)).eos_token_ids == wanted


@pytest.mark.parametrize(
    ("config", "context_length"),
    [
        ({"max_position_embeddings": 256}, 256),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        ({}, None),
    ],
)
def test_context_length_is_found_where_architectures_keep_it(folder, config, context_length):
    assert load_manifest(write(folder, config=config)).context_length == context_length


@pytest.mark.parametrize(
    "config", ["{", "[]", {"text_config": 5}, {"max_position_embeddings": "many"}, {"eos_token_id": "</s>"}]
)
def test_config_that_cannot_be_used_is_named(folder, config):
    assert_refused(write(folder, config=config), r"config\.json")


def test_folder_without_any_description_still_loads(folder):
    """The graph knows the rest."""
    assert load_manifest(folder).architecture == "unknown"


def test_missing_folder_and_folder_without_model_say_what_to_do(tmp_path):
    assert_refused(tmp_path / "nowhere", "does not exist")
    assert_refused(tmp_path, f"holds no {MODEL_NAME}")
