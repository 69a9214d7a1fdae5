"""LoRA folders as peft writes them: found, checked against their files, and merged into their base.

`adapter_config.json` names the base and the layers; `adapter_model.safetensors` holds the low-rank factors, and whole
layers that were trained along (`modules_to_save`) or embeddings that grew by new tokens. peft does the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_export.weight_files import AGAIN, list_tensors
from edge_runtime.errors import ExportError
from edge_runtime.manifest import check_is_no_pointer, read_json

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "embed_out.weight", "wte.weight")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_UNMERGEABLE = ("alora_invocation_tokens", "layer_replication", "megatron_config")
"""Settings under which an adapter is more than a change of its base's weights."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA folder.

    Attributes:
        folder: Where it is.
        base: Name or path of its base, as adapter_config.json has it.
        num_tokens: Rows of the embeddings that it brings; None where the base's stay.
    """

    folder: Path
    base: str
    num_tokens: int | None

    @property
    def base_folder(self) -> Path | None:
        """The base's folder, where its name is a path that exists, from here or from the adapter."""
        places = (Path(self.base).expanduser(), self.folder / self.base) if self.base else ()
        return next((place for place in places if place.is_dir()), None)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it comes with a tokenizer of its own: that is the one it was trained with."""
        return any((self.folder / name).is_file() for name in _TOKENIZERS)


def read_adapter(folder: Path) -> Adapter | None:
    """Return the adapter in a folder; None where there is none.

    Raises:
        ExportError: It is of a kind that cannot be merged, or lacks its weights.
        ModelFormatError: adapter_config.json is damaged, or a file is a Git LFS pointer.
    """
    if not (folder / CONFIG_NAME).is_file():
        return None
    settings = read_json(folder / CONFIG_NAME)
    kind, task = str(settings.get("peft_type")), settings.get("task_type")
    if kind != "LORA":
        raise ExportError(f"`{folder}` is a {kind} adapter, expected LORA", "merge it with peft, and export the result")
    if task not in (None, "CAUSAL_LM"):
        raise ExportError(f"`{folder}` is a LoRA adapter for {task}, expected CAUSAL_LM: a model that writes")
    if unmergeable := [name for name in _UNMERGEABLE if settings.get(name)]:
        raise ExportError(f"`{folder}` is a LoRA adapter with {unmergeable[0]}, which cannot be merged into its base")
    file = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ExportError(f"`{folder}` holds {CONFIG_NAME} without {' or '.join(_WEIGHTS)}", AGAIN)
    check_is_no_pointer(file)
    base = settings.get("base_model_name_or_path") or ""
    return Adapter(folder=folder, base=str(base), num_tokens=_num_tokens(file))


def merge(model: Any, adapter: Adapter) -> Any:
    """Return `model`, which is changed, with the adapter folded into its weights.

    Raises:
        ExportError: The adapter was made for another base, or is damaged.
    """
    from peft import PeftConfig, PeftModel

    if adapter.num_tokens and adapter.num_tokens != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(adapter.num_tokens, mean_resizing=False)
    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        adapted = PeftModel(model, config)
        loaded = adapted.load_adapter(str(adapter.folder), "default")
        unplaced = [*loaded.unexpected_keys, *loaded.missing_keys]
        if unplaced:
            raise ValueError(f"{len(unplaced)} tensors have no counterpart, such as {unplaced[0]}")
    except Exception as error:  # peft, torch and safetensors raise bare exceptions of many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise ExportError(
            f"LoRA adapter `{adapter.folder}` does not fit its base: {told}",
            f"it was trained on {adapter.base or 'a base that it does not name'}: name that with --base",
        ) from error
    try:
        return adapted.merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ExportError(f"LoRA adapter `{adapter.folder}` cannot be merged: {str(error).splitlines()[0]}") from error


def _num_tokens(file: Path) -> int | None:
    rows = {shape[0] for name, shape in _shapes(file).items() if name.endswith(_EMBEDDINGS)}
    return max(rows, default=None)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.stat().st_size:
        raise ExportError(f"`{file}` is empty", AGAIN)
    if file.suffix == ".safetensors":
        return {name: tensor.shape for name, tensor in list_tensors([file]).items()}
    import pickle

    import torch

    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
        return {name: tuple(value.shape) for name, value in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ExportError(f"`{file}` cannot be read as tensors alone", AGAIN) from error
