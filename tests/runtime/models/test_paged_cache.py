"""The paged KV cache: rolling back leaves no trace, growing keeps what is held, whatever the storage type."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_export.convert import export_model
from edge_runtime.config import LoadConfig
from edge_runtime.errors import ContextOverflowError, DeviceError
from edge_runtime.manifest import load_manifest
from edge_runtime.models.base import Span, advance
from edge_runtime.models.loading import load_model, read_model
from edge_runtime.models.paged import PagedModel
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import weights_of

PROMPT = [int(token_id) for token_id in np.random.default_rng(7).integers(3, 300, 40)]


def load(folder, **options) -> PagedModel:
    return load_model(folder, load_manifest(folder), LoadConfig(**options))


@pytest.mark.parametrize("kv_precision", ["f32", "f16", "u8", "u4"])
def test_a_rejected_draft_leaves_no_trace(tiny_ir, kv_precision):
    """By channel, the plugin's default for u8 and u4, rejected tokens changed the scale of the keys before them."""
    model = load(tiny_ir("llama"), precision="f32", kv_precision=kv_precision, prefix_cache_bytes=0)
    plain, drafted = model.sequence(), model.sequence()
    advance(model, plain, PROMPT)
    clean = advance(model, plain, [5]).copy()
    advance(model, drafted, PROMPT)
    advance(model, drafted, [200, 201, 202, 203, 204, 205, 206, 207], 8)
    assert drafted.rollback(len(PROMPT)) == len(PROMPT)
    assert np.array_equal(advance(model, drafted, [5]), clean)


@pytest.mark.parametrize("kv_precision", ["f32", "u8", "u4"])
def test_growing_keeps_what_is_held(tiny_ir, kv_precision):
    grown, roomy = (load(tiny_ir("llama"), precision="f32", kv_precision=kv_precision) for _ in range(2))
    last = []
    for model in (grown, roomy):
        sequence = model.sequence()
        sequence.reserve(400 if model is roomy else 0)
        for begin in range(0, len(PROMPT) * 4, 10):
            rows = advance(model, sequence, (PROMPT * 4)[begin : begin + 10])
        last.append(rows.copy())
    assert grown.kv_bytes < roomy.kv_bytes
    assert np.array_equal(*last)


def test_only_wanted_rows_are_computed(tiny_ir):
    model = load(tiny_ir("llama"), precision="f32")
    all_rows = advance(model, model.sequence(), PROMPT, len(PROMPT)).copy()
    last = advance(model, model.sequence(), PROMPT, 3)
    assert last.shape == (3, model.vocab_size)
    np.testing.assert_allclose(last, all_rows[-3:], atol=1e-4)


def test_what_does_not_fit_the_context_is_refused_whole(tiny_ir):
    """Nothing of the step is computed, its other sequences stay as they were too."""
    model = load(tiny_ir("llama"), precision="f32", context_length=64)
    long, short = model.sequence(), model.sequence()
    advance(model, long, PROMPT)
    advance(model, short, PROMPT[:3])
    with pytest.raises(ContextOverflowError, match="65 tokens do not fit the model's context of 64"):
        model.forward([Span(short, [5]), Span(long, [5] * 25)])
    assert (long.num_tokens, short.num_tokens) == (40, 3)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "f32", "kv_precision": "bf16"}, "kv_precision=bf16"),
        ({"precision": "f16"}, "cannot compute in f16"),
    ],
)
def test_a_precision_that_the_device_lacks_is_refused(tiny_ir, options, told):
    """The plugin runs f16 as another precision on CPUs without it, and says nothing."""
    with pytest.raises(DeviceError, match=told):
        load(tiny_ir("llama"), **options)


@pytest.mark.parametrize("symmetric", [False, True])
def test_activations_share_scales_over_the_weights_groups(tiny_hf, tmp_path, symmetric):
    """Zero points of asymmetric int4 weights were taken for weights in groups of one: decoding took twice as long."""
    export_model(tiny_hf("llama"), tmp_path / "int4", weights="int4", group_size=32, symmetric=symmetric)
    model, size = read_model(tmp_path / "int4")
    weights = weights_of(model, size)
    assert (weights.kind, weights.group_size, weights.has_floats) == ("int4", 32, False)
    groups = [
        make_plan("CPU", config, given).properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
        for config, given in (
            (LoadConfig(), weights),
            (LoadConfig(), dataclasses.replace(weights, group_size=None)),
            (LoadConfig(precision="f32"), weights),
        )
    ]
    assert groups == [32, 128, 0]
