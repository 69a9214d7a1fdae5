"""Keys and values on disk: what is read is what was written, by this very model, or it is not used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.errors import ConfigError
from edge_runtime.models.attention import FULL, LayerPattern
from edge_runtime.models.base import advance, catch_up
from edge_runtime.models.kv.files import NotTrustedError, Snapshot, read_blocks, read_header, trusted
from edge_runtime.models.kv.folder import SUFFIX, PrefixFolder
from edge_runtime.models.kv.pool import BlockPool
from edge_runtime.models.kv.sequence import Sequences
from edge_runtime.models.kv.store import Prefix
from tests.runtime.models.test_sequences import assert_right, folder, fresh, ids, load

__all__ = ["folder", "fresh"]

BLOCK, FACTS = 16, {"model": "tiny", "release": "1"}
WINDOW = LayerPattern(window=2 * BLOCK, sink=3, stride=3)


class Memory:
    """Two tensors, of 3 and 2 bytes a block."""

    block_bytes, can_move, layout = 5, True, ("u8 [3]", "u8 [2]")

    def __init__(self) -> None:
        self.tensors = [np.zeros((0, size), np.uint8) for size in (3, 2)]

    def resize(self, num_blocks: int, kept: np.ndarray) -> None:
        for number, old in enumerate(self.tensors):
            self.tensors[number] = np.zeros((num_blocks, old.shape[1]), np.uint8)
            self.tensors[number][: len(kept)] = old[kept]

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        for tensor in self.tensors:
            tensor[targets] = tensor[sources]

    def read(self, blocks: np.ndarray) -> list[np.ndarray]:
        return [tensor[blocks] for tensor in self.tensors]

    def write(self, blocks: np.ndarray, content: np.ndarray) -> int:
        begin = 0
        for tensor in self.tensors:
            end = begin + len(blocks) * tensor.shape[1]
            tensor[blocks] = content[begin:end].reshape(len(blocks), -1)
            begin = end
        return begin


def make_pools() -> list[BlockPool]:
    return [BlockPool(Memory(), FULL, BLOCK), BlockPool(Memory(), WINDOW, BLOCK, 4, 2)]


def make_prefix(token_ids: list[int], pools: list[BlockPool] | None = None) -> Prefix:
    """Return a prefix whose blocks hold random bytes, and whose window has moved on."""
    sequence = Sequences(pools or make_pools(), 10_000, 0).open([])
    random = np.random.default_rng(token_ids)
    for past in range(0, len(token_ids), 8):
        end = min(past + 8, len(token_ids))
        for table in sequence.tables:
            table.hold(past, end)
            blocks = table.table[:, past // BLOCK]
            table.pool.memory.write(blocks, random.integers(0, 255, 5 * len(blocks), np.uint8))
    sequence.token_ids[:] = token_ids
    return sequence


def text(number: int, length: int = 150) -> list[int]:
    return [number, *range(100, 99 + length)]


def content_of(prefix: Prefix) -> list[bytes]:
    return [part.tobytes() for table in prefix.tables for part in table.pool.memory.read(table.blocks())]


def read(path: Path, pools: list[BlockPool] | None = None) -> Prefix:
    return read_blocks(read_header(path, FACTS), pools or make_pools())


def test_what_is_read_is_what_was_written(tmp_path):
    """Also where a window has forgotten its middle; it can be continued from the same places."""
    prefix = make_prefix(text(1))
    Snapshot.of(prefix).write(tmp_path / "file", FACTS)
    got = read(tmp_path / "file")
    assert got.token_ids == text(1)
    assert content_of(got) == content_of(prefix)
    for ours, theirs in zip(prefix.tables, got.tables, strict=True):
        assert ((ours.table >= 0).sum(), ours.left) == ((theirs.table >= 0).sum(), theirs.left)
    assert [prefix.can_keep(n) for n in range(150)] == [got.can_keep(n) for n in range(150)]
    assert os.listdir(tmp_path) == ["file"]
    got.release()
    assert not any(table.pool.refs.any() for table in got.tables)


def test_every_byte_that_is_changed_is_found(tmp_path):
    path, pools = tmp_path / "file", make_pools()
    Snapshot.of(make_prefix(text(1, 40))).write(path, FACTS)
    whole = path.read_bytes()
    assert len(whole) < 2000
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(NotTrustedError):
            read(path, pools)
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:20], b"", whole + b"\0"):
        path.write_bytes(damaged)
        with pytest.raises(NotTrustedError):
            read(path, pools)
    assert not any(pool.refs.any() or pool.tables for pool in pools)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"hello", "holds no keys and values that this release"),
        (None, "cannot be read"),
        ({"model": "tiny", "release": "2"}, "was made with another release"),
        ({"model": "large", "release": "1"}, "was made with another model"),
    ],
    ids=["foreign", "absent", "release", "model"],
)
def test_what_is_not_trusted_is_one_line(tmp_path, caplog, content, told):
    path = tmp_path / "file"
    if isinstance(content, dict):
        Snapshot.of(make_prefix(text(1))).write(path, content)
    elif content:
        path.write_bytes(content)
    assert trusted(lambda: read(path), path) is None
    (record,) = caplog.records
    assert told in record.getMessage() and str(path) in record.getMessage() and "\n" not in record.getMessage()


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    Snapshot.of(make_prefix(text(1))).write(path, FACTS)

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        Snapshot.of(make_prefix(text(2))).write(path, FACTS)
    assert read(path).token_ids == text(1)
    assert os.listdir(tmp_path) == ["file"]


SAVER = """
import os, signal, sys
from pathlib import Path
from tests.runtime.models.test_prefix_files import FACTS, Snapshot, make_prefix, text
path, deed = Path(sys.argv[1]), sys.argv[2]
snapshots = [Snapshot.of(make_prefix(text(number, 4000))) for number in (1, 2)]
snapshots[0].write(path, FACTS)
print("ready", flush=True)
if deed == "points":  # one child for each place in which a process can be killed
    for name in ("fsync", "replace"):
        for is_before in (True, False):
            if os.fork() == 0:
                original = getattr(os, name)
                def killed(*args):
                    is_before or original(*args)
                    os.kill(os.getpid(), signal.SIGKILL)
                setattr(os, name, killed)
                snapshots[1].write(path, FACTS)
            os.wait()
            print(name, is_before, path.stat().st_ino, flush=True)
