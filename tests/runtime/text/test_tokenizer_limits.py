"""A hostile tokenizer.json ends in one line: too large, too slow, or made to multiply what it reads."""

from __future__ import annotations

import json
import time

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.text import tokenizer_limits
from edge_runtime.text.tokenizer import Tokenizer
from edge_runtime.text.tokenizer_limits import _may_backtrack

KNOWN_PATTERNS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
)


def save(folder, **parts):
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_patterns_of_known_models_need_no_second_thread(pattern):
    assert not _may_backtrack(pattern)


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(a|b*)*c", r"(?:x+y?){2,}", r"(a)\1", r"a*a*a*a*b", r"((ab)+c)*"])
def test_patterns_that_may_backtrack_are_told(pattern):
    assert _may_backtrack(pattern)


def test_tokenizer_that_takes_too_long_is_left_behind(tmp_path, monkeypatch):
    """At a hundred letters each attempt to match takes more steps than there are atoms."""
    monkeypatch.setattr(tokenizer_limits, "LIMIT_S", 0.3)
    tokenizer = Tokenizer(save(tmp_path, pre_tokenizer=pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")))
    assert tokenizer.encode("aaa") == [0]
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"takes more than 0 s for a text of 27 characters|fails on this text"):
        tokenizer.encode("a" * 26 + "!")
    assert time.perf_counter() - started < 5


def test_error_in_native_code_is_one_line(tmp_path):
    """The library panics, which Python knows as an exception that is no Exception."""
    tokenizer = Tokenizer(save(tmp_path))

    class PanicException(BaseException):
        pass

    class Broken:
        def encode(self, *args, **kwargs):
            raise PanicException("retry-limit-in-match over")

    tokenizer._tokenizer = Broken()
    with pytest.raises(ConfigError, match="the model's tokenizer fails on this text: retry-limit"):
        tokenizer.encode("a")


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Replace("a", "b" * 1000)},
        {"normalizer": normalizers.Sequence([normalizers.Replace("a", "aaaaaaaa")] * 10)},
        {"normalizer": normalizers.Prepend("x" * 10_000)},
        {"normalizer": normalizers.Replace(Regex("."), "b" * 1000)},
        {"decoder": decoders.Sequence([decoders.Replace("a", "b" * 1000)])},
    ],
)
def test_rules_that_multiply_a_text_are_refused(tmp_path, parts):
    with pytest.raises(ModelFormatError, match="times as long, expected at most 64"):
        Tokenizer(save(tmp_path, **parts))


def test_rules_of_known_models_are_accepted(shared_data):
    for name in ("gpt2", "phi3", "qwen2"):
        assert not Tokenizer(shared_data / "tokenizers" / name)._may_be_slow


def test_file_and_text_that_are_too_large_are_refused(tmp_path, monkeypatch):
    save(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_limits, "LARGEST_FILE_BYTES", 100)
    with pytest.raises(ModelFormatError, match="MiB, expected at most 0"):
        Tokenizer(tmp_path)
    monkeypatch.setattr(tokenizer_limits, "LONGEST_TEXT", 5)
    assert tokenizer.encode("aaaaa") == [0]
    with pytest.raises(ConfigError, match="the text has 6 characters, expected at most 5"):
        tokenizer.encode("aaaaaa")


def test_padding_and_truncation_of_the_file_are_not_followed(tmp_path):
    """One token would become a billion."""
    save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "a",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer(tmp_path).encode("a") == [0]
