"""A Torch Llama from a model folder's int8 IR, for benchmarks that rebuild the embedded target where only its IR is.

The export keeps each weight under its Hugging Face name: u8 values, a zero point and an f16 scale for each row. The
weights of RMSNorm are constants of the multiplication that uses them. Values are the dequantised ones, so the model
computes what the IR computes. As a Hugging Face folder, for training:

    python benchmarks/ir_weights.py OUT [FOLDER]

FOLDER is the embedded target by default.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from edge_export.quiet import quiet
from edge_runtime.demo import demo_target
from edge_runtime.manifest import MODEL_NAME

NORM = "/aten::mul/Multiply_1"
"""Ending of the name of the multiplication with a norm's weight."""


def llama_of_ir(folder: Path) -> Any:
    """Return the f32 LlamaForCausalLM of an int8 IR."""
    with quiet():
        import torch
        from transformers import AutoConfig, LlamaForCausalLM

        model = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
        weights = read_weights(folder)
        state = {name: torch.from_numpy(weights[name].reshape(old.shape)) for name, old in model.state_dict().items()}
        model.load_state_dict(state)
    return model.eval()


def read_weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Return Hugging Face name to f32 value of all weights of an int8 IR."""
    graph = openvino.Core().read_model(folder / MODEL_NAME)
    constants = {op.friendly_name: op.data for op in graph.get_ops() if op.get_type_name() == "Constant"}
    weights = {}
    for name, values in constants.items():
        if f"{name}/scale" in constants:
            shifted = values.astype(np.float32) - constants[f"{name}/zero_point"].astype(np.float32)
            weights[name.removeprefix("self.")] = shifted * constants[f"{name}/scale"].astype(np.float32)
    for op in graph.get_ops():
        if op.friendly_name.endswith(NORM) and "norm" in op.friendly_name:
            name = op.friendly_name.removesuffix(NORM).removeprefix("__module.")
            weights[f"{name}.weight"] = next(value for value in map(_constant, op.input_values()) if value is not None)
    return weights


def _constant(output: Any) -> NDArray[np.float32] | None:
    node = output.get_node()
    return np.array(node.data, np.float32) if node.get_type_name() == "Constant" else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="Hugging Face folder to make")
    parser.add_argument("folder", type=Path, nargs="?", default=demo_target())
    arguments = parser.parse_args()
    llama_of_ir(arguments.folder).save_pretrained(arguments.output)
    for file in arguments.folder.glob("tokenizer*"):
        shutil.copy(file, arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