while deed == "forever":
    for snapshot in reversed(snapshots):
        snapshot.write(path, FACTS)
for _ in range(60 if deed == "often" else 0):
    snapshots[0].write(path, FACTS)
"""


def start(path: Path, deed: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", SAVER, path, deed], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the children of this test are forks")


@needs_fork
def test_a_process_that_is_killed_at_any_place_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "file"
    process = start(path, "points")
    told = process.communicate()[0].split("\n")[:-1]
    inodes = [line.split()[2] for line in told]
    assert len(set(inodes[:3])) == 1 and inodes[3] != inodes[0], "only after the move the new file is there"
    assert read(path).token_ids == text(2, 4000)


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    chance, found = np.random.default_rng(0), set()
    for turn in range(50):
        path = tmp_path / str(turn % 3)
        process = start(path, "forever")
        time.sleep(chance.random() * 0.05)
        process.kill()
        process.communicate()
        found.add(read(path).token_ids[0])
    assert found == {1, 2}


def test_two_processes_may_save_the_same(tmp_path):
    path = tmp_path / "file"
    others = [start(path, "often") for _ in range(2)]
    while any(process.poll() is None for process in others):
        assert read(path).token_ids == text(1, 4000)
    assert [process.communicate() and process.returncode for process in others] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]


def make_folder(path: Path, pools: list[BlockPool], max_bytes: int = 10**6, facts: dict | None = None) -> PrefixFolder:
    return PrefixFolder(path, facts or FACTS, pools, max_bytes)


def test_a_folder_keeps_what_the_next_process_wants(tmp_path):
    """A longer text takes the place of its beginning; several models share a folder, and take their own."""
    pools = make_pools()[:1]
    first, other = make_folder(tmp_path / "new", pools), make_folder(tmp_path / "new", pools, facts={"model": "other"})
    for one in (first, other):
        for length in (150, 40, 200):
            one.save(make_prefix(text(1, length), pools))
        one.save(make_prefix(text(2), pools))
        one.save(make_prefix(text(3, BLOCK - 1), pools))  # not worth a file
        one.finish()
    assert len(os.listdir(tmp_path / "new")) == 4
    after = make_folder(tmp_path / "new", pools)
    file = after.longest([*text(1, 200), 5], 1)
    assert file and len(file.token_ids) == 200
    assert content_of(after.load(file)) == content_of(make_prefix(text(1, 200), make_pools()[:1]))
    assert after.longest([*text(1, 200), 5], 201) is None
    assert after.longest([7, 8, 9], 1) is None
    assert after.longest(text(2, 100), 1).token_ids == text(2)


def test_a_file_whose_window_has_moved_on_is_no_beginning(tmp_path):
    """Of a longer text that cannot be continued from there, the shorter one stays beside."""
    pools = make_pools()
    made = make_folder(tmp_path, pools)
    for length in (40, 150):
        made.save(make_prefix(text(1, length), pools))
    made.finish()
    assert len(make_folder(tmp_path, pools).longest(text(1, 41), 1).token_ids) == 40
    assert make_folder(tmp_path, pools).longest(text(1, 100), 41) is None


def test_the_files_of_a_folder_are_bounded_in_bytes(tmp_path):
    """Those that were not used for longest go first, of whatever model."""
    pools = make_pools()
    size = Snapshot.of(make_prefix(text(0))).write(tmp_path / "probe", FACTS).num_bytes
    made = make_folder(tmp_path / "kept", pools, max_bytes=int(3.5 * size))
    for number in range(3):
        made.save(make_prefix(text(number), pools))
        made.finish()
        for path in (tmp_path / "kept").iterdir():  # as if a second had passed
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1))
    made.load(made.longest([*text(0), 5], 1))
    made.save(make_prefix(text(3), pools))
    made.finish()
    assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= 3.5 * size
    after = make_folder(tmp_path / "kept", pools)
    assert [bool(after.longest([*text(number), 5], 1)) for number in range(4)] == [True, False, True, True]
    after.forget(text(2))
    assert after.longest([*text(2), 5], 1) is None


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (f".a{SUFFIX}.12.tmp", f".b{SUFFIX}.34.tmp"):
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / f".a{SUFFIX}.12.tmp", (0, 0))
    make_folder(tmp_path, make_pools())
    assert os.listdir(tmp_path) == [f".b{SUFFIX}.34.tmp"]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path, caplog, monkeypatch):
    pools = make_pools()
    made = make_folder(tmp_path, pools)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(13, "Permission denied")))
    made.save(make_prefix(text(1), pools))
    made.finish()
    (record,) = caplog.records
    assert "cannot be written, so a later run computes it again: Permission denied" in record.getMessage()
    assert os.listdir(tmp_path) == []


@pytest.mark.kernels
@pytest.mark.parametrize("length", [5, 64, 200])
def test_a_model_goes_on_from_a_file(folder, fresh, tmp_path, length):
    """Another model of the same folder, with the logits of one that read the tokens itself."""
    path, wanted = tmp_path / "file", [*ids(length), *ids(10, 1)]
    load(folder).save(path, ids(length))
    model = load(folder)
    assert model.load(path) == length
    sequence = model.sequence(wanted)
    assert sequence.num_tokens == length
    assert_right(fresh, sequence, catch_up(model, sequence, wanted).copy())
    for token_id in ids(70, 2):
        rows = advance(model, sequence, [token_id])
    assert_right(fresh, sequence, rows.copy())


def test_a_model_with_other_arithmetic_computes_it_itself(tiny_ir, tmp_path, caplog):
    path = tmp_path / "file"
    load((tiny_ir("llama"), {})).save(path, ids(50))
    for options in ({"kv_precision": "u8"}, {"attention": "block_sparse"}):
        assert load((tiny_ir("llama"), options)).load(path) == 0
    assert load((tiny_ir("gpt2"), {})).load(path) == 0
    assert load((tiny_ir("llama"), {"num_threads": 2, "context_length": 100})).load(path) == 50
    told = [record.getMessage().partition("` ")[2] for record in caplog.records]
    assert told == [
        "was made with another set of options, so it is not used",
        "was made with another attention pattern, so it is not used",
        "was made with another model, so it is not used",
    ]


@pytest.mark.kernels
@pytest.mark.parametrize("attention", ["stock", "block_sparse"])
def test_a_closed_model_leaves_its_chats_to_the_next(attention, tiny_ir, tmp_path):
    """With prefix_cache_dir; what has left memory before is there too."""
    options = {"prefix_cache_dir": tmp_path / "kept", "prefix_cache_bytes": 200_000}
    chats = [ids(180, seed) for seed in range(4)]

    def run() -> list[int]:
        model, known = load((tiny_ir("llama"), {"attention": attention}), **options), []
        for number, chat in enumerate(chats):
            sequence = model.sequence([*chat, 5])
            known.append(sequence.num_tokens)
            catch_up(model, sequence, chat)
            chats[number] = [*chat, *ids(3, number)]
            sequence.close()
        model.close()
        return known

    assert run() == [0, 0, 0, 0]
    sizes = [path.stat().st_size for path in (tmp_path / "kept").iterdir()]
    assert sum(sizes) <= 200_000
    assert run().count(180) == len(sizes)


def test_a_path_that_cannot_be_written_is_one_line(tiny_ir, tmp_path):
    model = load((tiny_ir("llama"), {}))
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        model.save(tmp_path / "absent" / "file", ids(40))
    assert model.sequence(ids(40)).num_tokens == 39, "what was computed is kept"
