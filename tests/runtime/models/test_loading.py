"""From a folder to a compiled model: what the plan asks for is what the graph returns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edge_runtime import models
from edge_runtime.config import LoadConfig
from edge_runtime.devices import core
from edge_runtime.errors import DeviceError, ModelFormatError
from edge_runtime.manifest import MODEL_NAME, load_manifest
from edge_runtime.models.base import Output, Span
from edge_runtime.models.loading import load_model
from edge_runtime.models.passes.wanted_rows import last_product

IDS = np.random.default_rng(0).integers(3, 300, 20).tolist()


def load(folder: Path, layers: tuple[int, ...] = (), **options: Any) -> Any:
    manifest = dataclasses.replace(load_manifest(folder), hidden_layers=layers)
    return load_model(folder, manifest, LoadConfig(**{"precision": "f32", **options}), wants_hidden=True)


def run(model: Any, *parts: list[int], num_rows: int) -> Output:
    """Feed parts to a new sequence; return the logits and hidden states of the last part's last rows."""
    sequence = model.sequence()
    for part in parts:
        (output,) = model.forward([Span(sequence, part, num_rows if part is parts[-1] else 1)])
    return Output(*(rows.copy() for rows in output if rows is not None))


def output_matrix(folder: Path) -> np.ndarray:
    """Return the matrix (V, E) that gives the logits."""
    product = last_product(core().read_model(folder / MODEL_NAME))
    return core().compile_model(ov.Model([product.input_value(1)], []), "CPU", {})({})[0]


def torch_states(folder: Path) -> list[np.ndarray]:
    """Return what enters the first layer, comes out of each of the others, and out of the last norm; each (T, E)."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        with torch.no_grad():
            states = model(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


@pytest.mark.parametrize("attention", ["stock", "block_sparse"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3", "gpt2"])
def test_hidden_rows_are_what_the_logits_come_from(tiny_ir, tiny_hf, family, attention):
    """And, after them, what a layer hands on to the next, as transformers computes it."""
    model = load(tiny_ir(family), (0,), attention=attention)
    logits, hidden = run(model, IDS[:10], IDS[10:], num_rows=4)
    last, first_layer = np.split(hidden, 2, axis=-1)
    np.testing.assert_allclose(last @ output_matrix(tiny_ir(family)).T, logits, atol=1e-4)
    states = torch_states(tiny_hf(family))
    np.testing.assert_allclose(last, states[-1][-4:], atol=1e-4)
    np.testing.assert_allclose(first_layer, states[1][-4:], atol=1e-4)


def test_hidden_rows_change_no_logits(tiny_ir):
    folder = tiny_ir("llama")
    plain = load_model(folder, load_manifest(folder), LoadConfig(precision="f32"))
    logits, hidden = run(plain, IDS, num_rows=3)
    np.testing.assert_array_equal(logits, run(load(folder, (1, 0)), IDS, num_rows=3).logits)
    assert hidden is None


def test_spans_of_one_forward_get_their_own_hidden_rows(tiny_ir):
    model = load(tiny_ir("llama"), (0,))
    parts = [IDS[:7], IDS[5:6], IDS[3:]]
    together = model.forward([Span(model.sequence(), part, min(2, len(part))) for part in parts])
    hidden = [output.hidden.copy() for output in together]
    for part, rows in zip(parts, hidden, strict=True):
        np.testing.assert_allclose(rows, run(model, part, num_rows=min(2, len(part))).hidden, atol=1e-5)


def test_the_last_layer_is_before_the_last_norm(tiny_ir):
    """transformers shows it only after that norm; RMS norm is its direction, scaled by a weight for each number."""
    model = load(tiny_ir("llama"), (1,))
    last, stream = np.split(run(model, IDS, num_rows=5).hidden, 2, axis=-1)
    ratio = last / (stream / np.sqrt((stream**2).mean(axis=-1, keepdims=True)))
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), rtol=1e-3)


def test_layers_that_the_model_lacks_are_refused(tiny_ir):
    with pytest.raises(ModelFormatError, match="hidden_layers names layer 2, but the model has layers 0 to 1"):
        load(tiny_ir("llama"), (2,))


def test_the_npu_returns_no_hidden_states(tiny_ir, monkeypatch):
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")
    with pytest.raises(DeviceError, match="NPU returns no hidden states"):
        load(tiny_ir("llama"), device="NPU", precision="auto")


def test_options_are_resolved_in_the_plan_alone():
    """Passes, caches and models that read them again could come to another result than the report."""
    folder = Path(models.__file__).parent
    allowed = {"plan.py", "loading.py"}
    for path in folder.rglob("*.py"):
        assert path.name in allowed or "edge_runtime.config" not in path.read_text(encoding="utf-8"), path
