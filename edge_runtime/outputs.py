"""Where results are written: never over an input, never over something of the user's, never by two at once.

    check_apart    an output that is, holds or lies in something that is read
    check_output   an output folder that cannot be made, or would replace what edge-run did not make
    claimed        a work folder beside the output, which one process has to itself

All three are asked before anything is read. A work folder that a process left when it was killed is the next one's: its
lock is free then, since the system releases a dead process's locks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MANIFEST_NAME

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCK_NAME = ".edge-run.lock"
"""The file in a work folder whose lock its process holds; it also tells our folders from others."""
EXPORTED = (
    "openvino_model.xml",
    "openvino_model.bin",
    MANIFEST_NAME,
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
)
"""Names of all that an export writes."""

Input = str | Path | Iterable[str | Path] | None


def check_apart(output: Path, **inputs: Input) -> None:
    """Refuse an output that is, holds or lies in something that is read, by whatever names both have.

    Args:
        output: File or folder to be written, which need not exist.
        inputs: Paths that are read, under the names that a message gives them; hub ids are no paths and pass.

    Raises:
        ConfigError: The two are not apart.
    """
    for name, value in inputs.items():
        for path in _paths(value):
            if relation := _relation(output, path):
                raise ConfigError(
                    f"output `{output}` {relation} the {name.replace('_', ' ')} `{path}`",
                    "name an output outside of what is read",
                )


def check_output(output: Path, *, overwrite: bool = False) -> Path:
    """Return the folder to be made, links followed, once nothing stands in its way.

    Args:
        output: Folder that does not exist, or is empty.
        overwrite: Whether it may also be a model folder of ours, to be replaced.

    Raises:
        ConfigError: It is something else, or cannot be made there.
    """
    if output.is_symlink() and not output.exists():
        raise ConfigError(f"output `{output}` is a link to `{os.readlink(output)}`, which does not exist")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output `{output}` is a file, expected a folder", "give another name")
    place = output.resolve()
    if place.is_dir():
        _check_replaceable(output, place, overwrite)
    _check_writable(output, place)
    return place


@contextlib.contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Have a work folder for this process alone, made if absent; what is left in it stays for the next process.

    Raises:
        ConfigError: Another process has it, or it cannot be made.
    """
    missing = [folder for folder in (work, *work.parents) if not folder.exists()]
    path = work / LOCK_NAME
    lock = _lock(path)
    try:
        yield
    finally:
        _release(lock, path)
        for folder in dict.fromkeys([work, *missing]):
            with contextlib.suppress(OSError):  # not empty: the output, or what the next process goes on with
                folder.rmdir()


def check_work_folder(work: Path, *marks: str) -> None:
    """Refuse a work folder that holds something and that `claimed` did not make.

    Raises:
        ConfigError: It does.
    """
    is_ours = work.is_dir() and (
        any((work / mark).is_file() for mark in (LOCK_NAME, *marks)) or not any(work.iterdir())
    )
    if work.is_symlink() or (work.exists() and not is_ours):
        raise ConfigError(f"`{work}` is in the way, and edge-run did not create it", "move it, or name another output")


def empty(work: Path) -> None:
    """Remove all that a claimed work folder holds."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def _paths(value: Input) -> list[Path]:
    if value is None:
        return []
    several = [value] if isinstance(value, str | Path) else value
    return [path for path in (Path(one).expanduser() for one in several) if path.exists()]


def _relation(output: Path, path: Path) -> str | None:
    """Return how an output lies to an existing path, None where they are apart.

    Existing files are compared as the file system does it: links, other spellings and letter case are its business.
    """
    place = output.expanduser().resolve()
    spots = [path.absolute(), path.resolve()]
    if path.is_dir():  # a folder of links, as the hub's client keeps models
        spots += [child.resolve() for child in path.iterdir() if child.is_symlink()]
    if any(_is_same(place, spot) for spot in spots):
        return "is"
    if any(_is_same(parent, spot) for parent in place.parents for spot in spots):
        return "lies in"
    if any(_is_same(place, parent) for spot in spots for parent in spot.parents):
        return "holds"
    return None


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one == other


def _check_replaceable(output: Path, place: Path, overwrite: bool) -> None:
    if any(place.iterdir()):
        reason = _why_not_ours(place)
        if reason and overwrite:
            raise ConfigError(
                f"output `{output}` {reason}, and only exported models are replaced", "give another folder"
            )
        if not overwrite:
            hint = "give another folder" if reason else "give another folder, or --overwrite"
            raise ConfigError(f"output `{output}` exists and is not empty", hint)
    here = Path.cwd()
    if place.samefile(here) or any(place.samefile(parent) for parent in here.parents):
        raise ConfigError(f"output `{output}` is the folder you are in, which cannot be replaced", "name a new folder")
    if os.path.ismount(place):
        raise ConfigError(f"output `{output}` is a mount point, which cannot be replaced", "name a folder inside it")


def _why_not_ours(folder: Path) -> str | None:
    """Return what shows that a folder is not just a model of ours."""
    if not (folder / MANIFEST_NAME).is_file():
        return f"holds no {MANIFEST_NAME}"
    names = sorted(path.name for path in folder.iterdir())
    other = next((name for name in names if not any(fnmatch(name, known) for known in EXPORTED)), None)
    return f"also holds `{other}`" if other else None


def _check_writable(output: Path, place: Path) -> None:
    parent = next(folder for folder in place.parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"output `{output}` cannot be made: `{parent}` is a file", "give another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"output `{output}` cannot be made: `{parent}` may not be written", "give another folder")


def _lock(path: Path) -> BaseFileLock:
    """Return the lock of a work folder, held; both are made if absent."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    try:
        while not (lock.is_locked and path.exists()):  # its last holder may remove it between our opening and locking
            lock.release()
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"another edge-run is at work in `{path.parent}`", "wait until it has ended, or name another output"
        ) from error
    except OSError as error:
        raise ConfigError(f"`{path.parent}` cannot be written: {error.strerror}", "name another output") from error
    return lock


def _release(lock: BaseFileLock, path: Path) -> None:
    """Release a lock, and remove its file where it is all that the work folder holds."""
    is_last = [entry.name for entry in path.parent.iterdir()] == [LOCK_NAME]
    if is_last and sys.platform != "win32":
        path.unlink()  # while it is held, so that nobody else's is removed
    lock.release()
    if is_last and sys.platform == "win32":  # no open file can be removed there, nobody else's either
        with contextlib.suppress(OSError):
            path.unlink()
