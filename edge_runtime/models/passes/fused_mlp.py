"""Gated MLPs as one op of ours, CatsMlp, and back: the same mathematics in standard ops where the op has no kernel.

A model exported with fused MLPs holds only the op, whose blob has the quantised weights (ov_kernels/mlp_blob.py). A
device without the op, or a CPU on which OpenVINO's own kernels are faster, gets the model lowered: the same values and
thresholds, no skipped weights.

On CPU a trial on the user's own machine decides, unless the user does: neurons of the first layer's MLP alone, in both
forms in turn, on one token and on a short block. Its input is random, so that thresholds found on real activations
would skip another share of it; so the trial marks a fixed fraction of neurons as skipped: the one asked of the export.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13

import ov_kernels
from edge_runtime.models.compiling import compile_model
from edge_runtime.models.plan import CompilePlan
from ov_kernels.mlp_blob import BLOCK, HEADER, GatedMlp, Matrix, layout_of, pack, unpack

OP_TYPE = "CatsMlp"
FORMS = ("fused", "stock")
TRIAL_ROWS = (1, 4)
"""Tokens of a plain step and of one that verifies a short draft: what decoding does."""
TRIAL_RUNS = 4
TRIAL_BYTES = 12 << 20
"""Weights of a layer that are tried, at most: both forms' time grows with them, and so does that of loading."""
CLEARLY_FASTER = 0.8
"""Part of the fused form's time that OpenVINO's ops must not exceed. They hold every weight twice in memory of their
own, where the op reads the file's pages, and load longer: with 800 MB of MLPs 3.0 instead of 1.4 GB, and 2 s more."""
CACHES_BYTES = 64 << 20
"""More than the caches of a personal computer hold."""

_log = logging.getLogger(__name__)


def choose_mlps(model: openvino.Model, plan: CompilePlan) -> str | None:
    """Decide in which form a model's fused MLPs run, and bring them into it, in place; log which and why.

    Args:
        model: As read from its folder.
        plan: The form that was asked for, and what a trial is compiled with.

    Returns:
        What runs and why, for reports; None for a model without fused MLPs.
    """
    nodes = fused_mlps(model)
    if not nodes:
        return None
    for node in nodes:
        node.set_attribute("exact", plan.is_exact)
    if plan.device != "CPU":
        chosen, reason = "stock", f": {plan.device} has no kernel for fused MLPs"
    elif plan.mlp != "auto":
        chosen, reason = plan.mlp, ""
    else:
        chosen, reason = _faster_form(nodes, plan.properties, plan.sparsity)
    _log.log(logging.INFO if plan.device == "CPU" else logging.WARNING, "fused MLPs run %s%s", chosen, reason)
    if chosen == "stock":
        lower(model)
    return chosen + reason


