"""Whether a model's files are still what its export wrote: sizes at every load, SHA-256 once for each file.

One changed byte of the weights gives another answer and no error. Hashing takes 1.1 s for a gigabyte (SHA-NI, one
core), too long to wait for at every start, so a load hashes while the model compiles, and a large file only where it
was not found whole before: path, size and times of change of such files are kept in the user's cache folder. Where
that cannot be written, each load hashes. Folders whose manifest has no checksums are not checked.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.background import Background
from edge_runtime.errors import ModelFormatError
from edge_runtime.user_folders import cache_folder

KEPT_FROM_BYTES = 16 << 20
"""A smaller file is hashed at each load, within 20 ms."""
_CHUNK = 1 << 20
HINT = "copy, pull or export the model again; after a change of your own, remove `files` from its edge_model.json"


class FileFacts(NamedTuple):
    """What an export wrote.

    Attributes:
        num_bytes: Size of the file.
        sha256: Its hash, in hexadecimal digits.
    """

    num_bytes: int
    sha256: str


Files = Mapping[str, FileFacts]


def facts_of(folder: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Return size and hash of those files that are in a folder."""
    paths = [folder / name for name in names if (folder / name).is_file()]
    return {path.name: FileFacts(path.stat().st_size, _sha256(path)) for path in paths}


def check_sizes(folder: Path, files: Files) -> None:
    """Refuse a folder in which a file is missing, cut short or too long.

    Raises:
        ModelFormatError: One is.
    """
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise ModelFormatError(f"`{path}` is missing", HINT)
        if (size := path.stat().st_size) != facts.num_bytes:
            raise ModelFormatError(f"`{path}` has {size:,} bytes, but was exported with {facts.num_bytes:,}", HINT)


def damaged(folder: Path, files: Files) -> list[str]:
    """Return the names of files that are not what they were, each read in full."""
    return [name for name, facts in files.items() if facts_of(folder, [name]).get(name) != facts]


@contextlib.contextmanager
def checked(models: Sequence[tuple[Path, Files]]) -> Iterator[None]:
    """Check sizes at once, and hash what was not found whole before while the block runs.

    Args:
        models: Folders, and what their manifests say of the files in them.

    Raises:
        ModelFormatError: A file has another size, or, at the end of the block, is not what it was.
    """
    for model in models:
        check_sizes(*model)
    found: list[Path] = []
    stop = threading.Event()

    def look() -> None:
        for folder, files in models:
            found.extend(folder / name for name, facts in files.items() if not _is_whole(folder / name, facts, stop))

    hashing = Background(look)
    failure: ModelFormatError | None = None
    try:
        yield
    except ModelFormatError as error:
        failure = error  # a damaged file may be why
    except BaseException:
        stop.set()
        raise
    finally:
        hashing.result()
    if found:
        raise ModelFormatError(
            f"`{found[0]}` is damaged: its SHA-256 is not the one it was exported with", HINT
        ) from failure
    if failure:
        raise failure


def _is_whole(path: Path, facts: FileFacts, stop: threading.Event) -> bool:
    """Whether a file is what it was, as far as anybody still wants to know."""
    try:
        entry = _Entry(path, facts)
        if entry.is_kept():
            return True
        digest = _sha256(path, stop)
    except OSError:
        return True  # the loader says what is wrong with it
    if digest == facts.sha256:
        entry.keep()
    return stop.is_set() or digest == facts.sha256


class _Entry:
    """A file in the user's cache that says that another one was found whole."""

    def __init__(self, path: Path, facts: FileFacts) -> None:
        place, state = path.resolve(), path.stat()
        self._is_wanted = state.st_size >= KEPT_FROM_BYTES
        import hashlib

        name = hashlib.blake2b(str(place).encode(errors="surrogateescape"), digest_size=16).hexdigest()
        self._file = cache_folder() / "verified" / name
        self._content = f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {facts.sha256}\n"

    def is_kept(self) -> bool:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            return self._is_wanted and self._file.read_text(encoding="ascii") == self._content
        return False

    def keep(self) -> None:
        if not self._is_wanted:
            return
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self._content, encoding="ascii")
            os.replace(temporary, self._file)


def _sha256(path: Path, stop: threading.Event | None = None) -> str:
    """Return a file's hash; a meaningless one where `stop` is set meanwhile."""
    import hashlib  # 5 ms, in the thread that needs it

    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while (chunk := file.read(_CHUNK)) and not (stop and stop.is_set()):
            digest.update(chunk)
    return digest.hexdigest()
