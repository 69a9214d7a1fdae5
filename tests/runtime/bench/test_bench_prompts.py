"""Files of prompts: what is read, and the line that an error names."""

import pytest

from edge_runtime.bench.prompts import ONE_CATEGORY, Prompt, read_prompts
from edge_runtime.errors import ConfigError


@pytest.fixture
def file_of(tmp_path):
    """Return a function that writes lines into a file."""

    def write(*lines: bytes):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b"\n".join(lines))
        return path

    return write


def test_lines_keep_their_order_category_and_number(file_of):
    path = file_of(b'{"prompt": "a", "category": "x", "id": 7}', b"", '{"prompt": "ä\u2028"}\r'.encode())
    assert read_prompts(path) == [Prompt("a", "x", 1), Prompt("ä\u2028", ONE_CATEGORY, 3)]


def test_first_turn_stands_for_the_prompt(file_of):
    """As MT-bench and Spec-Bench have it."""
    assert read_prompts(file_of(b'{"turns": ["a", "b"], "category": "x"}')) == [Prompt("a", "x", 1)]


def test_byte_order_mark_is_no_part_of_a_prompt(file_of):
    assert read_prompts(file_of(b'\xef\xbb\xbf{"prompt": "a"}')) == [Prompt("a", ONE_CATEGORY, 1)]


def test_limit_is_of_each_category(file_of):
    lines = [b'{"prompt": "%d", "category": "%s"}' % (i, category) for i, category in enumerate([b"x", b"x", b"y"] * 2)]
    assert [prompt.text for prompt in read_prompts(file_of(*lines), limit=2)] == ["0", "1", "2", "5"]


@pytest.mark.parametrize(
    "line",
    [
        b"Once upon a time",
        b'{"prompt": "a"',
        b'{"prompt": "\xff"}',
        b'["a"]',
        b'{"text": "a"}',
        b'{"prompt": ""}',
        b'{"prompt": 3}',
        b'{"prompt": "a", "category": null}',
        b'{"turns": []}',
        b'{"turns": "a"}',
    ],
)
def test_bad_line_is_named(file_of, line):
    with pytest.raises(ConfigError, match=r"line 2 of `.*prompts\.jsonl` is") as caught:
        read_prompts(file_of(b'{"prompt": "a"}', line))
    assert '"prompt"' in caught.value.hint


def test_empty_file_is_refused(file_of):
    with pytest.raises(ConfigError, match="no prompt"):
        read_prompts(file_of(b"", b" "))
