"""An output folder that appears whole or not at all.

Everything is written into `<output>.partial-<pid>` beside the output, so the last step is a rename within one file
system. Whatever ends the work early, Ctrl-C included, removes it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import ConfigError, ExportError

_WORDS_OF_A_FULL_DISK = ("iostream error", "(os error 28)", "(os error 112)")
"""28 is Linux and macOS, 112 Windows."""
SPARE_BYTES = 64 << 20
"""Asked for beyond the estimate: tokenizer, graph and rounding."""


@contextlib.contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block ends well, and vanishes when it does not.

    Raises:
        ConfigError: `output` exists and is not an empty folder, and `overwrite` is false.
        ExportError: The disk filled up.
    """
    check_output(output, overwrite=overwrite)
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        with disk_full_is_said(output):
            partial.mkdir(parents=True)
            yield partial
            gc.collect()  # Windows cannot rename a folder while a model still maps a file in it
            _replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_full_is_said(output: Path) -> Iterator[None]:
    """Turn what libraries raise when the disk of `output` is full into one line.

    Raises:
        ExportError: It is.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error, output):
            raise ExportError(
                f"the disk of `{output}` is full or refuses to be written",
                "free some space, or put the output on another disk",
            ) from error
        raise


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would overwrite something the user did not say may go."""
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise ConfigError(f"output `{output}` exists and is not empty", "give another folder, or --overwrite")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output `{output}` is a file, expected a folder that may be made")


def check_free_disk(output: Path, needed_bytes: int) -> None:
    """Raise ExportError where the output's disk has less room than the export is going to take."""
    place = next(parent for parent in output.absolute().parents if parent.exists())
    free, needed = shutil.disk_usage(place).free, needed_bytes + SPARE_BYTES
    if free < needed:
        raise ExportError(
            f"the export needs about {_gigabytes(needed)} of disk, `{place}` has {_gigabytes(free)}",
            "free some space, or put the output on another disk",
        )


def _is_disk_full(error: Exception, place: Path) -> bool:
    # OpenVINO's writer knows only that its stream failed; by then it may have removed what filled the disk. Rust's, as
    # safetensors has it, says the system's words but is no OSError.
    if any(words in str(error) for words in _WORDS_OF_A_FULL_DISK):
        return True
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    existing = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free < 1 << 16


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


def _replace(partial: Path, output: Path) -> None:
    """Put `partial` in the place of `output`; what was there is kept until the new folder stands."""
    old = output.with_name(f"{output.name}.old-{os.getpid()}")
    if output.exists():
        os.replace(output, old)
    try:
        os.replace(partial, output)
    except OSError:
        if old.exists():
            os.replace(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)
