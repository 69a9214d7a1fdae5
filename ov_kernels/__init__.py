"""Our OpenVINO ops in C++, and how Python finds the compiled library.

`src/` holds the ops, one folder each; `pip install .` compiles them into one library that OpenVINO loads:

    core = openvino.Core()
    ov_kernels.add_to(core)          # models that use the ops can now be read and compiled

An install without a compiler (`pip install . -C wheel.cmake=false`) has no library: `library_path()` is None there and
every model without such an op still runs.

The library fits exactly one OpenVINO release, since its C++ interface changes between releases. A note beside the
library says which, and it is compared before anything is loaded.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openvino

if TYPE_CHECKING:
    from edge_runtime.errors import ExtensionError

__all__ = [
    "LIBRARY_NAME",
    "LIBRARY_VARIABLE",
    "add_for",
    "add_to",
    "attention_block_bytes",
    "create",
    "explain_read_error",
    "exported",
    "has_amx",
    "instruction_set",
    "library_path",
]

LIBRARY_NAME = "edge_kernels.dll" if sys.platform == "win32" else "libedge_kernels.so"
LIBRARY_VARIABLE = "EDGE_KERNELS_LIBRARY"
VERSION_NAME = "openvino_version.txt"

_REINSTALL = "install again from the source folder, with a C++ compiler: `pip install --force-reinstall --no-deps .`"
# What OpenVINO says of an op that it does not know, with our opset's name.
_UNKNOWN_OP = re.compile(r"Cannot create (\w+) layer .* unsupported opset: edge\b")


def library_path() -> Path | None:
    """Find the compiled library.

    Returns:
        The file that EDGE_KERNELS_LIBRARY names, else the installed one; None for a pure-Python install.

    Raises:
        ExtensionError: EDGE_KERNELS_LIBRARY names something that is not a file.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    if chosen:
        if not Path(chosen).is_file():
            raise _extension_error(f"{LIBRARY_VARIABLE} is `{chosen}`, expected a library file", "correct or unset it")
        return Path(chosen).resolve()
    return next((path for path in _installed_paths() if path.is_file()), None)


def add_to(core: openvino.Core, *, required: bool = False) -> bool:
    """Make our ops known to an OpenVINO core.

    Args:
        core: Changed in place; adding twice does no harm.
        required: Whether a missing library is an error.

    Returns:
        Whether there was a library to add.

    Raises:
        ExtensionError: The library is required and absent, or does not fit the installed OpenVINO.
    """
    path = library_path()
    if path is None:
        if required:
            raise _extension_error("the compiled library of ov_kernels is not installed", _REINSTALL)
        return False
    _check_release(path)
    try:
        core.add_extension(str(path))
    except RuntimeError as error:
        raise _extension_error(f"OpenVINO cannot load `{path}`: {_last_line(error)}", _REINSTALL) from error
    return True


def add_for(path: Path, core: openvino.Core) -> None:
    """Make our ops known to a core that is to read an IR with such ops.

    Args:
        path: The IR.
        core: Changed in place.

    Raises:
        ExtensionError: There is no library, or it does not fit the installed OpenVINO.
    """
    if not add_to(core):
        raise _extension_error(
            f"`{path}` uses ops of ov_kernels, whose compiled library is not installed: without it no device can read "
            "the model, not even to run it in OpenVINO's own ops",
            f"{_REINSTALL}; or export the model without --mlp fused and --cats",
        )


def instruction_set() -> str:
    """Return the instructions that our ops use here.

    Returns:
        `avx512`, `avx2vnni`, `avx2` or `ref`, plain C++; `none` without a library, or where EDGE_KERNELS_ISA names
        what this machine does not have.

    Raises:
        ExtensionError: The library does not fit the installed OpenVINO, or is another release's.
    """
    if library_path() is None:
        return "none"
    function = exported("edge_kernels_isa")
    function.restype = ctypes.c_char_p
    return str(function().decode())


def has_amx() -> bool | None:
    """Return whether CPU and system have AMX for bf16; None where no library can tell."""
    from edge_runtime.errors import ExtensionError  # here, since edge_runtime may import this module

    try:
        return bool(exported("edge_cpu_has_amx")())
    except ExtensionError:
        return None


def attention_block_bytes(block_size: int, key_size: int, value_size: int, kv_type: str) -> int:
    """Return the bytes of one block of keys and values of one KV head, as BlockSparseAttention lays it out.

    Args:
        block_size: Tokens.
        key_size: Numbers of a key.
        value_size: Numbers of a value.
        kv_type: `f32`, `bf16` or `u8`.

    Raises:
        ExtensionError: There is no library, or it does not fit.
    """
    function = exported("edge_attention_block_bytes")
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_uint64] * 3 + [ctypes.c_char_p]
    return int(function(block_size, key_size, value_size, kv_type.encode()))


def exported(name: str) -> Any:
    """Return a C function of the library.

    Raises:
        ExtensionError: There is no library, it does not fit the installed OpenVINO, or is another release's.
    """
    path = library_path()
    if path is None:
        raise _extension_error("the compiled library of ov_kernels is not installed", _REINSTALL)
    _check_release(path)
    try:
        return getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise _extension_error(f"`{path}` is not this release's library: {error}", _REINSTALL) from error


def create(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> Any:
    """Return a node of one of our ops.

    Args:
        op_type: Its name.
        inputs: Outputs of other nodes.
        attributes: All of its attributes.

    Raises:
        ExtensionError: There is no library.
    """
    from openvino.utils.node_factory import NodeFactory

    path = library_path()
    if path is None:
        raise _extension_error("the compiled library of ov_kernels is not installed", _REINSTALL)
    factory = NodeFactory()
    factory.add_extension(str(path))
    return factory.create(op_type, inputs, attributes)


def explain_read_error(error: RuntimeError) -> ExtensionError | None:
    """Say what a failed `read_model` was missing, where that was one of our ops.

    Returns:
        The error to raise in its place; None if it failed for another reason.
    """
    found = _UNKNOWN_OP.search(str(error))
    if found is None:
        return None
    return _extension_error(f"the model uses the op {found[1]}, which the installed ov_kernels lacks", _REINSTALL)


def _installed_paths() -> Iterator[Path]:
    """Yield where the library may lie.

    An editable install keeps the Python in the checkout and the library in site-packages, and a checkout in the
    current folder hides site-packages: hence every folder of the search path, not only our own.
    """
    for folder in [*map(Path, __path__), *(Path(entry, "ov_kernels") for entry in sys.path)]:
        yield folder.resolve() / "lib" / LIBRARY_NAME


def _check_release(path: Path) -> None:
    note = path.with_name(VERSION_NAME)
    if not note.is_file():
        return  # a library named by hand, without its note: OpenVINO's own loader decides
    built_for = note.read_text(encoding="utf-8").strip()
    installed = openvino.__version__.split("-")[0]
    if built_for != installed:
        raise _extension_error(
            f"`{path}` was built for OpenVINO {built_for}, but {installed} is installed",
            f"`pip install openvino=={built_for}`",
        )


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _extension_error(message: str, hint: str) -> ExtensionError:
    from edge_runtime.errors import ExtensionError  # here, since edge_runtime may import this module

    return ExtensionError(message, hint)
