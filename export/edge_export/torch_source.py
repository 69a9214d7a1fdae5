"""A Hugging Face checkpoint to reference logits and a stateful OpenVINO graph, through optimum-intel's exporter.

The checkpoint stays in its own precision: weights in 16 bits are half the memory and lose nothing that the model had.
Only the reference is computed in f32, one layer at a time.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_export.adapters import merge
from edge_export.compress import SIXTEEN_BITS
from edge_export.dequantize import dequantize
from edge_export.sources import Source, load_config, unsupported
from edge_runtime.devices import core
from edge_runtime.errors import EdgeError, ExportError
from edge_runtime.manifest import MODEL_NAME

if TYPE_CHECKING:
    import openvino as ov
    import torch

TASK = "text-generation-with-past"

_RIGHT_BEYOND_THEIR_VERSION = ("gemma", "gemma2", "gemma3_text", "glm", "exaone4")
"""optimum-intel 2.2 says that 5.5 is too new for these; our tests hold them equal to PyTorch with it."""


def check_supported(source: Source) -> None:
    """Raise ExportError unless optimum-intel has an exporter for this architecture as a decoder with KV cache."""
    import transformers
    from optimum.exporters.openvino import model_configs  # noqa: F401 - registers the architectures
    from optimum.exporters.tasks import TasksManager
    from packaging.version import Version

    try:
        exporter = TasksManager.get_exporter_config_constructor(
            "openvino", task=TASK, model_type=source.model_type, library_name="transformers"
        ).func
    except (KeyError, ValueError) as error:
        raise unsupported(source) from error
    newest = getattr(exporter, "MAX_TRANSFORMERS_VERSION", None)
    if source.model_type in _RIGHT_BEYOND_THEIR_VERSION:
        exporter.MAX_TRANSFORMERS_VERSION = None
    elif newest and Version(str(newest)) < Version(transformers.__version__):
        raise ExportError(
            f"optimum-intel exports `{source.model_type}` only with transformers up to {newest}, "
            f"installed is {transformers.__version__}",
            "an OpenVINO folder that others exported can be run: `edge-run pull HUB_ID`",
        )


def load(source: Source, weights: str) -> Any:
    """Load the model in its own precision, or in f32 where that is wanted.

    Quantised weights are restored, and a LoRA adapter is merged.

    Raises:
        ExportError: The weights are damaged, incomplete, or need code that came with them.
    """
    import torch

    config = load_config(source)
    dtype = torch.float32 if weights == "fp32" else None
    try:
        state = _stored(source.weight_files)
        if source.quantization:
            dtype = dtype or config.dtype or torch.float32
            state = dequantize(state, source.quantization, dtype)
        model, info = _from_state(state, config, dtype or "auto")
    except EdgeError:
        raise
    except Exception as error:  # safetensors, torch and transformers raise bare exceptions of many kinds
        raise ExportError(
            f"the weights in `{source.folder}` cannot be read: {_told(error)}",
            "copy or download the model again; a model that needs code of its own cannot be exported",
        ) from error
    _check_complete(source, info)
    _check_used(source, model, state, info["unexpected_keys"])
    return merge(model, source.adapter) if source.adapter else model.eval()


def _from_state(state: dict[str, torch.Tensor], config: Any, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """Return a model with these weights and what transformers says about them; no file of the source is read again."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))  # which alone takes a state dict in place of a folder
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # told in one line below, where transformers prints a table
        output_loading_info=True,
    )
    return model, info


def _check_complete(source: Source, info: dict[str, Any]) -> None:
    """Refuse weights that transformers would make up: absent ones, and those of another shape than the config says."""
    again = "copy or download the model again"
    if misfits := sorted(info["mismatched_keys"]):
        name, got, expected = misfits[0]
        raise ExportError(
            f"{len(misfits)} tensors in `{source.folder}` have another shape than config.json says, such as {name}: "
            f"{tuple(got)}, expected {tuple(expected)}",
            again,
        )
    if missing := sorted(info["missing_keys"]):
        raise ExportError(
            f"the weights in `{source.folder}` lack {len(missing)} tensors, such as {missing[0]}",
            again,
        )


