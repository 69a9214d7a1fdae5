"""What skipping neurons brings and costs in a whole model, on real text: speed, perplexity, what a block still reads.

    cats      the model as it was exported
    dense     the same weights in the same op without thresholds, as `--mlp fused` exports them
    openvino  the same weights in OpenVINO's own ops without thresholds

A block of N tokens reads the neurons that at least one of them wakes, so verifying a draft saves less than a plain
step; `mlp_read` is the share of the MLPs' bytes that a step of N tokens of the text reads; the times say from which N
on skipping no longer pays.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_runtime.bench.cats import byte_counter
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MODEL_NAME, MlpFacts, load_manifest
from edge_runtime.models.base import CausalModel, advance

if TYPE_CHECKING:
    from edge_runtime.api import EdgeLLM

WINDOW = 256
"""Tokens of the text that are read together, from an empty context."""
MOST_ROWS = 8
STEPS = 12
"""Steps of each number of rows and variant that are timed."""
IMPLS = ("cats", "dense", "openvino")


class CatsModelBench:
    """Measures one model.

    Args:
        folder: Exported with `--cats`.
        text: On which quality and unions are measured.
        num_tokens: Most tokens of the text to use.

    Raises:
        ConfigError: The model skips no neurons, or the text is shorter than a window.
    """

    def __init__(self, folder: Path, text: Path, num_tokens: int) -> None:
        self._manifest = load_manifest(folder)
        if self._manifest.mlp is None or not self._manifest.mlp.activation_sparsity:
            raise ConfigError(
                f"`{folder}` was exported without --cats, so it skips no neurons", "export the model with `--cats 0.5`"
            )
        self._folder, self._text, self._num_tokens = folder, text, num_tokens
        self._bytes_read = byte_counter()
        self._rows: list[dict[str, Any]] = []

    @property
    def num_cells(self) -> int:
        """Parts of the work: what `run` yields."""
        return len(IMPLS) + MOST_ROWS

    def rows(self) -> list[dict[str, Any]]:
        """Return the finished rows: one for each implementation, then one for each number of tokens."""
        return self._rows

    def run(self) -> Iterator[None]:
        """Measure; yield after each part."""
        from edge_runtime.api import EdgeLLM

        with tempfile.TemporaryDirectory() as temporary:
            dense = without_thresholds(self._folder, Path(temporary) / "dense")
            llms = {
                "cats": EdgeLLM.load(self._folder, mlp="fused"),
                "dense": EdgeLLM.load(dense, mlp="fused"),
                "openvino": EdgeLLM.load(dense, mlp="stock"),
            }
            windows = self._windows(llms["cats"])
            models = {name: llm.target for name, llm in llms.items()}
            for name, model in models.items():
                self._rows.append({"impl": name, "rows": None, **quality(model, windows)})
                yield
            for rows in range(1, MOST_ROWS + 1):
                self._rows += self._steps(models, windows, rows)
                yield

    def _windows(self, llm: EdgeLLM) -> list[list[int]]:
        size = min(WINDOW, llm.context_length)
        ids = llm.tokenizer.encode(self._text.read_text(encoding="utf-8"))[: self._num_tokens]
        windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        if not windows:
            raise ConfigError(f"`{self._text}` has {len(ids)} tokens, expected at least {size}", "give a longer text")
        return windows

    def _steps(self, models: dict[str, CausalModel], windows: list[list[int]], rows: int) -> list[dict[str, Any]]:
        """Time steps of N tokens of the text, all implementations in turn on the same tokens."""
        times: dict[str, list[float]] = {name: [] for name in models}
        read: dict[str, int] = dict.fromkeys(models, 0)
        for step in range(STEPS + 1):
            window = windows[step % len(windows)]
            for name, model in models.items():
                sequence = model.sequence()
                advance(model, sequence, window[:-MOST_ROWS])
                before, begin = self._bytes_read(), time.perf_counter()
                advance(model, sequence, window[-MOST_ROWS:][:rows], rows)
                times[name].append(1000 * (time.perf_counter() - begin))
                read[name] += self._bytes_read() - before
                sequence.close()
        made = []
        for name, spent in times.items():
            low, middle, high = np.quantile(spent[1:], (0.1, 0.5, 0.9))
            made.append(
                {
                    "impl": name,
                    "rows": rows,
                    "ms": round(float(middle), 4),
                    "ms_p10": round(float(low), 4),
                    "ms_p90": round(float(high), 4),
                    "tokens_per_second": round(1000 * rows / float(middle), 2),
                    "mlp_read": round(read[name] / read["dense"], 4) if read[name] else 1.0,
                }
            )
        return made


def quality(model: CausalModel, windows: list[list[int]]) -> dict[str, Any]:
    """Return the perplexity of windows, each from an empty context, all its tokens at once."""
    losses = []
    for window in windows:
        sequence = model.sequence()
        logits = advance(model, sequence, window, len(window))[:-1].astype(np.float64)
        sequence.close()
        logits -= logits.max(-1, keepdims=True)
        chosen = np.take_along_axis(logits, np.array(window)[1:, None], -1)[:, 0]
        losses.append(float(np.mean(np.log(np.exp(logits).sum(-1)) - chosen)))
    return {"perplexity": round(float(np.exp(np.mean(losses))), 4), "tokens": sum(map(len, windows))}


def without_thresholds(folder: Path, output: Path) -> Path:
    """Copy a model folder with fused MLPs so that no neuron is ever dead, and none is read for itself."""
    import openvino as ov
    from openvino import opset13

    from edge_runtime.models.loading import read_model
    from edge_runtime.models.passes.fused_mlp import fused_mlps
    from ov_kernels.mlp_blob import pack, unpack

    model, _ = read_model(folder)
    for node in fused_mlps(model):
        blob = pack(unpack(node.input_value(1).get_node().data), "tiles")
        node.input(1).replace_source_output(opset13.constant(blob).output(0))
        node.input(2).replace_source_output(opset13.constant(np.array([-1], np.float32)).output(0))
    weights = (MODEL_NAME, Path(MODEL_NAME).with_suffix(".bin").name)
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns(*weights))
    ov.save_model(model, output / MODEL_NAME, compress_to_fp16=False)
    dataclasses.replace(load_manifest(output), mlp=MlpFacts(kind="fused")).save(output)
    return output
