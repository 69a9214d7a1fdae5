"""The tokenizer of an exported model: a tokenizer.json that gives the ids that transformers gives.

The runtime reads tokenizer.json through the `tokenizers` library alone. transformers may add rules of its own in Python
(legacy spacing, begin-of-text), so the two are compared on texts that expose such rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_export.sources import Source
from edge_runtime.errors import ExportError
from edge_runtime.tokenizer import TOKENIZER_NAME, Tokenizer

SAMPLE_TEXTS = (
    "Once upon a time, there was a little fox.",
    "  two spaces before,\ttab,\n\nblank line and trailing space ",
    "def add(left, right):\n    return left + right  # 1234567890 3.14 0xFF",
    "Zwölf Boxkämpfer jagen Viktor; où est le garçon naïf?",
    "Съешь же ещё этих мягких французских булок.",
    "敏捷的棕色狐狸跳过懒狗。すばやい茶色の狐。",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 🦊 🇩🇪 e\u0301 ﬁ \u200b end",
    "",
)
_SOURCES = (TOKENIZER_NAME, "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")


def check_tokenizer(source: Source) -> None:
    """Raise ExportError where the source has no file of a tokenizer."""
    if not any(list(source.folder.glob(pattern)) for pattern in _SOURCES):
        raise ExportError(
            f"`{source.folder}` holds no tokenizer, expected one of {', '.join(_SOURCES)}",
            "copy the tokenizer's files from the original model",
        )


def save_tokenizer(source: Source, folder: Path) -> Tokenizer:
    """Write the tokenizer's files into `folder` and return it as the runtime reads it.

    Raises:
        ExportError: The source has no tokenizer, or its ids cannot be had from a tokenizer.json.
    """
    check_tokenizer(source)
    original = _load(source)
    original.save_pretrained(folder)
    if not (folder / TOKENIZER_NAME).is_file():
        raise ExportError(f"the tokenizer of `{source.name}` exists only as Python code, expected {TOKENIZER_NAME}")
    saved = Tokenizer(folder)
    _compare(original, saved)
    return saved


def _load(source: Source) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for every kind of damage
        raise ExportError(
            f"the tokenizer in `{source.folder}` cannot be read: {str(error).splitlines()[0]}",
            "copy or download the model again",
        ) from error


def _compare(original: Any, saved: Tokenizer) -> None:
    for text in SAMPLE_TEXTS:
        expected, got = original(text)["input_ids"], saved.encode(text)
        if got != expected:
            raise ExportError(
                f"{TOKENIZER_NAME} splits {text!r} into {got[:8]} ..., transformers into {expected[:8]} ..."
            )