def _check_used(source: Source, model: Any, state: dict[str, torch.Tensor], unused: Iterable[str]) -> None:
    """Refuse weights of the model's layers that a wrong config.json would drop in silence: layers, biases, norms.

    Zeros, which some quantisers write as biases, change nothing; what lies outside of the layers, such as a vision
    tower, and layers that predict further tokens are left out on purpose.
    """
    stacks = {stack[0] for name, _ in model.named_parameters() if (stack := _STACK.match(name))}
    dropped = sorted(
        name
        for name in unused
        if (stack := _STACK.match(name)) and stack[0] in stacks and name in state and _is_weight(name, state[name])
    )
    if dropped and not getattr(model.config, "num_nextn_predict_layers", None):
        raise ExportError(
            f"{len(dropped)} tensors in `{source.folder}` have no place in the {source.model_type} that "
            f"config.json describes, such as {dropped[0]}",
            "copy config.json from the original model",
        )


_STACK = re.compile(r".+?\.(?=\d+\.)")
"""What the names of all layers begin with, such as `model.layers.`."""


def _is_weight(name: str, tensor: torch.Tensor) -> bool:
    is_matrix = tensor.ndim <= 2 and tensor.is_floating_point()  # no causal mask, as old GPT-2s store it
    return name.endswith((".weight", ".bias")) and is_matrix and bool(tensor.any())


def _stored(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """Return the tensors of weight files, mapped rather than read."""
    import torch
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for file in files:
        is_pickled = file.suffix == ".bin"
        stored |= torch.load(file, weights_only=True, mmap=True, map_location="cpu") if is_pickled else load_file(file)
    return stored


def _told(error: Exception) -> str:
    if "weights_only" in str(error) or "Unsupported global" in str(error):
        return "they are pickled Python objects other than tensors, which may run code and are not loaded"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def num_parameters(model: torch.nn.Module) -> int:
    """Return the number of weights, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def reference_logits(model: torch.nn.Module, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (B, T, V) logits of (B, T) token ids, computed in f32 whatever the weights are stored in."""
    import torch

    with torch.no_grad(), _float32_arithmetic(model):
        logits: NDArray[np.float32] = model(torch.from_numpy(token_ids), use_cache=False).logits.float().numpy()
    _unshare_buffers(model)
    return logits


def _unshare_buffers(model: torch.nn.Module) -> None:
    """Give each buffer a tensor of its own: a dynamic rope that ran leaves two names for one, which tracing refuses."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.clone())


def to_ir(model: torch.nn.Module, work: Path, weights: str) -> ov.Model:
    """Convert the model, which is consumed; `work` takes the files that the result maps, until it is released."""
    import torch
    from optimum.exporters.openvino.convert import export_from_model

    if weights in SIXTEEN_BITS:
        _halve(model, torch.float16 if weights == "fp16" else torch.bfloat16)
    has_sixteen_bit = any(value.dtype in (torch.float16, torch.bfloat16) for value in model.parameters())
    export_from_model(model, work, task=TASK, stateful=True, preprocessors=[], patch_16bit_model=has_sixteen_bit)
    return core().read_model(work / MODEL_NAME)


def _halve(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Round the weight matrices to 16 bits, and nothing else.

    `model.half()` and OpenVINO's `compress_to_fp16` would round the rotary frequencies too: at position 10,000 an angle
    is then wrong by a radian.
    """
    for value in model.parameters():
        if value.ndim > 1:
            value.data = value.data.to(dtype)


@contextlib.contextmanager
def _float32_arithmetic(model: torch.nn.Module) -> Iterator[None]:
    """Widen the 16-bit weights of each module while it runs: the reference is to hold no rounding of activations."""
    import torch

    narrow: dict[torch.nn.Module, dict[str, torch.Tensor]] = {}

    def widen(module: torch.nn.Module, _: Any) -> None:
        narrow[module] = {name: value.data for name, value in module.named_parameters(recurse=False)}
        for value in module.parameters(recurse=False):
            value.data = value.data.float()

    def restore(module: torch.nn.Module, *_: Any) -> None:
        for name, value in module.named_parameters(recurse=False):
            value.data = narrow[module][name]

    hooks = [
        hook
        for module in model.modules()
        if any(value.dtype != torch.float32 for value in module.parameters(recurse=False))
        for hook in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
