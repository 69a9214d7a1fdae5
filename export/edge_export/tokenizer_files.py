"""The tokenizer of an exported model: the source's own tokenizer.json, or one made of its other files.

tokenizer.json is what a model was trained with, so it is copied byte for byte. transformers keeps the vocabulary of the
file and puts rules of its class around it (version 5 splits a byte-level tokenizer labelled `LlamaTokenizer` as if it
were sentencepiece, and loses the spaces), so it is asked only where there is no tokenizer.json. What
tokenizer_config.json adds is taken over where it cannot be meant otherwise:

    add_bos_token, add_eos_token   where set for a class that heeded them when models were made with it: DeepSeek's R1
                                   models get their first token from there alone
    added_tokens_decoder           a token that tokenizer.json lacks, where it gets the id that is named for it

Every difference is a note of the export. Ids are then compared on texts that expose such rules.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_export.sources import Source
from edge_export.tokenizer_convert import convert
from edge_export.tokenizer_ids import (
    PLAIN_TEXTS,
    check_equal,
    encoded,
    library_tokenizer,
    shown,
    texts_for,
    transformers_tokenizer,
)
from edge_runtime.errors import ConfigError, ExportError
from edge_runtime.manifest import read_json
from edge_runtime.text.chat_template import TEMPLATES_NAME
from edge_runtime.text.tokenizer import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILES = (
    TOKENIZER_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a tokenizer consists of, for us and for transformers."""
CLASSES_THAT_SET_ENDS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Those whose add_bos_token and add_eos_token transformers 4 put in the place of what tokenizer.json has."""
_SOURCES = (TOKENIZER_NAME, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


@dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
    """A tokenizer that was written.

    Attributes:
        tokenizer: It, as the runtime reads it.
        notes: Lines on what was decided where the source's files disagree.
    """

    tokenizer: Tokenizer
    notes: tuple[str, ...] = ()


def check_tokenizer(source: Source) -> None:
    """Raise ExportError where the source has no file of a tokenizer."""
    if not any(list(source.folder.glob(pattern)) for pattern in _SOURCES):
        raise ExportError(
            f"`{source.folder}` holds no tokenizer, expected one of {', '.join(_SOURCES)}",
            "copy the tokenizer's files from the original model",
        )


def save_tokenizer(source: Source, folder: Path) -> SavedTokenizer:
    """Write the tokenizer's files into `folder`.

    Raises:
        ExportError: The source has no tokenizer, or one whose ids cannot be reproduced.
    """
    check_tokenizer(source)
    if (source.folder / TOKENIZER_NAME).is_file():
        notes = _copy(source, folder)
    else:
        convert(source.folder, folder)
        copy_files(source.folder, folder)
        notes = [f"{TOKENIZER_NAME} was made by transformers: the source has none"]
    saved = Tokenizer(folder)
    return SavedTokenizer(tokenizer=saved, notes=(*notes, *_check_rows(source, saved)))


def copy_files(origin: Path, folder: Path) -> None:
    """Put those of the tokenizer's files that `origin` has, byte for byte, into a folder."""
    for name in TOKENIZER_FILES:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)
    if (origin / TEMPLATES_NAME).is_dir():
        shutil.copytree(origin / TEMPLATES_NAME, folder / TEMPLATES_NAME, dirs_exist_ok=True)


def _copy(source: Source, folder: Path) -> list[str]:
    """Copy tokenizer.json and what belongs to it, rewritten only for what tokenizer_config.json adds; return notes."""
    copy_files(source.folder, folder)
    own, config = library_tokenizer(source.folder), read_json(source.folder / "tokenizer_config.json")
    saved = Tokenizer(folder)
    notes = [*_add_missing_tokens(own, source.folder, config), *_set_ends(own, saved, config)]
    if notes:
        own.save(str(folder / TOKENIZER_NAME))
        saved = Tokenizer(folder)
    texts = texts_for(own)
    for special in (True, False):
        expected = [encoding.ids for encoding in own.encode_batch(texts, add_special_tokens=special)]
        check_equal(texts, expected, encoded(saved, texts, special), "the source's own file")
    return [*notes, *_flag_notes(own, config), *_transformers_notes(source, saved, texts)]


# --- what tokenizer_config.json says beyond tokenizer.json ------------------------------------------------------------


def _add_missing_tokens(own: tokenizers.Tokenizer, folder: Path, config: dict[str, Any]) -> list[str]:
    """Add the tokens that only tokenizer_config.json or added_tokens.json knows.

    Raises:
        ExportError: One has an id that means something else, or that it would not get.
    """
    import tokenizers

    added = []
    for token_id, entry in _named_tokens(folder, config):
        content = entry["content"]
        if token_id in own.get_added_tokens_decoder() and own.token_to_id(content) == token_id:
            continue
        own.add_tokens([tokenizers.AddedToken(**entry)])
        if own.token_to_id(content) != token_id:
            raise ExportError(
                f"tokenizer_config.json names token {token_id} {content!r}, {TOKENIZER_NAME} "
                f"{own.id_to_token(token_id)!r}",
                "copy all tokenizer files from the same version of the original model",
            )
        added.append(content)
    if not added:
        return []
    return [f"{TOKENIZER_NAME} lacks {_some(added)} of tokenizer_config.json: added with the ids named there"]


