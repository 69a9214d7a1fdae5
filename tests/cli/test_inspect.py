"""`edge-run inspect`: facts that a person can check by hand, and a picture of what the layers see."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edge_runtime.manifest import load_manifest
from edge_runtime.models.attention import longgen, s2


@pytest.fixture
def hybrid(copy_of):
    """A model of two layers and two KV heads of 16, one layer of them strided."""
    folder = copy_of()
    pattern = s2(2, 2, window=16, stride=2, dense_every=2, block_size=16)
    dataclasses.replace(load_manifest(folder), attention=pattern, context_length=1024).save(folder)
    return folder


def test_keys_and_values_are_counted(edge_run, hybrid):
    """Layer 0 holds the last block and half of the 63 before it, layer 1 all; 2 heads, 32 numbers a token and head."""
    report = edge_run("inspect", hybrid, "--json").json
    last = report["kv_bytes"][-1]
    assert last["tokens"] == 1024
    assert last["bytes_if_full"] == 2 * 2 * 32 * 1024
    assert last["bytes"] == 32 * (2 * 1024 + 16 * (2 * 1 + 32 + 31))
    assert report["num_layers"] == report["num_kv_heads"] == 2


def test_it_reads_as_words(edge_run, hybrid):
    out = edge_run("inspect", hybrid).out
    assert "the last 16 tokens, 1 KV block in 2 (2 different shards): layers 0\n" in out
    assert "all tokens: layers 1\n" in out
    assert "1,024" in out
    assert "of full attention" in out


def test_the_embedded_model_is_the_default(edge_run):
    out = edge_run("inspect").out
    assert "all tokens: layers 0-5" in out
    assert "of full attention" not in out


def test_the_picture_is_drawn(edge_run, hybrid, tmp_path):
    pytest.importorskip("matplotlib")
    done = edge_run("inspect", hybrid, "--plot", tmp_path / "seen.png")
    assert done.err == f"plotted: {tmp_path / 'seen.png'}\n"
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_verify_finds_every_mutated_file(edge_run, hybrid):
    """All of them, each named; without --verify, sizes alone are looked at."""
    assert "all files are as they were exported" in edge_run("inspect", hybrid, "--verify").out
    assert edge_run("inspect", hybrid, "--verify", "--json").json["checksums"] == "verified"
    for name in ("openvino_model.bin", "openvino_model.xml"):
        content = bytearray((hybrid / name).read_bytes())
        content[len(content) // 2] ^= 1
        (hybrid / name).write_bytes(content)
    assert edge_run("inspect", hybrid, "--json").json["checksums"] == "kept"
    done = edge_run("inspect", hybrid, "--verify")
    assert (done.code, done.out) == (1, "")
    assert "openvino_model.xml`, `" in done.err
    assert "openvino_model.bin`: the SHA-256 is not" in done.err


def test_folder_without_checksums_is_said_to_have_none(edge_run, hybrid):
    content = json.loads((hybrid / "edge_model.json").read_text(encoding="utf-8"))
    del content["files"]
    (hybrid / "edge_model.json").write_text(json.dumps(content), encoding="utf-8")
    assert "checksums     none\n" in edge_run("inspect", hybrid).out
    done = edge_run("inspect", hybrid, "--verify")
    assert (done.code, done.out) == (1, "")
    assert "has no checksums" in done.err


def test_plot_is_never_drawn_over_what_is_read(edge_run, hybrid):
    done = edge_run("inspect", hybrid, "--plot", hybrid / "seen.png")
    assert (done.code, done.out) == (2, "")
    assert "lies in the model" in done.err
    assert not (hybrid / "seen.png").exists()


def test_labels_of_many_layers_are_few_enough_to_read(tmp_path):
    pytest.importorskip("matplotlib")
    from edge_runtime.bench.attention_plot import save_pattern_plot
    from edge_runtime.models.attention import FULL, AttentionPattern

    save_pattern_plot(AttentionPattern.of_layers([FULL] * 30), 4, 4, 3000, tmp_path / "seen.svg")
    text = (tmp_path / "seen.svg").read_text()
    assert text.count('id="ytick_') == 15


@pytest.mark.parametrize("pattern", [longgen(6, window=128), longgen(4, num_full=0, window=64), s2(3, 4, stride=12)])
def test_every_pattern_can_be_drawn(pattern, tmp_path):
    pytest.importorskip("matplotlib")
    from edge_runtime.bench.attention_plot import save_pattern_plot

    save_pattern_plot(pattern, 4, 4, 3000, tmp_path / "seen.svg")
    assert (tmp_path / "seen.svg").read_text().startswith("<?xml")


def test_a_folder_without_layer_sizes_is_named(edge_run, hybrid):
    (hybrid / "config.json").write_text("{}")
    failed = edge_run("inspect", hybrid)
    assert failed.code == 1
    assert "config.json` has no 'num_hidden_layers'" in failed.err


def test_turn_ends_are_shown(edge_run, hybrid):
    """A chat that runs on into the next turn is explained by what is missing here."""
    assert "turn ends     <|end|> (0)\n" in edge_run("inspect", hybrid).out
    assert edge_run("inspect", hybrid, "--json").json["turn_ends"] == [{"id": 0, "token": "<|end|>"}]


def test_a_model_without_turn_ends_and_one_without_tokenizer_are_shown(edge_run, hybrid):
    manifest = load_manifest(hybrid)
    (hybrid / "tokenizer.json").unlink()
    manifest.save(hybrid)
    assert "turn ends     token 0\n" in edge_run("inspect", hybrid).out
    dataclasses.replace(load_manifest(hybrid), eos_token_ids=()).save(hybrid)
    assert "turn ends     none: every answer runs to its length limit\n" in edge_run("inspect", hybrid).out
    assert edge_run("inspect", hybrid, "--json").json["turn_ends"] == []
