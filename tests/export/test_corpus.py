"""Text becomes distinct windows, in an order and a split that depend on the text and the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from edge_export.corpus import cut, load_or_make, mix, shuffled, split, text_files, tokenize
from edge_runtime.errors import ConfigError

END = 0


@pytest.fixture
def tokenizer():
    words = {"<end>": 0, "a": 1, "b": 2, "c": 3, "[UNK]": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def windows(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, (count, 8)).astype(np.uint32)


def as_set(some):
    return {tuple(window) for window in some.tolist()}


def test_documents_end_with_the_end_token_and_what_is_no_text_is_left_out(tokenizer, tmp_path):
    (tmp_path / "1.txt").write_text("a b")
    (tmp_path / "2.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "3.bin").write_bytes(b"a\x00b")
    (tmp_path / "4.txt").write_text("  \n")
    (tmp_path / "5.txt").write_text("c")
    files = text_files([tmp_path])
    assert [path.name[0] for path in files] == ["1", "2", "3", "4", "5"]
    assert tokenize(files, tokenizer, END).tolist() == [1, 2, END, 3, END]


def test_missing_and_empty_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        text_files([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="no file"):
        text_files([tmp_path])
    (tmp_path / "empty").write_text("")
    with pytest.raises(ConfigError, match="hold no text"):
        tokenize(text_files([tmp_path]), tokenizer, END)


def test_equal_windows_are_kept_once_and_the_rest_is_left_out():
    tokens = np.array([1, 2, 3, 4, 1, 2, 5, 6, 7], np.uint32)
    assert cut(tokens, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
    with pytest.raises(ConfigError, match="9 tokens, but a window needs 10"):
        cut(tokens, 10)


def test_a_window_is_held_out_whatever_else_is_in_the_corpus():
    corpus = windows(2000)
    train, held_out = split(corpus)
    assert len(train) + len(held_out) == len(corpus)
    assert 5 < len(held_out) < 100
    assert as_set(split(corpus[::2])[1]) <= as_set(held_out)
    assert len(split(windows(3))[1]) == 1


def test_a_mixture_has_its_shares_and_no_window_twice():
    text, code = windows(300), windows(400, seed=1)
    mixed = mix([(code, 2 / 3), (text, 1 / 3)], seed=5)
    assert len(mixed) == 600
    assert len(as_set(mixed)) == 600
    assert len(as_set(mixed) & as_set(code)) == 400
    assert np.array_equal(mixed, mix([(code, 2 / 3), (text, 1 / 3)], seed=5))
    assert not np.array_equal(shuffled(text, 1), shuffled(text, 2))


def test_an_array_is_made_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return windows(4)

    for _ in range(2):
        assert np.array_equal(load_or_make(tmp_path / "kept" / "windows.npy", make), windows(4))
    assert made == [1]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["windows.npy"]
