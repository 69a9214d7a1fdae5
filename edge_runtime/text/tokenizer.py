"""Text to token ids and back: tokenizer.json, chats, and decoding that never cuts a character.

The `tokenizers` library does the work; what a model's tokenizer and chat template may cost is bounded.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from edge_runtime.errors import ConfigError, ModelFormatError, ModelPairError
from edge_runtime.manifest import read_json
from edge_runtime.text import tokenizer_limits
from edge_runtime.text.chat_config import ChatConfig
from edge_runtime.text.chat_template import ChatTemplate, Message
from edge_runtime.text.plain_messages import PlainMessages

TOKENIZER_NAME = "tokenizer.json"
REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character, or not yet."""


class Tokenizer:
    """The tokenizer of one model folder.

    Args:
        folder: Holds tokenizer.json, and tokenizer_config.json and a chat template where the model has them.

    Raises:
        ModelFormatError: tokenizer.json is missing, damaged or out of all proportion, or a chat template is unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self._texts: dict[int, str] = {}  # of single tokens, for streams
        self._path = folder / TOKENIZER_NAME
        if not self._path.is_file():
            raise ModelFormatError(
                f"`{folder}` holds no {TOKENIZER_NAME}",
                "copy it from the original model, or export the model again",
            )
        tokenizer_limits.check_file(self._path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise ModelFormatError(f"`{self._path}` is damaged: {error}", "copy it from the original model") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        tokenizer_limits.check_growth(self._tokenizer, self._path)
        self._may_be_slow = tokenizer_limits.may_be_slow(self._tokenizer)
        self._template = ChatTemplate(folder, read_json(folder / "tokenizer_config.json"))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises:
            ConfigError: It is no Unicode text, or the tokenizer cannot cope with it.
        """
        ids: list[int] = self._encode(text, add_special_tokens).ids
        return ids

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        tokenizer_limits.check_text(text)
        try:
            if not self._may_be_slow:
                return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            encode = functools.partial(self._tokenizer.encode_batch, add_special_tokens=add_special_tokens)
            return tokenizer_limits.within_limit(lambda: encode([text])[0], len(text))  # a batch releases Python's lock
        except TypeError as error:  # not a string, or half of a surrogate pair
            raise ConfigError(f"the text {text!r:.60} cannot be encoded: it is not valid Unicode") from error
        except BaseException as error:  # the library's panics are no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise ConfigError(f"the model's tokenizer fails on this text: {error}") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_stream(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return an incremental decoder.

        Args:
            context: Token ids that came before: some tokenizers render a token differently at the start of a text.
        """
        return TextDecoder(self._tokenizer, context, self._texts)

    def token(self, token_id: int) -> str | None:
        """Return the vocabulary's entry of an id; None where it has none."""
        if not 0 <= token_id < 1 << 32:  # beyond what the library's ids are
            return None
        entry: str | None = self._tokenizer.id_to_token(token_id)
        return entry

    def token_id(self, token: str) -> int | None:
        """Return the id of a vocabulary entry; None where it is none."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def special_token(self, name: str) -> str | None:
        """Return the token that has a role, such as `eos_token`; None where none has it."""
        return self._template.special_tokens.get(name)

    @property
    def added_token_ids(self) -> frozenset[int]:
        """The ids of tokens that stand for themselves and not for words: special and other added ones."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a chat is written."""
        return self._template.is_there

    def apply_chat_template(
        self, messages: Sequence[Message], config: ChatConfig | None = None, *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Return the ids of a chat, ending where the assistant's answer begins.

        Args:
            messages: The chat so far.
            config: How the messages are written; None for the defaults.
            add_generation_prompt: False for a chat that ends with its last message.

        Raises:
            ConfigError: The model has no template, or the template refuses these messages.
        """
        config = config or ChatConfig()
        render = functools.partial(self._template.render, add_generation_prompt=add_generation_prompt)
        plain, given = self._plain_messages, (messages, config.tools, config.documents)
        mark = None if config.special_tokens_in_messages else plain.find_mark(*given)
        if mark is None:
            return self.encode(render(messages, config), add_special_tokens=False)
        messages, tools, documents = (plain.mark(value, mark) for value in given)
        text = render(messages, dataclasses.replace(config, tools=tools, documents=documents))
        text = text.replace(f"\\u{ord(mark):04x}", mark)  # as a template writes it in JSON for readers of ASCII
        return plain.encode(self._encode(text, add_special_tokens=False), text, mark)

    @functools.cached_property
    def _plain_messages(self) -> PlainMessages:
        return PlainMessages(self._tokenizer, self._template.special_tokens.values())

    def check_same_vocabulary(self, draft: Tokenizer) -> None:
        """Refuse a draft whose token ids mean something else.

        Raises:
            ModelPairError: Names the first id that differs.
        """
        if self._path.read_bytes() == draft._path.read_bytes():
            return
        mine, theirs = (_entries(side._tokenizer) for side in (self, draft))
        for token_id in sorted(mine.keys() | theirs.keys()):
            if mine.get(token_id) != theirs.get(token_id):
                raise ModelPairError(
                    f"draft and target have different vocabularies: token {token_id} is "
                    f"{mine.get(token_id)!r} for the target and {theirs.get(token_id)!r} for the draft",
                    "use a draft that was made for this target's tokenizer",
                )


class TextDecoder:
    """Turns tokens into text as they come; bytes of a character that is not complete yet are held back.

    A window of tokens is decoded with and without the newest ones: some tokenizers render a token differently at the
    start of a text. The library's DecodeStream does the same, but raises an error after bytes that are no character.

    Args:
        tokenizer: Decodes.
        context: Tokens before the first one.
        texts: Texts of single tokens as far as they are known; more are added.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, context: Sequence[int], texts: dict[int, str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._window = list(context)
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)

    def push(self, token_id: int) -> str:
        """Return the text that one more token completes; often all of it, sometimes none."""
        self._window.append(token_id)
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        if not self._shown.endswith(REPLACEMENT):  # else the window would begin within a character
            self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._text_of(token_id) if self._num_shown == 1 else self._decode(self._window)
        return text

    def flush(self) -> str:
        """Return what is still held back, with replacement characters for incomplete ones."""
        text = self._new_text()
        self._shown += text
        return text

    def _new_text(self) -> str:
        text, shown = self._decode(self._window), self._shown
        if not text.startswith(shown):  # the newest bytes complete a character, or spoil one
            shown = os.path.commonprefix([text, shown])  # noqa: RUF071 - letter by letter is what is wanted
        return text[len(shown) :]

    def _text_of(self, token_id: int) -> str:
        """Return the text of a token that begins one."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._decode([token_id])
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _entries(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
