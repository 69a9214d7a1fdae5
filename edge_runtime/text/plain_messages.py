"""Encode messages so that special tokens spelled out in them stay text: who writes a message cannot end its turn.

Before the template sees a message, a mark is put into each special token in it, after the first character; the template
may trim, split and compare as ever. In the rendered text the marks tell the message's spellings from the template's
own tokens: the library finds the latter, and each stretch between two of them that holds a mark is encoded anew,
without marks, by a tokenizer that has the same model but no special tokens. Chats without such spellings, nearly all,
are encoded as if this module did not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

_MARKS = range(0xE000, 0xF8F0)
"""Characters for private use, which no tokenizer treats in a way of its own."""


class PlainMessages:
    """Knows the special tokens of a tokenizer.

    Args:
        tokenizer: Encodes the rendered text.
        named: Further tokens that count as special, such as the end of text, however the tokenizer lists them.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, named: Iterable[str]) -> None:
        added = tokenizer.get_added_tokens_decoder()
        known = {token.content for token in added.values()}
        special = {token.content for token in added.values() if token.special} | (known & set(named))
        breakable = sorted((token for token in special if len(token) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, breakable)) or r"(?!)")
        self._added_ids = frozenset(added)
        self._plain = tokenizers.Tokenizer(tokenizer.model)
        self._plain.normalizer = tokenizer.normalizer
        self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        self._separator = chr(_MARKS.stop)
        self._plain.add_tokens([tokenizers.AddedToken(self._separator, normalized=False)])

    def find_mark(self, *values: Any) -> str | None:
        """Return a character that can mark special tokens in these values; None where there are none to mark."""
        texts = [text for value in values for text in _texts(value)]
        if not any(self._pattern.search(text) for text in texts):
            return None
        used = set("".join(texts))
        return next(character for character in map(chr, _MARKS) if character not in used)

    def mark(self, value: Any, mark: str) -> Any:
        """Return a value whose texts, however deep in lists and dictionaries, have their special tokens marked."""
        if isinstance(value, str):
            while self._pattern.search(value):  # a broken token may begin with another one
                value = self._pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
            return value
        if isinstance(value, Mapping):
            return {name: self.mark(entry, mark) for name, entry in value.items()}
        return [self.mark(entry, mark) for entry in value] if isinstance(value, (list, tuple)) else value

    def encode(self, encoding: tokenizers.Encoding, text: str, mark: str) -> list[int]:
        """Return the ids of a marked text.

        Args:
            encoding: What the tokenizer makes of `text`.
            text: A rendered chat.
            mark: What `find_mark` returned.
        """
        ids: list[int] = []
        begin, first = 0, 0
        bounds = [i for i, token_id in enumerate(encoding.ids) if token_id in self._added_ids]
        for i in [*bounds, len(encoding.ids)]:
            end, after = encoding.offsets[i] if i < len(encoding.ids) else (len(text), len(text))
            stretch = text[begin:end]
            ids += self._encode_plain(stretch.replace(mark, ""), begin) if mark in stretch else encoding.ids[first:i]
            ids += encoding.ids[i : i + 1]
            begin, first = after, i + 1
        return ids

    def _encode_plain(self, text: str, begin: int) -> list[int]:
        """Encode a stretch; some tokenizers put a space before the first one, which others must not get."""
        before = self._separator if begin else ""
        ids: list[int] = self._plain.encode(before + text, add_special_tokens=False).ids
        return ids[len(before) :]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)
