"""Text files become windows of token ids: each once, in a fixed random order, a few held out.

A window is `length` tokens of the concatenated documents, which an end-of-text token separates. Equal windows are kept
once: what a text repeats would otherwise be trained on twice. Which windows are held out follows from their hash
alone, so the same window is held out whatever else is in the corpus.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edge_export.one_epoch import window_hash
from edge_runtime.errors import ConfigError

Windows = NDArray[np.uint32]
"""(N, length) token ids."""

DOCUMENTS_AT_ONCE = 64
"""Documents tokenized in one call, which shares them over the cores."""
HELD_OUT = 64
"""One window in this many is held out."""


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of a list of files and folders, in a stable order.

    Raises:
        ConfigError: A path does not exist, or there is no file at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"`{path}` does not exist", "give text files, or folders of them")
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not found:
        raise ConfigError("there is no file to train on", "give text files, or folders of them")
    return found


def tokenize(
    files: Sequence[Path], tokenizer: Tokenizer, end_of_text: int, on_file: Callable[[int, int], None] | None = None
) -> NDArray[np.uint32]:
    """Return the tokens of all files, each followed by the end-of-text token, (T,).

    Args:
        files: UTF-8 text; files that are not are left out, so that a folder of sources may hold what it likes.
        tokenizer: The target's own.
        end_of_text: Id that separates documents.
        on_file: Called with files done and files wanted.

    Raises:
        ConfigError: The files hold no text.
    """
    parts: list[NDArray[np.uint32]] = []
    for begin in range(0, len(files), DOCUMENTS_AT_ONCE):
        some = files[begin : begin + DOCUMENTS_AT_ONCE]
        texts = [text for text in map(read_text, some) if text.strip()]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end_of_text], np.uint32))
        if on_file:
            on_file(begin + len(some), len(files))
    if not parts:
        raise ConfigError(f"the {len(files)} files hold no text", "give UTF-8 text files")
    return np.concatenate(parts)


def read_text(path: Path) -> str:
    """Return a file's text; nothing where it is not text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return "" if "\0" in text else text


def cut(tokens: NDArray[np.uint32], length: int) -> Windows:
    """Return the distinct windows of a token stream, in order; the incomplete rest is left out.

    Raises:
        ConfigError: The stream is shorter than one window.
    """
    count = len(tokens) // length
    if count == 0:
        raise ConfigError(
            f"the text has {len(tokens)} tokens, but a window needs {length}", "give more text, or a shorter --window"
        )
    windows = tokens[: count * length].reshape(count, length)
    _, first = np.unique(np.fromiter(map(window_hash, windows), np.uint64, count), return_index=True)
    return windows[np.sort(first)]


def split(windows: Windows) -> tuple[Windows, Windows]:
    """Return the windows to train on and those held out, about one in HELD_OUT; at least one of each if possible."""
    held_out = np.fromiter((window_hash(window) % HELD_OUT == 0 for window in windows), bool, len(windows))
    if not held_out.any() and len(windows) > 1:
        held_out[-1] = True
    return windows[~held_out], windows[held_out]


def shuffled(windows: Windows, seed: int) -> Windows:
    """Return the windows in a random order that depends on the seed alone."""
    return windows[np.random.default_rng(seed).permutation(len(windows))]


def mix(parts: Sequence[tuple[Windows, float]], seed: int) -> Windows:
    """Mix several corpora in given shares, as many windows as the scarcest allows, each at most once.

    Args:
        parts: Windows of one length, and the share of each in the mixture.
        seed: Random seed of the order and of the choice of windows.
    """
    total = min(len(windows) / share for windows, share in parts)
    taken = [shuffled(windows, seed + i)[: int(total * share)] for i, (windows, share) in enumerate(parts)]
    return shuffled(np.concatenate(taken), seed)


def batches(windows: Windows, size: int) -> Iterator[Windows]:
    """Yield batches of `size` windows in order; the incomplete rest is left out."""
    for begin in range(0, len(windows) - size + 1, size):
        yield windows[begin : begin + size]


def made_once(path: Path, make: Callable[[Path], None], *, is_main: bool = True) -> Path:
    """Have a file made, whole or not at all, where it is not there; of several processes the first makes it.

    Args:
        path: The file.
        make: Writes it under the name it is given.
        is_main: Whether this process is the first; the others wait for the file.
    """
    if is_main and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name("new-" + path.name)
        make(temporary)
        os.replace(temporary, path)
    while not path.exists():  # no barrier: a target may write answers for longer than one lasts
        time.sleep(0.5)
    return path


def load_or_make(path: Path, make: Callable[[], Windows], *, is_main: bool = True) -> Windows:
    """Return an array kept on disk, memory-mapped; `made_once` where it is not there."""

    def write(new: Path) -> None:
        with new.open("wb") as file:
            np.save(file, make())

    kept: Windows = np.load(made_once(path, write, is_main=is_main), mmap_mode="r")
    return kept


def train_bpe(files: Iterable[Path], vocab_size: int, end_of_text: str) -> Tokenizer:
    """Return a byte-level BPE tokenizer of some texts; `end_of_text` is its token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end_of_text],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(read_text, files), trainer)
    return tokenizer


def fingerprint(*parts: object) -> str:
    """Return a short name for what an array was made from."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
