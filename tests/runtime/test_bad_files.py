"""Damaged and foreign files end in one line that names the file: never a crash, never an error of OpenVINO's own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from openvino import opset6, opset13

from edge_runtime.api import EdgeLLM
from edge_runtime.errors import ConfigError, DeviceError, ModelFormatError, ModelPairError
from edge_runtime.manifest import MANIFEST_NAME, MODEL_NAME

WEIGHTS_NAME = "openvino_model.bin"
Damage = Callable[[Path], object]


@pytest.fixture
def copy(tiny_ir, tmp_path) -> Path:
    """A model folder to damage, without checksums, so that OpenVINO is what meets the damage."""
    folder = Path(shutil.copytree(tiny_ir("llama"), tmp_path / "model"))
    content = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    content.pop("files", None)
    (folder / MANIFEST_NAME).write_text(json.dumps(content), encoding="utf-8")
    return folder


def refused(folder: Path, kind: type[Exception] = ModelFormatError) -> str:
    """Return the one line that loading ends in."""
    with pytest.raises(kind) as caught:
        EdgeLLM.load(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    return message


def replace(name: str, change: Callable[[bytes], bytes]) -> Damage:
    """Return a damage: a file's content changed by a function."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


WEIGHT_DAMAGE: dict[str, Damage] = {
    "half": replace(WEIGHTS_NAME, lambda content: content[: len(content) // 2]),
    "one byte short": replace(WEIGHTS_NAME, lambda content: content[:-1]),
    "empty": replace(WEIGHTS_NAME, lambda content: b""),
    "missing": lambda folder: (folder / WEIGHTS_NAME).unlink(),
}
GRAPH_DAMAGE: dict[str, Damage] = {
    "half": replace(MODEL_NAME, lambda content: content[: len(content) // 2]),
    "empty": replace(MODEL_NAME, lambda content: b""),
    "a web page": replace(MODEL_NAME, lambda content: b"<html><body>404 not found</body></html>"),
    "binary": replace(MODEL_NAME, lambda content: bytes(range(256)) * 20),
    "no layers": replace(MODEL_NAME, lambda content: b'<?xml version="1.0"?><net name="x" version="11"></net>'),
    "unknown op": replace(MODEL_NAME, lambda content: content.replace(b'type="MatMul"', b'type="NoSuchOp"', 1)),
    "offset too large": replace(MODEL_NAME, lambda content: content.replace(b'offset="', b'offset="9999999', 3)),
    "negative offset": replace(MODEL_NAME, lambda content: content.replace(b'offset="', b'offset="-', 3)),
}


@pytest.mark.parametrize("damage", WEIGHT_DAMAGE.values(), ids=WEIGHT_DAMAGE)
def test_damaged_weights_are_named(copy, damage):
    """An interrupted download or copy."""
    damage(copy)
    assert "openvino_model." in refused(copy)


@pytest.mark.parametrize("damage", GRAPH_DAMAGE.values(), ids=GRAPH_DAMAGE)
def test_damaged_graph_is_named(copy, damage):
    damage(copy)
    assert any(named in refused(copy) for named in (MODEL_NAME, "no KV-cache states"))


def save(folder: Path, model: ov.Model) -> None:
    """Put another graph into a model folder."""
    for name in (MODEL_NAME, WEIGHTS_NAME):
        (folder / name).unlink()
    ov.save_model(model, folder / MODEL_NAME, compress_to_fp16=False)
    (folder / WEIGHTS_NAME).touch()


def test_model_without_states_is_told_from_a_decoder(copy):
    """An encoder, or a decoder exported without its cache."""
    ids = opset13.parameter([-1, -1], np.int64, name="input_ids")
    save(copy, ov.Model([opset13.convert(ids, "f32")], [ids]))
    assert "no KV-cache states" in refused(copy)


def test_model_with_states_but_no_attention_is_refused(copy):
    """A recurrent network."""
    row = opset13.parameter([-1, 4], np.float32, name="input_ids")
    total = opset13.add(opset6.read_value(row, "state"), row)
    result = opset13.result(total)
    save(copy, ov.Model([result], [opset6.assign(total, "state")], [row]))
    assert "PagedAttention" in refused(copy)


def test_decoder_without_logits_is_refused(copy):
    """A feature extractor: its output is hidden states. OpenVINO's own error names a source file."""
    model = ov.Core().read_model(copy / MODEL_NAME)
    model.output(0).set_names({"last_hidden_state"})
    other = copy.parent / "other"
    shutil.copytree(copy, other)
    save(other, model)
    assert "no output `logits`" in refused(other)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"not json"])
def test_missing_or_damaged_tokenizer_is_named(copy, content):
    """It is read in another thread, whose errors must come out here."""
    path = copy / "tokenizer.json"
    path.unlink() if content is None else path.write_bytes(content)
    assert "tokenizer.json" in refused(copy)


def test_folder_is_named_that_holds_no_model(tmp_path):
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert f"holds no {MODEL_NAME}" in refused(tmp_path)


def test_damaged_draft_is_named_as_the_draft(tiny_ir, copy):
    (copy / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(ModelFormatError, match=re.escape(str(copy / MODEL_NAME))):
        EdgeLLM.load(tiny_ir("llama"), draft=copy)


def test_draft_of_another_vocabulary_is_refused(tiny_ir, copy):
    """The first token that differs is named."""
    content = json.loads((copy / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    names = {token_id: token for token, token_id in vocab.items()}
    vocab[names[301]], vocab[names[300]] = 300, 301
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelPairError, match="token 300 is") as caught:
        EdgeLLM.load(tiny_ir("llama"), draft=copy)
    assert f"{names[300]!r} for the target and {names[301]!r} for the draft" in str(caught.value)


def test_model_that_optimum_made_needs_no_manifest(copy):
    (copy / MANIFEST_NAME).unlink()
    llm = EdgeLLM.load(copy)
    assert llm.manifest.architecture == "llama"
    assert llm.generate("Once", max_new_tokens=3).token_ids


def test_absent_device_lists_those_present(tiny_ir):
    with pytest.raises(DeviceError, match="device `TPU` is not on this machine") as caught:
        EdgeLLM.load(tiny_ir("llama"), device="TPU")
    assert "CPU" in caught.value.hint


def test_unknown_load_option_suggests_the_nearest(tiny_ir):
    with pytest.raises(ConfigError, match="unknown option `kv_precison`") as caught:
        EdgeLLM.load(tiny_ir("llama"), kv_precison="u8")
    assert caught.value.hint == "did you mean `kv_precision`?"


def test_a_process_ends_in_order_when_loading_fails_early(copy):
    """The tokenizer was still being read in a daemon thread, and the interpreter's end aborted the process."""
    replace(MODEL_NAME, lambda content: content[:5000])(copy)
    source = f"""
import edge_runtime.api as api
read = api._load_tokenizer
def read_for_long(folder, draft):
    for _ in range(100):
        tokenizer = read(folder, draft)
    return tokenizer
api._load_tokenizer = read_for_long
try:
    api.EdgeLLM.load({str(copy)!r})
except Exception:
    raise SystemExit(3)
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", source], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (3, "")
