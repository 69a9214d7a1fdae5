"""A folder of files that hold what models had read before: of this process and of those before it.

Several models and processes may share a folder. The name of a file says whose it is and what it holds, so that each
looks at its own only. What they hold together is bounded in bytes; the file that was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from edge_runtime import strict_json
from edge_runtime.background import Background
from edge_runtime.models.base import num_common
from edge_runtime.models.kv.files import Facts, PrefixFile, Snapshot, read_blocks, read_header, trusted
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.store import Prefix

_log = logging.getLogger(__name__)

SUFFIX = ".edgekv"
_ABANDONED_S = 3600
"""A file that nobody has finished to write in this time never will be."""


class PrefixFolder:
    """The files of one model in a folder.

    Args:
        folder: Made if absent.
        facts: About the model.
        pools: Its blocks.
        max_bytes: Most bytes of all files in the folder.
    """

    def __init__(self, folder: Path, facts: Facts, pools: Sequence[BlockPool], max_bytes: int) -> None:
        self._folder, self._facts, self._pools, self._max_bytes = folder, facts, pools, max_bytes
        self._key = _digest(strict_json.dumps(facts))
        self._files: dict[Path, PrefixFile] = {}
        self._writing: Background[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        for path in folder.glob(f"{self._key}-*{SUFFIX}"):
            if file := trusted(partial(read_header, path, facts), path):
                self._files[path] = file

    def longest(self, token_ids: list[int], least: int) -> PrefixFile | None:
        """Return the file that holds most of the beginning of `token_ids`, at least so many tokens; None for none."""
        best, found = least - 1, None
        for file in list(self._files.values()):
            if file.token_ids[: best + 1] == token_ids[: best + 1]:
                count = min(num_common(token_ids, file.token_ids, best + 1), len(token_ids) - 1)
                if count > best and file.can_keep(count, self._pools):
                    best, found = count, file
        return found

    def load(self, file: PrefixFile) -> Prefix | None:
        """Return what a file holds; None where it cannot be trusted, which is logged."""
        prefix = trusted(lambda: read_blocks(file, self._pools), file.path)
        if prefix is None:
            self._files.pop(file.path, None)
        else:
            _touch(file.path)
        return prefix

    def save(self, prefix: Prefix) -> None:
        """Write a prefix, in a thread of its own; where that fails it is logged."""
        if prefix.num_tokens < self._pools[0].block_size or self._is_held(prefix):
            return
        snapshot = Snapshot.of(prefix)
        if snapshot.num_bytes <= self._max_bytes:
            self.finish()
            self._writing = Background(lambda: self._write(snapshot), daemon=False)

    def finish(self) -> None:
        """Wait until all is written."""
        if self._writing:
            self._writing.result()
            self._writing = None

    def forget(self, token_ids: list[int]) -> None:
        """Remove what shares a block with these tokens."""
        self.finish()
        for file in list(self._files.values()):
            if num_common(file.token_ids, token_ids) >= self._pools[0].block_size:
                self._remove(file.path)

    def _is_held(self, prefix: Prefix) -> bool:
        """Whether a file has all of a prefix that it can be continued from."""
        count = prefix.num_tokens
        for file in list(self._files.values()):
            if file.token_ids[:count] == prefix.token_ids and file.can_keep(count, self._pools):
                return _touch(file.path)
        return False

    def _write(self, snapshot: Snapshot) -> None:
        path = self._folder / f"{self._key}-{_digest(strict_json.dumps(snapshot.token_ids))}{SUFFIX}"
        try:
            written = self._files[path] = snapshot.write(path, self._facts)
        except OSError as error:
            _log.warning("`%s` cannot be written, so a later run computes it again: %s", path, error.strerror)
            return
        for file in list(self._files.values()):
            count = len(file.token_ids)
            is_shorter = file is not written and written.token_ids[:count] == file.token_ids
            if is_shorter and written.can_keep(count, self._pools):
                self._remove(file.path)
        self._trim()

    def _trim(self) -> None:
        """Remove the files that were not used for longest, of whatever model, until the others fit the bound."""
        files = sorted(_states(self._folder), reverse=True)
        total = 0
        for _, size, path in files:
            total += size
            if total > self._max_bytes:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        self._files.pop(path, None)
        with contextlib.suppress(OSError):  # another process was faster, or, on Windows, has it open
            path.unlink()

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed had begun to write."""
        for path in self._folder.glob(f".*{SUFFIX}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()


def _states(folder: Path) -> list[tuple[float, int, Path]]:
    """Return time of last use, size and path of each file."""
    states = []
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            states.append((path.stat().st_mtime, path.stat().st_size, path))
    return states


def _touch(path: Path) -> bool:
    """Note that a file is used; return whether it is there."""
    try:
        os.utime(path)
    except OSError:
        return path.exists()
    return True


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:24]