def fused_mlps(model: openvino.Model) -> list[Any]:
    """Return a model's CatsMlp nodes, in order."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() == OP_TYPE]


def lower(model: openvino.Model) -> None:
    """Replace every CatsMlp by standard ops, in place."""
    for node in fused_mlps(model):
        x, blob, thresholds = (node.input_value(i) for i in range(3))
        y = standard_ops(unpack(blob.get_node().data), x, thresholds.get_node().data)
        y.get_node().set_friendly_name(node.get_friendly_name())
        node.output(0).replace(y)


def standard_ops(mlp: GatedMlp, x: Any, thresholds: NDArray[np.float32]) -> Any:
    """Return the output of an MLP in OpenVINO's own ops.

    Args:
        mlp: Its weights.
        x: Output of f32 [.., H].
        thresholds: (1,) or (F,); dead where |f(gate)| is at most that.
    """
    a = _activated(opset13.matmul(x, weights(mlp.gate), False, True), mlp.activation)
    if (thresholds >= 0).any():
        is_dead = opset13.less_equal(opset13.absolute(a), opset13.constant(np.array(thresholds)))
        a = opset13.select(is_dead, opset13.constant(np.float32(0)), a)
    up = opset13.matmul(x, weights(mlp.up), False, True)
    return opset13.matmul(opset13.multiply(a, up), weights(mlp.down), False, True).output(0)


def weights(matrix: Matrix) -> Any:
    """Return a matrix as compressed constants in the form that OpenVINO's plugins multiply without unpacking."""
    if matrix.scale is None or matrix.zero is None:
        values = np.ascontiguousarray(matrix.values)
        return opset13.convert(_constant(values, openvino.Type.bf16, values.shape), "f32")
    (rows, columns), groups = matrix.values.shape, matrix.scale.shape[1]
    grouped = (rows, columns) if groups == 1 else (rows, groups, columns // groups)
    one = (*grouped[:-1], 1)
    whole = opset13.convert(_integers(matrix, grouped), "f16")
    if not _is_symmetric(matrix):
        zero = np.ascontiguousarray(matrix.zero).view(np.uint8) ^ (128 if matrix.format == "i8" else 0)
        whole = opset13.subtract(whole, opset13.convert(opset13.constant(zero.reshape(one)), "f16"))
    whole = opset13.multiply(whole, opset13.constant(np.ascontiguousarray(matrix.scale).reshape(one)))
    if groups > 1:
        whole = opset13.reshape(whole, np.array([rows, columns]), False)
    return opset13.convert(whole, "f32")


def _integers(matrix: Matrix, shape: tuple[int, ...]) -> Any:
    """Return the values as the exporter had them: signed where no zero point does anything, which NPUs need."""
    is_symmetric = _is_symmetric(matrix)
    if matrix.format == "i8":
        values = matrix.values if is_symmetric else np.ascontiguousarray(matrix.values).view(np.uint8) ^ 128
        return opset13.constant(np.ascontiguousarray(values).reshape(shape))
    pairs = np.ascontiguousarray(matrix.values).reshape(-1, 2)
    packed = pairs[:, 0] | pairs[:, 1] << 4
    if is_symmetric:
        return _constant(packed ^ 0x88, openvino.Type.i4, shape)
    return _constant(packed, openvino.Type.u4, shape)


def _is_symmetric(matrix: Matrix) -> bool:
    return bool(np.all(matrix.zero == (0 if matrix.format == "i8" else 8)))


def _constant(content: NDArray[Any], kind: openvino.Type, shape: tuple[int, ...]) -> Any:
    tensor = openvino.Tensor(kind, openvino.Shape(shape))
    np.copyto(tensor.data.reshape(-1).view(np.uint8), content.reshape(-1).view(np.uint8))
    return openvino.op.Constant(tensor)


def _activated(x: Any, activation: str) -> Any:
    if activation == "silu":
        return opset13.swish(x)
    return opset13.gelu(x, "tanh" if activation == "gelu_tanh" else "erf")


def _faster_form(nodes: list[Any], properties: dict[str, Any], sparsity: float) -> tuple[str, str]:
    """Time the first layer's MLP in both forms; return the one to run, and the figures."""
    shared = {name: value for name, value in properties.items() if name not in ("CACHE_DIR", "KV_CACHE_PRECISION")}
    sample, thresholds = _first_neurons(nodes[0])
    neurons = len(sample.gate.values)
    alone = {"fused": _fused_alone(nodes[0], sample), "stock": _stock_alone(sample, thresholds)}
    requests = {name: compile_model(alone[name], "CPU", shared).create_infer_request() for name in FORMS}
    settle = _cache_filler([node.input_value(1).get_node().data for node in nodes])
    spent: dict[str, list[float]] = {name: [] for name in FORMS}
    for rows in TRIAL_ROWS:
        # A neuron is skipped where all tokens leave it dead: by chance, with tokens that have nothing in common.
        requests["fused"].set_input_tensor(1, openvino.Tensor(_thresholds(neurons, sparsity**rows)))
        for name, ms in _trial(requests, rows, settle).items():
            spent[name].append(ms)
    chosen = "stock" if sum(spent["stock"]) < CLEARLY_FASTER * sum(spent["fused"]) else "fused"
    fused, stock = (" and ".join(f"{ms:.2f}" for ms in spent[name]) for name in FORMS)
    tokens = " and ".join(map(str, TRIAL_ROWS))
    return chosen, f": {tokens} tokens take {neurons} neurons of a layer {fused} ms fused, {stock} ms in OpenVINO's ops"


def _trial(requests: dict[str, Any], rows: int, settle: Callable[[], object]) -> dict[str, float]:
    """Run both forms in turn on the same tokens; return the ms of each, undisturbed.

    That is the least: what else a computer does only adds to a run, and a choice holds until the model is loaded again.
    Beside two other programs on one core the ratio of the forms' medians went from 0.16 to 22 in 7 trials, that of
    their least from 0.74 to 0.80 in 5 (int8, 1024 to 4096, half dead, 1 token).
    """
    hidden = requests["fused"].model_inputs[0].get_partial_shape()[2].get_length()
    x = openvino.Tensor(np.random.default_rng(0).standard_normal((1, rows, hidden), dtype=np.float32))
    times: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(1 + TRIAL_RUNS):
        for name, request in requests.items():
            request.set_input_tensor(0, x)
            settle()
            begin = time.perf_counter()
            request.start_async()
            request.wait()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: min(values[1:]) for name, values in times.items()}  # the first prepares the plugin


