"""Weights in 8 or 4 bits, through NNCF, on the finished graph: the same path whatever the model came from.

int8 is one scale and zero point for each output channel. int4 has one for each group of `group_size` weights along the
input axis; embeddings and the last layer stay int8, where 4 bits cost the most quality. Without data the grid is fitted
to the weights alone; with a text, AWQ (Lin et al. 2023, arXiv 2306.00978) rescales channels by how large their
activations are, and scale estimation refines the grid against real activations.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import openvino as ov

WEIGHTS = ("fp32", "fp16", "int8", "int4")
CALIBRATION_WINDOW = 256
"""Tokens of one calibration sample."""
MAX_CALIBRATION_WINDOWS = 64
SMALLEST_GROUP = 8


def check_options(weights: str, group_size: int, *, symmetric: bool, calibrated: bool) -> None:
    """Raise ConfigError for a weight format that does not exist, or options that would have no effect on it."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights is {weights!r}, expected one of {', '.join(WEIGHTS)}")
    if group_size != -1 and group_size < SMALLEST_GROUP:
        raise ConfigError(f"group_size is {group_size}, expected at least {SMALLEST_GROUP}, or -1 for whole channels")
    if calibrated and weights != "int4":
        raise ConfigError(f"calibration_text was given with {weights} weights", "it serves int4: add --weights int4")
    if symmetric and weights not in ("int8", "int4"):
        raise ConfigError(f"symmetric was asked for with {weights} weights", "it serves int8 and int4")


def compress(
    model: ov.Model, weights: str, group_size: int, *, symmetric: bool = False, windows: Sequence[Sequence[int]] = ()
) -> ov.Model:
    """Return the model with int8 or int4 weights.

    Args:
        model: A stateful decoder; it is consumed.
        weights: `int8` or `int4`.
        group_size: Of int4 along the input axis; -1 for one group per output channel.
        symmetric: No zero points; what NPUs need.
        windows: Token ids of calibration samples; empty for a fit to the weights alone.

    Raises:
        ExportError: `group_size` does not divide a layer's input.
    """
    import nncf

    kind = "SYM" if symmetric else "ASYM"
    options: dict[str, Any] = {"mode": getattr(nncf.CompressWeightsMode, f"{weights.upper()}_{kind}")}
    if weights == "int4":
        options.update(group_size=group_size, ratio=1.0)
    if windows:
        dataset = nncf.Dataset(list(_samples(model, windows)))
        options.update(dataset=dataset, subset_size=len(windows), awq=True, scale_estimation=True)
    try:
        return nncf.compress_weights(model, **options)
    except nncf.InvalidGroupSizeError as error:
        raise _group_size_error(group_size, str(error)) from error


def halve(model: ov.Model) -> ov.Model:
    """Store the weight matrices in f16, in place, and return the model.

    OpenVINO's `compress_to_fp16` would round the rotary frequencies as well: at position 10,000 an angle is then wrong
    by a radian.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type().get_type_name() != "f32":
            continue
        users = node.output(0).get_target_inputs()
        is_matrix = sum(size > 1 for size in node.shape) > 1
        if is_matrix and any(user.get_node().get_type_name() in ("MatMul", "Gather") for user in users):
            widened = opset13.convert(opset13.constant(node.get_data().astype(np.float16)), "f32")
            for user in users:
                user.replace_source_output(widened.output(0))
    return model


def calibration_windows(token_ids: Sequence[int], context_length: int | None) -> list[list[int]]:
    """Cut a text into equal windows, spread over all of it.

    Raises:
        ConfigError: The text is shorter than one window.
    """
    width = min(CALIBRATION_WINDOW, context_length or CALIBRATION_WINDOW)
    count = len(token_ids) // width
    if count == 0:
        raise ConfigError(f"the calibration text has {len(token_ids)} tokens, expected at least {width}")
    chosen = np.linspace(0, count - 1, min(count, MAX_CALIBRATION_WINDOWS)).astype(int)
    return [list(token_ids[i * width : (i + 1) * width]) for i in chosen]


def _samples(model: ov.Model, windows: Sequence[Sequence[int]]) -> Iterable[dict[str, Any]]:
    names = {port.get_any_name() for port in model.inputs}
    for window in windows:
        width = len(window)
        sample = {
            "input_ids": np.array([window], np.int64),
            "attention_mask": np.ones((1, width), np.int64),
            "position_ids": np.arange(width, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        yield {name: value for name, value in sample.items() if name in names}


def _group_size_error(group_size: int, message: str) -> ExportError:
    """Turn NNCF's list of layers into one line: the first layer, and the largest power of two that fits all."""
    layers = [(name, int(size)) for name, size in re.findall(r'"(.+?)" \(channel size: (\d+)\)', message)]
    common = math.gcd(*(size for _, size in layers))
    fitting = min(common & -common, 1 << max(group_size, 1).bit_length() - 1)
    advice = f"--group-size {fitting}, or " if fitting >= SMALLEST_GROUP else ""
    name, size = layers[0][0].removeprefix("__module.").split("/aten")[0], layers[0][1]
    return ExportError(
        f"group_size {group_size} does not divide the {size} inputs of layer {name}",
        f"use {advice}--group-size -1 for whole channels",
    )
