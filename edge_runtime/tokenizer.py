"""Text to token ids and back: tokenizer.json, the chat template, and decoding that never cuts a character.

The `tokenizers` library does the work; jinja2 renders chat templates in its sandbox, because a template is code that
came with a downloaded model.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import tokenizers

from edge_runtime.errors import ConfigError, ModelFormatError, ModelPairError
from edge_runtime.manifest import read_json

if TYPE_CHECKING:
    import jinja2

TOKENIZER_NAME = "tokenizer.json"
REPLACEMENT = "\ufffd"
"""Stands for bytes that are no character, or not yet."""


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str


class Tokenizer:
    """The tokenizer of one model folder.

    Args:
        folder: Holds tokenizer.json, and tokenizer_config.json and a chat template where the model has them.

    Raises:
        ModelFormatError: tokenizer.json is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / TOKENIZER_NAME
        if not self._path.is_file():
            raise ModelFormatError(
                f"`{folder}` holds no {TOKENIZER_NAME}",
                "copy it from the original model, or export the model again",
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises bare Exception for every kind of damage
            raise ModelFormatError(f"`{self._path}` is damaged: {error}", "copy it from the original model") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._config = read_json(folder / "tokenizer_config.json")
        self._template = _read_template(folder, self._config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Raises:
            ConfigError: It is no Unicode text.
        """
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # not a string, or half of a surrogate pair
            raise ConfigError(f"the text {text!r:.60} cannot be encoded: it is not valid Unicode") from error
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def decode_stream(self, context: Sequence[int] = ()) -> TextDecoder:
        """Return an incremental decoder.

        Args:
            context: Token ids that came before: some tokenizers render a token differently at the start of a text.
        """
        return TextDecoder(self._tokenizer, context)

    def token(self, token_id: int) -> str | None:
        """Return the vocabulary's entry of an id; None where it has none."""
        entry: str | None = self._tokenizer.id_to_token(token_id)
        return entry

    @property
    def has_chat_template(self) -> bool:
        """Whether the model says how a chat is written."""
        return self._template is not None

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a chat, ending where the assistant's answer begins.

        Raises:
            ConfigError: The model has no template, or the template refuses these messages.
        """
        import jinja2

        for message in messages:
            if not isinstance(message, Mapping) or not message.keys() >= {"role", "content"}:
                raise ConfigError(f"a message is {message!r:.60}, expected a dictionary with role and content")
        if self._template is None:
            raise ConfigError(
                f"the model in `{self._path.parent}` has no chat template", "use `edge-run generate`, or a chat model"
            )
        try:
            text = _compile_template(self._template).render(
                messages=list(messages), add_generation_prompt=True, **self._special_tokens()
            )
        except (jinja2.TemplateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"the model's chat template refuses these messages: {reason}") from error
        return self.encode(text, add_special_tokens=False)

    def _special_tokens(self) -> dict[str, str]:
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        values = {name: self._config.get(name) for name in names}
        return {n: v["content"] if isinstance(v, dict) else v for n, v in values.items() if v is not None}

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
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
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
        self._num_shown, self._shown = len(self._window), self._decode(self._window)
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

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _entries(tokenizer: tokenizers.Tokenizer) -> dict[int, str]:
    return {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several named ones: the default is for chatting
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _compile_template(template: str) -> jinja2.Template:
    """Compile a chat template with the names and settings that transformers gives it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's words for training; here its content is plain text."""

        tags = {"generation"}  # noqa: RUF012 - the base class wants a set

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return environment.from_string(template)
