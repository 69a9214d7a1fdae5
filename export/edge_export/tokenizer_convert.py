"""Make a tokenizer.json of what older models have instead: sentencepiece models, or a vocabulary and its merges.

transformers does the work. Its rules come from the class that tokenizer_config.json names, so the result is compared
with the sentencepiece model itself where there is one, and words must come back apart in any case.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edge_export.tokenizer_ids import (
    PLAIN_TEXTS,
    check_equal,
    encoded,
    library_tokenizer,
    texts_for,
    transformers_tokenizer,
    unreadable,
)
from edge_runtime.errors import ExportError
from edge_runtime.manifest import read_json
from edge_runtime.text.tokenizer import TOKENIZER_NAME, Tokenizer


def convert(origin: Path, folder: Path) -> None:
    """Write a tokenizer.json made of the other tokenizer files in `origin` into `folder`.

    Raises:
        ExportError: The files cannot be read, a package that reads them is missing, or the ids are not theirs.
    """
    pieces = _sentencepiece_model(origin)
    original = transformers_tokenizer(origin)
    original.save_pretrained(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise ExportError(f"the tokenizer in `{origin}` exists only as Python code, expected {TOKENIZER_NAME}")
    if pieces is None:
        texts = texts_for(library_tokenizer(folder))
        expected = [original(text)["input_ids"] for text in texts]
        check_equal(texts, expected, encoded(Tokenizer(folder), texts), "transformers")
    else:
        _match_sentencepiece(origin, folder, pieces)
    if (lost := _lost_spaces(Tokenizer(folder))) is not None:
        raise ExportError(
            f"transformers makes a tokenizer of the files in `{origin}` that turns {PLAIN_TEXTS[0]!r} into {lost!r}",
            f"copy the original model's {TOKENIZER_NAME} there",
        )


def _sentencepiece_model(folder: Path) -> Any:
    """Return the sentencepiece model in a folder; None where there is none.

    Raises:
        ExportError: The package that reads it is not installed.
    """
    for path in folder.glob("*.model"):
        package = "sentencepiece" if path.read_bytes()[:1] == b"\n" else "tiktoken"  # a protobuf, or lines of base64
        if importlib.util.find_spec(package) is None:
            raise ExportError(
                f"`{path}` can only be read with the package {package}, which is not installed",
                f"pip install {package}, or copy the original model's {TOKENIZER_NAME} there",
            )
        if package == "sentencepiece":
            import sentencepiece  # type: ignore[import-not-found, import-untyped, unused-ignore]

            try:
                return sentencepiece.SentencePieceProcessor(model_file=str(path))
            except RuntimeError as error:
                raise unreadable(folder, error) from error
    return None


def _match_sentencepiece(origin: Path, folder: Path, pieces: Any) -> None:
    """Let plain texts have the ids of the sentencepiece model.

    A model whose config says `legacy: false` was trained without the space that older ones have after each special
    token; then the rules of transformers stay, which differ for texts that begin with a space.
    """
    is_legacy = read_json(origin / "tokenizer_config.json").get("legacy") is not False
    texts = [text for text in PLAIN_TEXTS if is_legacy or not text.startswith(" ")]
    expected = [pieces.encode(text) for text in texts]
    if is_legacy and encoded(Tokenizer(folder), texts, special=False) != expected:
        _prepend_space(folder)
    check_equal(texts, expected, encoded(Tokenizer(folder), texts, special=False), "sentencepiece")


def _prepend_space(folder: Path) -> None:
    """Let every text begin with one more space, as in sentencepiece and in the tokenizer.json of Llama 2.

    transformers' Metaspace leaves it out where a text begins with a space of its own.
    """
    from tokenizers import normalizers

    own = library_tokenizer(folder)
    own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    own.pre_tokenizer = None
    own.save(str(folder / TOKENIZER_NAME))


def _lost_spaces(saved: Tokenizer) -> str | None:
    """Return what a plain sentence comes back as where its words do not come back apart; None where they do."""
    text = PLAIN_TEXTS[0]
    back = saved.decode(saved.encode(text, add_special_tokens=False))
    return None if back.lower().split() == text.lower().split() else back
