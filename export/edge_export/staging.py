"""An output folder that appears whole or not at all.

Everything is written into `<output>.unfinished` beside the output, so the last step is a rename within one file system.
Whatever ends the work early, Ctrl-C included, removes it; what a killed process left is removed by the next one that
wants the same output, and two at once are refused.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.errors import ExportError
from edge_runtime.outputs import check_output, check_work_folder, claimed, empty

_WORDS_OF_A_FULL_DISK = ("iostream error", "(os error 28)", "(os error 112)")
"""28 is Linux and macOS, 112 Windows."""
SPARE_BYTES = 64 << 20
"""Asked for beyond the estimate: tokenizer, graph and rounding."""


@contextlib.contextmanager
def staged(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary folder that becomes `output` when the block ends well, and vanishes when it does not.

    Raises:
        ConfigError: `outputs.check_output` refuses `output`, or another process is making it.
        ExportError: The disk filled up.
    """
    place = check_output(output, overwrite=overwrite)
    work = place.with_name(place.name + ".unfinished")
    new, old = work / "new", work / "old"
    check_work_folder(work)
    with disk_full_is_said(output), claimed(work):
        _bring_back(old, place)  # a process was killed between the two renames
        check_output(output, overwrite=overwrite)
        try:
            empty(work)
            new.mkdir()
            yield new
            gc.collect()  # Windows cannot rename a folder while a model still maps a file in it
            if place.exists():
                os.replace(place, old)
            os.replace(new, place)
        finally:
            _bring_back(old, place)
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)


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
                f"cannot write `{output}`: the disk is full or read-only",
                "free some space, or put the output on another disk",
            ) from error
        raise


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


def _bring_back(old: Path, place: Path) -> None:
    """Give a folder its name back where the one that was to replace it does not stand."""
    if old.exists() and not place.exists():
        os.replace(old, place)
