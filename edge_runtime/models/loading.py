"""From a model folder to a compiled model: read, plan, rewrite, compile.

The one function that the rest of the runtime, the exporter's checks and the benchmarks load models with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import openvino as ov

import ov_kernels
from edge_runtime.checksums import facts_of
from edge_runtime.config import LoadConfig
from edge_runtime.devices import check_device, core
from edge_runtime.errors import DeviceError, ModelFormatError
from edge_runtime.manifest import MODEL_NAME, Manifest
from edge_runtime.models.compiling import check_added_properties, compile_model
from edge_runtime.models.passes.block_sparse_attention import use_block_sparse_attention
from edge_runtime.models.passes.hidden_rows import add_hidden_rows
from edge_runtime.models.passes.paged_attention import first_line, to_paged_attention
from edge_runtime.models.passes.wanted_rows import keep_wanted_rows
from edge_runtime.models.plan import CompilePlan, make_plan
from edge_runtime.models.weights import weights_of

if TYPE_CHECKING:
    from edge_runtime.models.paged import PagedModel
    from edge_runtime.models.static import StaticModel

OUR_OPSET = b'version="edge"'
"""How an IR marks an op of ov_kernels."""
_STOCK_KEYS = "key_cache.0"
"""Input with the first layer's keys of OpenVINO's PagedAttention."""


def load_model(
    folder: Path, manifest: Manifest, config: LoadConfig, *, wants_hidden: bool = False
) -> PagedModel | StaticModel:
    """Load a model folder for the device that `config` names.

    Args:
        folder: A model folder.
        manifest: Its facts.
        config: What the user asked of this model: see `LoadConfig.for_target` and `for_draft`.
        wants_hidden: Whether a forward returns hidden states too.

    Raises:
        ConfigError: An option has a value that the device or the model does not take.
        ModelFormatError: The model's files are damaged or not a decoder.
        DeviceError: The device is absent, or cannot compile the model with these options.
        ExtensionError: The model uses ops of ours, and the library that has them is absent, or older than they are.
    """
    device = check_device(config.device)
    model, weight_bytes = read_model(folder)
    plan = make_plan(device, config, weights_of(model, weight_bytes), manifest, wants_hidden=wants_hidden)
    if device.startswith("NPU"):
        return _load_static(model, plan)
    return _load_paged(model, plan, weight_bytes, lambda: _hashes(folder, manifest))


def _load_paged(
    model: ov.Model, plan: CompilePlan, weight_bytes: int, identity: Callable[[], dict[str, str]]
) -> PagedModel:
    from edge_runtime.models.paged import PagedModel

    to_paged_attention(model)
    keep_wanted_rows(model)
    if plan.hidden_layers is not None:
        add_hidden_rows(model, plan.hidden_layers)
    attention = use_block_sparse_attention(model, plan, weight_bytes)
    mlp = _choose_mlps(model, plan)
    return PagedModel(_compile(model, plan), plan, attention, mlp, identity)


def _hashes(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return the SHA-256 of the IR's files: those of the export, which were checked, or else of the files now."""
    names = (MODEL_NAME, Path(MODEL_NAME).with_suffix(".bin").name)
    files = manifest.files if all(name in manifest.files for name in names) else facts_of(folder, names)
    return {name: files[name].sha256 for name in names}


def _load_static(model: ov.Model, plan: CompilePlan) -> StaticModel:
    from edge_runtime.models import npuw
    from edge_runtime.models.static import StaticModel

    if plan.hidden_layers is not None:
        raise DeviceError(f"{plan.device} returns no hidden states", "run the target on CPU or GPU")
    npuw.check_is_decoder(model)
    mlp = _choose_mlps(model, plan)
    return StaticModel(npuw.compile_decoder(model, plan), plan, npuw.token_kv_bytes(model), mlp)


def read_model(folder: Path) -> tuple[ov.Model, int]:
    """Read the IR of a model folder and return it with the bytes of its weights.

    Raises:
        ModelFormatError: The files are missing, truncated or corrupt.
        ExtensionError: The model uses ops of ours, and the library that has them is absent, or older than they are.
    """
    path = folder / MODEL_NAME
    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ModelFormatError(f"`{weights}` is missing", "copy or export the model again")
    try:
        if OUR_OPSET in path.read_bytes():
            ov_kernels.add_for(path, core())
        return core().read_model(path), weights.stat().st_size
    except RuntimeError as error:
        raise ov_kernels.explain_read_error(error) or ModelFormatError(
            f"`{path}` cannot be read: {first_line(error)}", "copy or export the model again"
        ) from error


def _choose_mlps(model: ov.Model, plan: CompilePlan) -> str | None:
    """Bring fused MLPs into the form that is to run; return what it is, None where there are none."""
    if not any(node.get_type_name() == "CatsMlp" for node in model.get_ops()):
        return None
    from edge_runtime.models.passes import fused_mlp

    return fused_mlp.choose_mlps(model, plan)


def _compile(model: ov.Model, plan: CompilePlan) -> ov.CompiledModel:
    try:
        compiled = compile_model(model, plan.device, plan.properties)
    except RuntimeError as error:
        check_added_properties(error, plan.device, plan.asked)
        asked = ", ".join(f"{name}={value}" for name, value in plan.asked.items())
        raise DeviceError(
            f"{plan.device} cannot run the model{' with ' * bool(asked)}{asked}: {first_line(error)}",
            "leave these options out" if asked else "export or pull the model again, or run it on another device",
        ) from error
    _check_precisions(compiled, plan)
    return compiled


def _check_precisions(compiled: ov.CompiledModel, plan: CompilePlan) -> None:
    """Refuse to run in other precisions than those asked for, which the plugin does without a word."""
    runs = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if (asked := plan.asked.get("precision", runs)) != runs:
        raise DeviceError(f"{plan.device} cannot compute in {asked}: it would use {runs}", f"use `{runs}` or `auto`")
    stock = next((port for port in compiled.inputs if port.get_any_name() == _STOCK_KEYS), None)
    if stock is None or plan.device != "CPU":
        return
    keeps = stock.get_element_type().to_string()
    if (asked := plan.asked.get("kv_precision", keeps)) != keeps:
        raise DeviceError(
            f"{plan.device} cannot keep keys and values in {asked} while it computes in {runs}: it would use {keeps}",
            f"use `{keeps}` or `auto`",
        )