def _cache_filler(blobs: list[NDArray[np.uint8]]) -> Callable[[], object]:
    """Return what to call before each timed run of the first layer: it reads others if those would clear the caches.

    Args:
        blobs: Each layer's MLP.
    """
    if sum(blob.nbytes for blob in blobs) <= CACHES_BYTES:
        return lambda: None
    parts, left = [], CACHES_BYTES
    for blob in blobs[1:] or blobs:
        parts.append(blob[: min(left, blob.nbytes) // 8 * 8].view(np.uint64))
        left = max(0, left - blob.nbytes)
    return lambda: [part.max(initial=0) for part in parts]


def _first_neurons(node: Any) -> tuple[GatedMlp, NDArray[np.float32]]:
    """Return the first of a layer's neurons, TRIAL_BYTES of them, and their thresholds."""
    blob, thresholds = (node.input_value(i).get_node().data for i in (1, 2))
    all_of_them = HEADER.unpack_from(blob)[5]
    count = min(all_of_them, max(1, TRIAL_BYTES * all_of_them // blob.nbytes // BLOCK) * BLOCK)
    return unpack(blob, count), thresholds[:count]


def _thresholds(neurons: int, share: float) -> NDArray[np.float32]:
    """Return thresholds (F,) that kill this share of the neurons whatever comes in, evenly spread."""
    is_dead = np.diff(np.floor(share * np.arange(neurons + 1))) > 0
    return np.where(is_dead, np.inf, -1).astype(np.float32)


def _stock_alone(mlp: GatedMlp, thresholds: NDArray[np.float32]) -> openvino.Model:
    x = _input(mlp)
    return openvino.Model([standard_ops(mlp, x.output(0), thresholds)], [x])


def _fused_alone(node: Any, mlp: GatedMlp) -> openvino.Model:
    """Return a model of the op alone, as `node` has it; its second input is the thresholds."""
    x, limits = _input(mlp), opset13.parameter([-1], np.float32)
    blob = opset13.constant(pack(mlp, layout_of(node.input_value(1).get_node().data)), shared_memory=True)
    op = ov_kernels.create(OP_TYPE, [x.output(0), blob.output(0), limits.output(0)], dict(node.get_attributes()))
    return openvino.Model([op.output(0)], [x, limits])


def _input(mlp: GatedMlp) -> Any:
    return opset13.parameter([1, -1, mlp.gate.values.shape[1]], np.float32)
