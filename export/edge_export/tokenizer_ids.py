"""Read a tokenizer with the libraries that know it, and compare the ids that two of them give.

`library_tokenizer` is the truth: tokenizer.json and nothing else. `transformers_tokenizer` may put rules of a class
around its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_export.quiet import quiet
from edge_runtime.errors import ExportError
from edge_runtime.text.tokenizer import TOKENIZER_NAME, Tokenizer

if TYPE_CHECKING:
    import tokenizers

PLAIN_TEXTS = (
    "How are you doing?",
    "Once upon a time, there was a little fox.",
    "  two spaces before,\ttab,\n\nblank line and trailing space ",
    "runs of      spaces,\t\ttabs and\n\n\n\nlines\r\n",
    "def add(left, right):\n    return left + right  # 1234567890 3.14 0xFF 1,000,000",
    "Zwölf Boxkämpfer jagen Viktor; où est le garçon naïf?",
    "Съешь же ещё этих мягких французских булок.",
    "敏捷的棕色狐狸跳过懒狗。すばやい茶色の狐。빠른 갈색 여우",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया",
    "👩‍👩‍👧‍👦 🦊 🇩🇪 e\u0301 ﬁ \u200b end",
    "",
)
CHAT_TEXTS = (
    "<|im_start|>user\n Hi there<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] Hi there [/INST] Hello </s>",
    "<|user|>\n Hi there<|end|>\n<|assistant|>\n",
    "<start_of_turn>user\nHi<end_of_turn>\n",
)
MAX_ADDED_TOKENS = 64
"""Most added tokens that the comparison puts into texts, half of them the first and half the last."""


def library_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """Return a folder's tokenizer.json as the `tokenizers` library reads it; texts are neither cut nor padded.

    Raises:
        ExportError: The file is damaged.
    """
    import tokenizers

    path = folder / TOKENIZER_NAME
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise unreadable(path, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def transformers_tokenizer(folder: Path) -> Any:
    """Return a folder's tokenizer as an object of the class that transformers chooses.

    Raises:
        ExportError: transformers cannot read it.
    """
    try:
        with quiet():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for every kind of damage
        raise unreadable(folder, error) from error


def unreadable(place: Path, error: Exception) -> ExportError:
    """Return the error for a damaged tokenizer."""
    return ExportError(
        f"the tokenizer in `{place}` cannot be read: {_first_line(error)}", "copy or download the model again"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def texts_for(own: tokenizers.Tokenizer) -> list[str]:
    """Return the texts on which ids are compared: words of all kinds, and each added token within and around words."""
    added = [token.content for token in own.get_added_tokens_decoder().values()]
    half = MAX_ADDED_TOKENS // 2
    some = added if len(added) <= MAX_ADDED_TOKENS else added[:half] + added[-half:]
    return [
        *PLAIN_TEXTS,
        *CHAT_TEXTS,
        *(f"{token}user\n How are you?{token}\nFine {token} \n{token}" for token in some),
    ]


def check_equal(texts: Sequence[str], expected: Sequence[list[int]], got: Sequence[list[int]], who: str) -> None:
    """Raise ExportError, naming the first text whose exported ids `got` are not the `expected` ones of `who`."""
    for text, theirs, ours in zip(texts, expected, got, strict=True):
        if theirs != ours:
            raise ExportError(
                f"the exported {TOKENIZER_NAME} splits {text!r:.60} into {shown(ours)}, {who} into {shown(theirs)}",
                "please report the model",
            )


def encoded(saved: Tokenizer, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Return the ids of texts, with or without the special tokens that are put around each."""
    return [saved.encode(text, add_special_tokens=special) for text in texts]


def shown(token_ids: Iterable[int]) -> str:
    """Return the first ids of a text for a message."""
    some = list(token_ids)
    return f"{some[:8]}"[:-1] + (", ...]" if len(some) > 8 else "]")
