"""Folders and files that people try to export and that are no checkpoint of a language model: each is named.

Only names and small files are looked at, so the answer comes before torch is imported.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from edge_export.weight_files import AGAIN
from edge_runtime.errors import ExportError
from edge_runtime.manifest import check_is_no_pointer, is_gguf

ORIGINAL = "export the folder that transformers reads: config.json with model.safetensors"
_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


class _Kind(NamedTuple):
    """A kind of folder that is no checkpoint.

    Attributes:
        patterns: Files of which one gives it away.
        words: What it is.
        hint: What to do.
    """

    patterns: tuple[str, ...]
    words: str
    hint: str


# Asked where a folder holds none of the weights that transformers reads, the most telling kind first.
_WITHOUT_WEIGHTS = (
    _Kind(("*.gguf",), "GGUF files, which edge-run does not read", ORIGINAL),
    _Kind(("consolidated*.pth", "consolidated*.safetensors"), "weights in their makers' own format", ORIGINAL),
    _Kind(("tf_model.h5", "model.ckpt*", "*.tflite"), "TensorFlow weights only", "export a folder with safetensors"),
    _Kind(("flax_model*.msgpack",), "Flax weights only", "export a folder with safetensors"),
    _Kind(("rust_model.ot",), "weights for rust-bert only", "export a folder with safetensors"),
    _Kind(("weights.npz",), "weights of an old MLX version", "export the model that it was converted from"),
)


def refuse_file(path: Path) -> ExportError:
    """Return the error for a file that is no ONNX file."""
    if is_gguf(path):
        return ExportError(f"`{path}` is a GGUF file, which edge-run does not read", ORIGINAL)
    if path.suffix in (".safetensors", ".bin", ".pth", ".pt"):
        return ExportError(
            f"`{path}` is a file of weights, expected the model folder around it", f"export {path.parent}"
        )
    return ExportError(f"`{path}` is a {path.suffix or 'plain'} file, expected a model folder or a .onnx file")


def refuse_other_kinds(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder whose files say that it is a pipeline or of another kind of model.

    Raises:
        ExportError: It is one.
        ModelFormatError: A small file is a Git LFS pointer.
    """
    for pattern in _SMALL_FILES:
        for file in folder.glob(pattern):
            check_is_no_pointer(file)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and _first_bytes(tokenizer, 3) == codecs.BOM_UTF8:  # its library reads none
        raise ExportError(f"`{tokenizer}` begins with a byte order mark", "save it as UTF-8 without one")
    if (folder / "model_index.json").is_file():
        raise ExportError(f"`{folder}` is a diffusers pipeline for images, expected a language model")
    modules = folder / "modules.json"
    if modules.is_file() and b"sentence_transformers" in modules.read_bytes():
        raise ExportError(f"`{folder}` is a sentence-transformers model for embeddings, expected a model that writes")
    if isinstance(config.get("quantization"), dict) and "quant_method" not in (config.get("quantization_config") or {}):
        bits = config["quantization"].get("bits", "")
        raise ExportError(
            f"`{folder}` is an MLX checkpoint with int{bits} weights, which only MLX reads", original(folder, config)
        )


def _first_bytes(path: Path, number: int) -> bytes:
    with path.open("rb") as file:
        return file.read(number)


def no_weights(folder: Path) -> ExportError:
    """Return the error for a folder without weights that transformers reads."""
    if folder.is_dir():
        for kind in _WITHOUT_WEIGHTS:
            if any(any(folder.glob(pattern)) for pattern in kind.patterns):
                return ExportError(f"`{folder}` holds {kind.words}", kind.hint)
    others = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    if others:
        return ExportError(
            f"`{folder}` holds {others[0]}, expected model.safetensors, pytorch_model.bin or an index of shards",
            "rename it if it is the whole model" if len(others) == 1 else AGAIN,
        )
    return ExportError(
        f"`{folder}` holds no weights", "expected model.safetensors, pytorch_model.bin or model.onnx beside config.json"
    )


def original(folder: Path, config: dict[str, Any]) -> str:
    """Return the hint for weights that are not read: export the model that they were made from."""
    readme = folder / "README.md"
    card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", card, re.DOTALL)
    base = re.search(r"^base_model:\s*(?:\n\s*-\s*)?['\"]?([\w.-]+/[\w.-]+)", head[1], re.MULTILINE) if head else None
    return f"export the original, unquantised model{f' {base[1]}' if base else ''}"


def needs_own_code(config: dict[str, Any], is_known: Callable[[str], bool]) -> str | None:
    """Return the class of its own that a config names where transformers has none of that name; None where it has."""
    code = config.get("auto_map")
    if not isinstance(code, dict) or "AutoModelForCausalLM" not in code:
        return None
    reference = str(code["AutoModelForCausalLM"])
    return None if is_known(reference.rpartition(".")[2]) else reference
