"""Which tokens end an answer: those that a model's files name, and the one that its chat template ends a turn with.

generation_config.json often names one token, such as `<|endoftext|>`, while the chat template ends each turn with
another, such as `<|im_end|>`: a chat then runs on into the next speaker's turn. So an answer ends at any of

    eos_token_id of generation_config.json, or else of config.json     `manifest.load_manifest`
    eos_token_id of config.json                                        where it is no ordinary word
    eos_token of the tokenizer
    the token that the chat template puts after an assistant's words

The last is found by rendering a chat. A token that opens a turn, which may follow where a template ends none, is not
taken for an end. Old configs name token 2 where the author named none, which is `#` in many vocabularies: hence the
ordinary words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MANIFEST_NAME, Manifest, read_json
from edge_runtime.text.chat_template import Message
from edge_runtime.text.tokenizer import Tokenizer

_USER, _ASSISTANT = "Otters", "Swimming"
_CHAT: tuple[Message, ...] = ({"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT})


def answer_ends(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return every id that ends an answer; a manifest has them, for a folder without one they are looked for."""
    if (folder / MANIFEST_NAME).is_file():
        return manifest.eos_token_ids
    return (*manifest.eos_token_ids, *further_ends(folder, manifest.eos_token_ids, tokenizer))


def further_ends(folder: Path, known: Iterable[int], tokenizer: Tokenizer) -> dict[int, str]:
    """Return the ids beyond `known` that end an answer, each with the place that names it."""
    eos, template = tokenizer.special_token("eos_token"), template_end(tokenizer)
    found: dict[int | None, str] = {template: "the chat template"}
    found[tokenizer.token_id(eos) if eos else None] = "the tokenizer's eos_token"
    found |= dict.fromkeys(_config_ends(folder) & tokenizer.added_token_ids, "config.json")
    return {token_id: place for token_id, place in found.items() if token_id is not None and token_id not in known}


def template_end(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that the chat template puts after an assistant's words; None where it puts none."""
    try:
        pieces = _pieces(tokenizer.apply_chat_template(_CHAT, add_generation_prompt=False), tokenizer)
    except ConfigError:  # no template, or one that wants other messages
        return None
    answer = next((piece for piece in reversed(pieces) if _ASSISTANT in piece.text), None)
    if answer is None or answer.text.rpartition(_ASSISTANT)[2].strip():
        return None
    return None if answer.after in _openers(pieces, tokenizer) else answer.after


class _Piece(NamedTuple):
    """Words of a chat, and the added tokens around them."""

    before: int | None
    text: str
    after: int | None


def _pieces(token_ids: Sequence[int], tokenizer: Tokenizer) -> list[_Piece]:
    added = tokenizer.added_token_ids
    cuts = [place for place, token_id in enumerate(token_ids) if token_id in added]
    before: list[int | None] = [None, *(token_ids[cut] for cut in cuts)]
    texts = [
        tokenizer.decode(token_ids[begin + 1 : end])
        for begin, end in zip([-1, *cuts], [*cuts, len(token_ids)], strict=True)
    ]
    return [_Piece(*piece) for piece in zip(before, texts, [*before[1:], None], strict=True)]


def _openers(pieces: Sequence[_Piece], tokenizer: Tokenizer) -> set[int | None]:
    """Return the ids that begin the text or a turn: those at the start, and those right before somebody's words."""
    bos = tokenizer.special_token("bos_token")
    begin = {None, tokenizer.token_id(bos) if bos else None}
    opening = itertools.takewhile(lambda piece: piece.before in begin and not piece.text.strip(), pieces)
    speaking = (piece for piece in pieces if piece.text.lstrip().startswith((_USER, _ASSISTANT)))
    return begin | {piece.after for piece in opening} | {piece.before for piece in speaking}


def _config_ends(folder: Path) -> frozenset[int]:
    config = read_json(folder / "config.json")
    named = [part.get("eos_token_id") for part in (config, config.get("text_config") or {})]
    ids = [token_id for some in named for token_id in (some if isinstance(some, list) else [some])]
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))
