"""Weights in 16, 8 or 4 bits, the latter through NNCF, on the finished graph: one path whatever the model came from.

int8 is one scale and zero point for each output channel. int4 has one for each group of `group_size` weights along the
input axis; embeddings and the last layer get int8, where 4 bits cost the most quality.

Without data the grid is fitted to the weights alone. With a text it is fitted to what the layers compute on it:

- `gptq` rounds column by column and lets later columns make up for the error (Frantar et al. 2022, arXiv 2210.17323).
- `awq` rescales channels by the size of their activations (Lin et al. 2023, arXiv 2306.00978) and refines the scales.

Measured on a Llama of 0.9 M parameters trained on TinyStories, KL to f32 on held-out text: groups of 32, without data
0.043, awq 0.051, gptq 0.019; whole channels 0.088, 0.061, 0.030. gptq is the default for that. It takes 4 times as
long: 133 s against 31 s for 76 M parameters on two shared cores.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_export.cats import GROUP as FUSED_GROUP
from edge_runtime.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import openvino as ov

WEIGHTS = ("fp32", "fp16", "bf16", "int8", "int4")
SPELLINGS = {"f32": "fp32", "f16": "fp16"}
"""What users write, as in every other option, and what a manifest has."""
SIXTEEN_BITS = ("fp16", "bf16")
CALIBRATION_METHODS: dict[str, dict[str, bool]] = {
    "gptq": {"gptq": True},
    "awq": {"awq": True, "scale_estimation": True},
}
CALIBRATION_WINDOW = 128
"""Tokens of one calibration sample."""
MAX_CALIBRATION_WINDOWS = 64
LARGEST_GROUP, SMALLEST_GROUP = 128, 8
"""Weights that share a scale where nobody says how many: the most that fits, for size, and the least that is tried."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How weights are to be stored.

    Attributes:
        weights: `fp32`, `fp16`, `bf16`, `int8` or `int4`.
        group_size: Weights along the input axis that share a scale, with int4; -1 for whole output channels, None for
            the most up to LARGEST_GROUP that fits every layer.
        symmetric: No zero points in int8 and int4.
        calibration_method: `gptq` or `awq`, with int4 and a calibration text.
    """

    weights: str = "int8"
    group_size: int | None = None
    symmetric: bool = False
    calibration_method: str = "gptq"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights is {self.weights!r}, expected f32, f16, bf16, int8 or int4")
        if self.group_size not in (None, -1) and self.group_size < SMALLEST_GROUP:
            raise ConfigError(
                f"group_size is {self.group_size}, expected at least {SMALLEST_GROUP}, or -1 for whole channels"
            )
        if self.symmetric and self.weights not in ("int8", "int4"):
            raise ConfigError(f"symmetric has no effect on {self.weights} weights", "use it with int8 or int4 weights")
        if self.calibration_method not in CALIBRATION_METHODS:
            raise ConfigError(
                f"calibration_method is {self.calibration_method!r}, expected {' or '.join(CALIBRATION_METHODS)}"
            )


def check_groups(form: WeightFormat, config: dict[str, Any], *, is_fused: bool) -> None:
    """Refuse groups of int4 weights that the sizes in a config.json rule out, and name groups that fit.

    Args:
        form: The format.
        config: Content of config.json; sizes that it leaves out are not looked at.
        is_fused: Whether MLPs are to be fused.

    Raises:
        ConfigError: Fused MLPs cannot have such groups, or int4 at all.
        ExportError: The group size does not divide a layer's inputs.
    """
    if form.weights != "int4":
        return
    sizes = _sizes_of(config)
    if is_fused:
        for name, size in sizes.items():
            if size % FUSED_GROUP:
                raise ConfigError(
                    f"fused MLPs in int4 need multiples of {FUSED_GROUP} as sizes, but the model's {name} is {size}",
                    "use --weights int8, or leave out --mlp fused",
                )
        if form.group_size not in (None, -1) and form.group_size % FUSED_GROUP:
            raise ConfigError(
                f"group_size is {form.group_size}, but fused MLPs need a multiple of {FUSED_GROUP}, or -1",
                f"use --group-size {FUSED_GROUP}, or export without --mlp fused",
            )
    for name, size in sizes.items():
        if form.group_size not in (None, -1) and size % form.group_size:
            raise ExportError(
                f"group_size {form.group_size} does not divide {name}, which is {size}",
                _group_advice(sizes.values(), is_fused=is_fused),
            )


def with_group(model: ov.Model, form: WeightFormat, *, is_fused: bool) -> WeightFormat:
    """Return the format with the group size that fits all layers of a graph, where it is left open."""
    if form.weights != "int4" or form.group_size is not None:
        return form
    return dataclasses.replace(form, group_size=fitting_group(_row_sizes(model), is_fused=is_fused))


def fitting_group(sizes: Iterable[int], *, is_fused: bool) -> int:
    """Return the largest power of two up to LARGEST_GROUP that divides all sizes; -1 where the format has none."""
    common = math.gcd(*sizes)
    group = min(common & -common, LARGEST_GROUP)
    return group if group >= (FUSED_GROUP if is_fused else SMALLEST_GROUP) else -1


def _sizes_of(config: dict[str, Any]) -> dict[str, int]:
    """Return the lengths of weight rows that a config.json states; of a mixture of experts, no MLP's."""
    text = config.get("text_config") or config
    has_experts = any("expert" in name for name in text)
    names = ("hidden_size", "n_embd") if has_experts else ("hidden_size", "n_embd", "intermediate_size", "n_inner")
    return {name: text[name] for name in names if isinstance(text.get(name), int)}


