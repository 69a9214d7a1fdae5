"""What each arithmetic costs in quality: KL divergence from exact f32 on the same weights, one token at a time.

`exact` is precision f32 alone. `grouped` is what `auto` resolves to for int8 and int4 weights: f32 with activations
rounded in groups and keys and values in u8. `bf16` stands in for what OpenVINO chooses on a CPU with AMX, which this
needs no such CPU for: PyTorch with the inputs, weights and outputs of every matrix product rounded to bf16 and sums in
f32, as AMX has them. Its attention, norms and keys stay in f32, so that it is flattered.

    python benchmarks/precision_quality.py SOURCE EXPORT... --text FILE [--tokens N] [--json]

SOURCE is the Hugging Face folder that each EXPORT was made from. The texts are windows of FILE, and questions with the
model's own greedy answers.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, report
from numpy.typing import NDArray

from edge_export import torch_source
from edge_export.quiet import quiet
from edge_export.sources import open_source
from edge_export.verify import compare
from edge_runtime import EdgeLLM
from edge_runtime.light_openvino import ov
from edge_runtime.models.base import CausalModel, advance
from edge_runtime.models.compiling import compile_model
from edge_runtime.models.loading import read_model

WINDOW, ANSWER = 128, 48
QUESTIONS = (
    "What is gravity? Explain in two sentences.",
    "Write a short poem about the sea.",
    "How do I sort a list of numbers in Python?",
    "Name three countries in Africa and their capitals.",
)
EXACT: dict[str, Any] = {"precision": "f32", "num_threads": 1}
GROUPED: dict[str, Any] = {"precision": "f32", "activation_group_size": 128, "kv_precision": "u8", "num_threads": 1}
Logits = NDArray[np.float32]


def decoded(model: CausalModel, ids: list[int]) -> Logits:
    """Return the logits after each token, computed one by one."""
    with contextlib.closing(model.sequence()) as sequence:
        return np.concatenate([advance(model, sequence, [token_id]).copy() for token_id in ids])


def texts_of(llm: EdgeLLM, text: Path, tokens: int) -> dict[str, list[list[int]]]:
    """Return token ids to read: windows of a text, and chats with their answers."""
    ids = llm.tokenizer.encode(text.read_text(encoding="utf-8")[: 8 * tokens])[:tokens]
    windows = [ids[begin : begin + WINDOW] for begin in range(0, len(ids) - WINDOW + 1, WINDOW)]
    chats = []
    for question in QUESTIONS:
        prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": question}])
        chats.append(prompt + llm.generate(prompt, max_new_tokens=ANSWER).token_ids)
    return {"text": windows, "chat": chats}


def stored_matrices(folder: Path) -> dict[str, Logits]:
    """Return module name to the f32 values of the weights that each matrix product of an export has."""
    model, _ = read_model(folder)
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul" and "linear" in str(node)]
    names = [node.get_friendly_name().split("/")[0].removeprefix("__module.") for node in products]
    values = compile_model(
        ov.Model([node.input_value(1) for node in products], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )({})
    return {name: values[index] for index, name in enumerate(names)}


def bf16_model(source: Path, export: Path) -> Any:
    """Return the source in PyTorch with an export's weights, and every product rounded to bf16."""
    import torch

    def rounded(values: Any) -> Any:
        return values.to(torch.bfloat16).to(torch.float32)

    with quiet():
        model = torch_source.load(open_source(source), "fp32")
    for name, values in stored_matrices(export).items():
        layer = model.get_submodule(name)
        layer.weight = torch.nn.Parameter(rounded(torch.from_numpy(values.copy())), requires_grad=False)
        layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
        layer.register_forward_hook(lambda _, __, output: rounded(output))
    return model


def runs(source: Path, export: Path) -> Iterator[tuple[str, Callable[[list[int]], Logits]]]:
    """Yield each arithmetic with how to get its logits."""
    llm = EdgeLLM.load(export, **GROUPED)
    yield "grouped", lambda ids: decoded(llm.target, ids)
    model = bf16_model(source, export)
    yield "bf16", lambda ids: torch_source.reference_logits(model, np.array([ids], np.int64))[0]


def measure(source: Path, export: Path, text: Path, tokens: int) -> list[dict[str, Any]]:
    """Return a row for each arithmetic and kind of text."""
    llm = EdgeLLM.load(export, **EXACT)
    texts = texts_of(llm, text, tokens)
    exact = {kind: [decoded(llm.target, ids) for ids in rows] for kind, rows in texts.items()}
    rows = []
    for name, run in runs(source, export):
        for kind, windows in texts.items():
            result = compare(np.concatenate(exact[kind]), np.concatenate([run(ids) for ids in windows]))
            rows.append(
                {
                    "weights": llm.manifest.weights,
                    "arithmetic": name,
                    "text": kind,
                    "kl": result.kl_divergence,
                    "error": result.error,
                    "same_first_choice": result.top1_agreement,
                    "tokens": result.num_positions,
                }
            )
    return rows


def no_worse(rows: list[dict[str, Any]]) -> bool:
    """Return whether `grouped` differs from exact f32 by no more than bf16 does, on every text and export."""
    kls = {(row["weights"], row["text"], row["arithmetic"]): row["kl"] for row in rows}
    return all(kls[(*case, "grouped")] <= kls[(*case, "bf16")] for case in {key[:2] for key in kls})


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("exports", type=Path, nargs="+", metavar="EXPORT")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row for export in options.exports for row in measure(options.source, export, options.text, options.tokens)]
    checks = {"auto's KL from exact f32 is at most that of bf16": no_worse(rows)}
    return report({"machine": machine(), "rows": rows}, checks, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