def _named_tokens(folder: Path, config: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Return ids and AddedToken fields of what the files beside tokenizer.json call added tokens, by id."""
    named = config.get("added_tokens_decoder")
    if named is None:
        contents = read_json(folder / "added_tokens.json")
        return sorted((token_id, {"content": content}) for content, token_id in contents.items())
    fields = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return sorted(
        (int(token_id), {name: entry[name] for name in fields if name in entry}) for token_id, entry in named.items()
    )


def _set_ends(own: tokenizers.Tokenizer, saved: Tokenizer, config: dict[str, Any]) -> list[str]:
    """Let add_bos_token and add_eos_token decide what is put around a text, where they are set and were heeded."""
    from tokenizers.processors import TemplateProcessing

    if str(config.get("tokenizer_class")).removesuffix("Fast") not in CLASSES_THAT_SET_ENDS:
        return []
    plain, whole = own.encode("a", add_special_tokens=False).ids, own.encode("a").ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    around = whole[:start], whole[start + len(plain) :]
    tokens = [saved.special_token("bos_token"), saved.special_token("eos_token")]
    ids = [own.token_to_id(token) if token else None for token in tokens]
    if any(set(some) - {token_id} for some, token_id in zip(around, ids, strict=True)):
        return []  # other tokens than these two: no setting speaks of them
    has = [bool(some) for some in around]
    flags = [config.get("add_bos_token"), config.get("add_eos_token")]
    wants = [
        flag if isinstance(flag, bool) and token_id is not None else now
        for flag, token_id, now in zip(flags, ids, has, strict=True)
    ]
    if wants == has:
        return []
    before, after = (_around_text(tokens, which) for which in (has, wants))
    named = [(token, token_id) for token, token_id in zip(tokens, ids, strict=True) if token_id is not None]
    own.post_processor = TemplateProcessing(single=after, special_tokens=named)
    told = [" ".join(form).replace("$A", "TEXT") for form in (after, before)]
    return [f"tokenizer_config.json sets add_bos_token or add_eos_token: a text is read as {told[0]}, not as {told[1]}"]


def _around_text(tokens: Sequence[str | None], are_there: Sequence[bool]) -> list[str]:
    """Return the pieces of a text as TemplateProcessing names them."""
    begin, end = ([token] if token and is_there else [] for token, is_there in zip(tokens, are_there, strict=True))
    return [*begin, "$A", *end]


# --- what is only told ------------------------------------------------------------------------------------------------


def _flag_notes(own: tokenizers.Tokenizer, config: dict[str, Any]) -> list[str]:
    """Tell of tokens that are special in one file only: those are hidden in an answer, the others are shown."""
    named = config.get("added_tokens_decoder") or {}
    other = [
        token.content
        for token_id, token in own.get_added_tokens_decoder().items()
        if bool(named.get(str(token_id), {}).get("special", token.special)) != token.special
    ]
    if not other:
        return []
    return [f"tokenizer_config.json and {TOKENIZER_NAME} differ in whether {_some(other)} is special: as in the latter"]


def _transformers_notes(source: Source, saved: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Tell where transformers reads the source's tokenizer otherwise than its own tokenizer.json says."""
    try:
        original = transformers_tokenizer(source.folder)
    except ExportError:
        return []  # nobody else reads it either
    for text in texts:
        theirs = original(text, add_special_tokens=False)["input_ids"]
        if theirs != (ours := saved.encode(text, add_special_tokens=False)):
            return [
                f"transformers ({type(original).__name__}) splits {text!r:.40} into {shown(theirs)}, {TOKENIZER_NAME} "
                f"into {shown(ours)}: exported as the file has it"
            ]
    return []


def _check_rows(source: Source, saved: Tokenizer) -> list[str]:
    """Tell of token ids that the model has no embedding for, as long as neither texts nor chats have them.

    Raises:
        ExportError: They have.
    """
    rows = (source.config.get("text_config") or source.config).get("vocab_size")
    if not isinstance(rows, int):
        return []
    largest = max((*(i for text in PLAIN_TEXTS for i in saved.encode(text)), *_chat_ids(saved)), default=0)
    if largest >= rows:
        raise ExportError(
            f"the tokenizer gives token id {largest}, the model's vocabulary has {rows}",
            "copy the tokenizer's files from the original model",
        )
    beyond = [str(saved.token(token_id)) for token_id in sorted(saved.added_token_ids) if token_id >= rows]
    return [f"the model's vocabulary of {rows} has no {_some(beyond)}: a prompt cannot hold it"] if beyond else []


def _chat_ids(saved: Tokenizer) -> list[int]:
    """Return the ids of a chat; none where the model has no template, or one that refuses it."""
    try:
        return saved.apply_chat_template([{"role": "user", "content": PLAIN_TEXTS[0]}])
    except ConfigError:
        return []


def _some(tokens: Sequence[str]) -> str:
    more = f" and {len(tokens) - 1} more" if len(tokens) > 1 else ""
    return f"`{tokens[0]}`{more}"