def _row_sizes(model: ov.Model) -> list[int]:
    """Return the lengths of the weight rows of all matrix products."""
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    shapes = [(node.input_value(1), node.get_attributes()["transpose_b"]) for node in products if _has_weights(node)]
    return [weights.get_partial_shape()[-1 if is_transposed else -2].get_length() for weights, is_transposed in shapes]


def _has_weights(product: ov.Node) -> bool:
    node = product.input_value(1).get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _group_advice(sizes: Iterable[int], *, is_fused: bool = False) -> str:
    group = fitting_group(sizes, is_fused=is_fused)
    return f"use --group-size {group}, or leave it out" if group > 0 else "use --group-size -1 for whole channels"


def compress(model: ov.Model, form: WeightFormat, windows: Sequence[Sequence[int]] = ()) -> ov.Model:
    """Return the model with its weights in another format.

    Args:
        model: A stateful decoder; it is consumed.
        form: The format.
        windows: Token ids of calibration samples for int4; empty for a fit to the weights alone.

    Raises:
        ExportError: The group size does not divide a layer's input.
    """
    if form.weights == "fp32":
        return model
    return _halve(model, form.weights) if form.weights in SIXTEEN_BITS else _quantize(model, form, windows)


def _quantize(model: ov.Model, form: WeightFormat, windows: Sequence[Sequence[int]]) -> ov.Model:
    import nncf

    form = with_group(model, form, is_fused=False)
    kind = "SYM" if form.symmetric else "ASYM"
    options: dict[str, Any] = {"mode": getattr(nncf.CompressWeightsMode, f"{form.weights.upper()}_{kind}")}
    if form.weights == "int4":
        backup = nncf.BackupMode.INT8_SYM if form.symmetric else nncf.BackupMode.INT8_ASYM
        options.update(group_size=form.group_size, ratio=1.0, backup_mode=backup)
    if windows:
        dataset = nncf.Dataset(list(_samples(model, windows)))
        options.update(dataset=dataset, subset_size=len(windows), **CALIBRATION_METHODS[form.calibration_method])
    try:
        return nncf.compress_weights(model, **options)
    except nncf.InvalidGroupSizeError as error:
        raise _group_size_error(form.group_size, str(error)) from error


def _halve(model: ov.Model, weights: str) -> ov.Model:
    """Store the weight matrices in f16 or bf16, in place, and return the model.

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
            widened = opset13.convert(_narrowed(node.get_data(), weights), "f32")
            for user in users:
                user.replace_source_output(widened.output(0))
    return model


def _narrowed(values: NDArray[np.float32], weights: str) -> Any:
    """Return a constant of f16 or bf16, rounded to nearest, ties to even.

    OpenVINO's own constant of bf16 is off by one in the last bit for a quarter of all values.
    """
    import openvino as ov
    from openvino import opset13

    if weights == "fp16":
        return opset13.constant(values.astype(np.float16))
    bits = values.view(np.uint32)
    made = ov.Tensor(ov.Type.bf16, ov.Shape(values.shape))
    made.data.view(np.uint16)[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return ov.op.Constant(made)


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


def _group_size_error(group_size: int | None, message: str) -> ExportError:
    """Turn NNCF's list of layers into one line: the first layer, and what fits all."""
    layers = [(name, int(size)) for name, size in re.findall(r'"(.+?)" \(channel size: (\d+)\)', message)]
    name, size = layers[0][0].removeprefix("__module.").split("/aten")[0], layers[0][1]
    return ExportError(
        f"group_size {group_size} does not divide the {size} inputs of layer {name}",
        _group_advice(size for _, size in layers),
    )
