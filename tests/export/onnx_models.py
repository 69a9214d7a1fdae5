"""A Hugging Face model as the ONNX folder that optimum's ONNX exporter makes of it.

optimum-onnx does not install beside this transformers, so the same tracing is done here: PyTorch's ONNX exporter, with
the cache as inputs and outputs, and a boolean mask, which makes it guard the softmax against NaN and split the scale.
optimum-onnx 0.1 gives the same ops inside the attention; only the mask is computed otherwise.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edge_export.quiet import quiet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_onnx(hf: Path, folder: Path, *, attention: str = "sdpa", with_cache: bool = True) -> Path:
    """Write `model.onnx`, config and tokenizer of the model in `hf` into `folder`.

    Args:
        hf: A Hugging Face folder.
        folder: Created.
        attention: `sdpa` or `eager`: how PyTorch computes it, and so which graph ONNX gets.
        with_cache: Whether keys and values are inputs and outputs.
    """
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        shutil.copy(hf / name, folder / name)
    with quiet():
        _trace(hf, folder / "model.onnx", attention, with_cache)
    return folder


def _trace(hf: Path, file: Path, attention: str, with_cache: bool) -> None:
    import torch
    from optimum.exporters.openvino.patching_utils import ModelPatcher
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation=attention).eval()
    make_config = TasksManager.get_exporter_config_constructor(
        "openvino", model=model, task="text-generation-with-past", library_name="transformers"
    )
    batch, past, new = 2, 5, 3
    cache = _empty_cache(model.config, batch, past) if with_cache else []
    inputs = {
        "input_ids": torch.zeros(batch, new, dtype=torch.long),
        "attention_mask": torch.ones(batch, (len(cache) and past + new) or new, dtype=torch.long),
        "position_ids": torch.arange(new)[None].expand(batch, -1).contiguous(),
    }
    names = [f"{i}.{kind}" for i in range(len(cache) // 2) for kind in ("key", "value")]
    with ModelPatcher(make_config(model.config), model), torch.no_grad():
        torch.onnx.export(
            _with_flat_cache(model),
            (*inputs.values(), *cache),
            str(file),
            input_names=[*inputs, *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            dynamic_axes=_dynamic_axes(inputs, names),
            opset_version=18,
            dynamo=False,
        )


def _with_flat_cache(model: Any) -> Any:
    import torch

    class FlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *cache: Any) -> Any:
            pairs = [(cache[i], cache[i + 1]) for i in range(0, len(cache), 2)] or None
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=pairs,
                use_cache=pairs is not None,
            )
            present = out["past_key_values"] if pairs else []
            return (out["logits"], *(tensor for pair in present for tensor in pair))

    return FlatCache()


def _empty_cache(config: Any, batch: int, past: int) -> list[Any]:
    import torch

    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [torch.zeros(batch, heads, past, size) for _ in range(2 * config.num_hidden_layers)]


def _dynamic_axes(inputs: dict[str, Any], names: list[str]) -> dict[str, dict[int, str]]:
    axes = {name: {0: "batch", 1: "new"} for name in [*inputs, "logits"]}
    axes["attention_mask"] = {0: "batch", 1: "total"}
    axes |= {f"past_key_values.{name}": {0: "batch", 2: "past"} for name in names}
    return axes | {f"present.{name}": {0: "batch", 2: "total"} for name in names}
