"""A prefix as a file: its tokens, and the bytes of its blocks, which no other process needs to compute again.

    8 bytes    MAGIC
    8 bytes    length of the header, little endian
    32 bytes   SHA-256 of the header
    header     JSON: facts about the model, token ids, where windows begin, size and SHA-256 of what follows
    blocks     for each group of layers and each of its tensors, those of a head one after another

A file is written beside its place and moved there, so that whoever opens it finds the old one or the new. What is read
is believed only where the facts are those of the model that reads it and every byte is what it was.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime import strict_json
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.store import Prefix
from edge_runtime.models.kv.table import BlockTable, finds_all

_log = logging.getLogger(__name__)
T = TypeVar("T")

MAGIC = b"EDGEKV1\n"
"""To be changed with the format, or with what the bytes of a block mean."""
_HEAD_BYTES = 48
_LONGEST_HEADER = 1 << 28

Facts = dict[str, Any]
"""What the bytes of a model's blocks depend on, as JSON has it."""


class NotTrustedError(Exception):
    """A file is damaged or of another model: the message says how, and follows the file's name."""


class PrefixFile(NamedTuple):
    """What the header of a file says, apart from facts that are the model's own.

    Attributes:
        path: The file.
        token_ids: Ids of the tokens.
        left: For each group of layers, how many blocks its window has left behind.
        sha256: Hash of the blocks, in hexadecimal digits.
        offset: Where the blocks begin.
        num_bytes: Size of the file.
    """

    path: Path
    token_ids: list[int]
    left: list[int]
    sha256: str
    offset: int
    num_bytes: int

    def can_keep(self, num_tokens: int, pools: Sequence[BlockPool]) -> bool:
        """Whether a token after the first `num_tokens` finds all that it sees."""
        return all(map(finds_all, pools, self.left, [num_tokens] * len(pools)))


class Snapshot(NamedTuple):
    """A copy of what a prefix holds, to be written whatever becomes of the prefix.

    Attributes:
        token_ids: Ids of the tokens.
        left: For each group of layers, how many blocks its window has left behind.
        blocks: (n, bytes of a block) for each group of layers and each of its tensors.
    """

    token_ids: list[int]
    left: list[int]
    blocks: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, prefix: Prefix) -> Snapshot:
        """Copy a prefix."""
        blocks = [part for table in prefix.tables for part in table.pool.memory.read(table.blocks())]
        return cls(list(prefix.token_ids), [table.left for table in prefix.tables], blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks."""
        return sum(part.nbytes for part in self.blocks)

    def write(self, path: Path, facts: Facts) -> PrefixFile:
        """Write a file, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """
        sha256 = _sha256(self.blocks)
        content = {"left": self.left, "sha256": sha256, "num_bytes": self.num_bytes, "token_ids": self.token_ids}
        header = strict_json.dumps({"model": facts, **content}).encode()
        head = MAGIC + len(header).to_bytes(8, "little") + bytes.fromhex(_sha256([header]))
        temporary = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(head + header)
                for part in self.blocks:
                    file.write(part.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        offset = len(head) + len(header)
        return PrefixFile(path, self.token_ids, self.left, sha256, offset, offset + self.num_bytes)


def read_header(path: Path, facts: Facts) -> PrefixFile:
    """Read the header of a file.

    Raises:
        NotTrustedError: It is damaged, or of another model.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        head, size = file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size
        if head[: len(MAGIC)] != MAGIC:
            raise NotTrustedError("holds no keys and values that this release of edge-run can read")
        length = int.from_bytes(head[8:16], "little")
        header = file.read(min(length, _LONGEST_HEADER))
    if bytes.fromhex(_sha256([header])) != head[16:]:
        raise NotTrustedError("is damaged")
    content = json.loads(header)
    if content["model"] != facts:
        name = next((name for name in facts if content["model"].get(name) != facts[name]), "model")
        raise NotTrustedError(f"was made with another {name}")
    offset = _HEAD_BYTES + length
    if size != offset + content["num_bytes"]:
        raise NotTrustedError("is cut short" if size < offset + content["num_bytes"] else "is too long")
    return PrefixFile(path, content["token_ids"], content["left"], content["sha256"], offset, size)


def read_blocks(file: PrefixFile, pools: Sequence[BlockPool]) -> Prefix:
    """Fill blocks of the pools with those of a file.

    Raises:
        NotTrustedError: It is damaged.
        OSError: It cannot be read.
    """
    content: NDArray[np.uint8] = np.memmap(file.path, np.uint8, "r", file.offset, (file.num_bytes - file.offset,))
    if _sha256([content]) != file.sha256:
        raise NotTrustedError("is damaged")
    prefix = Prefix(list(file.token_ids), [BlockTable(pool) for pool in pools])
    try:
        for table, left in zip(prefix.tables, file.left, strict=True):
            blocks = table.restore(len(file.token_ids), left)
            content = content[table.pool.memory.write(blocks, content) :]
    except BaseException:
        prefix.release()
        raise
    return prefix


def trusted(read: Callable[[], T], path: Path) -> T | None:
    """Return what `read` returns; None, with one line in the log, where it cannot be trusted or read."""
    try:
        return read()
    except (NotTrustedError, LookupError, TypeError, ValueError) as error:
        reason = error if isinstance(error, NotTrustedError) else "is damaged"
        _log.warning("`%s` %s, so it is not used", path, reason)
    except OSError as error:
        _log.warning("`%s` cannot be read, so it is not used: %s", path, error.strerror)
    return None


def _sha256(parts: Sequence[Any]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
