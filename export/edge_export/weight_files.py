"""A checkpoint's weight files, looked at before any library reads them: which they are, and whether they are whole.

A safetensors file begins with a table of its tensors, so a file that is cut short, a shard that is missing and a
pointer that git left are found in milliseconds, without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import ExportError
from edge_runtime.manifest import check_is_no_pointer, read_json

AGAIN = "copy or download the model again"
NAMES = ("model.safetensors", "pytorch_model.bin")
"""Weights as transformers looks for them: whole, or in shards that NAME.index.json lists."""

_LONGEST_TABLE = 100_000_000
"""The safetensors library reads no longer one either."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a safetensors file lists it.

    Attributes:
        file: The file that holds it.
        dtype: safetensors' name, such as `BF16` or `F8_E4M3`.
        shape: Its sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def find_weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, which exist and are not empty; [] where there are none.

    Raises:
        ExportError: An index lists shards that are not there, or a file is empty.
        ModelFormatError: A file is a Git LFS pointer, or an index is not JSON.
    """
    for name in NAMES:
        index = folder / f"{name}.index.json"
        files = [folder / name] if (folder / name).is_file() else _shards(index) if index.is_file() else []
        for file in files:
            check_is_no_pointer(file)
            if not file.stat().st_size:
                raise ExportError(f"`{file}` is empty", AGAIN)
        if files:
            return files
    return []


def list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of safetensors files by name; {} for pickled weights, which have no table.

    Raises:
        ExportError: A file is cut short or damaged.
    """
    tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            for name, entry in _table(file).items():
                tensors[name] = StoredTensor(file, str(entry["dtype"]), tuple(entry["shape"]))
    return tensors


def _shards(index: Path) -> list[Path]:
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ExportError(f"`{index}` has no weight_map", AGAIN)
    names = sorted({str(name) for name in placed.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ExportError(f"`{index}` names `{outside[0]}`, expected files beside it", AGAIN)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ExportError(f"{len(missing)} of the {len(names)} files in `{index}` are missing: {missing[0]}", AGAIN)
    return [index.parent / name for name in names]


def _table(file: Path) -> dict[str, Any]:
    """Return the table of a safetensors file, without its metadata."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LONGEST_TABLE:
            raise ExportError(f"`{file}` is no safetensors file, or damaged", AGAIN)
        raw = stream.read(length)
    if len(raw) < length:
        raise ExportError(f"`{file}` is cut short: {size:,} bytes, its table alone takes {8 + length:,}", AGAIN)
    try:
        table: dict[str, Any] = json.loads(raw)
        table.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ExportError(f"`{file}` is no safetensors file, or damaged", AGAIN) from error
    if size != end:
        words = "is cut short" if size < end else "is damaged"
        raise ExportError(f"`{file}` {words}: {size:,} bytes, its table says {end:,}", AGAIN)
    return table
