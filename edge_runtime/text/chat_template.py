"""The chat template of a model: found, chosen and rendered as transformers does.

Where transformers would silently lose something, the messages are adapted (a list of text parts for a template that
expects a text, and the reverse) or refused in one line.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

from edge_runtime.errors import ConfigError, ModelFormatError, nearest
from edge_runtime.manifest import read_json
from edge_runtime.text.chat_config import ChatConfig

if TYPE_CHECKING:
    from jinja2 import Template

T = TypeVar("T")

DEFAULT, WITH_TOOLS = "default", "tool_use"
TEMPLATES_NAME = "additional_chat_templates"
"""The folder in which transformers keeps templates beside the default one."""
ROLES = ("system", "user", "assistant", "tool", "developer", "function")
"""Senders of messages that every model may know; its template decides which of them it takes."""
PROBE = "edge-run asks"
CUT = "\uf8f0 "
"""Marks where a message ends that is to be continued; its space tells whether the template trims."""


class Message(TypedDict):
    """One turn of a chat; a template may know further entries, such as `name`."""

    role: str
    content: NotRequired[str | Sequence[Mapping[str, str]] | None]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]


class ChatTemplate:
    """The templates of one model folder and the tokens that they name.

    Args:
        folder: Holds them, in `chat_template.jinja` and `additional_chat_templates/*.jinja`, or in a JSON file.
        config: Content of tokenizer_config.json.

    Raises:
        ModelFormatError: A template file cannot be read.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._sources = _read_templates(folder, config)
        self.special_tokens = _named_tokens(config, read_json(folder / "special_tokens_map.json"))
        self._compiled: dict[str, _CompiledTemplate] = {}
        self._lock = threading.Lock()

    @property
    def is_there(self) -> bool:
        """Whether the model says how a chat is written."""
        return DEFAULT in self._sources

    def render(self, messages: Sequence[Message], config: ChatConfig, *, add_generation_prompt: bool = True) -> str:
        """Return the text of a chat.

        Args:
            messages: The chat so far.
            config: How the messages are written.
            add_generation_prompt: Let it end where the assistant's answer begins, unless a message is to be continued.

        Raises:
            ConfigError: The model has no template, or the messages cannot be written in it.
        """
        for i, message in enumerate(messages):
            _check_message(i, message)
        with self._lock:
            template = self._choose(config)
            adapted = template.adapt(messages)
            if config.continue_final_message:
                return _continued(adapted, lambda marked: template.render(marked, config, False))
            return template.render(adapted, config, add_generation_prompt)

    def _choose(self, config: ChatConfig) -> _CompiledTemplate:
        name = WITH_TOOLS if config.tools is not None and WITH_TOOLS in self._sources else DEFAULT
        if name not in self._sources:
            has = f"templates named {', '.join(self._sources)}, but no default" if self._sources else "no chat template"
            raise ConfigError(f"the model in `{self._folder}` has {has}", "use `edge-run generate`, or a chat model")
        if name not in self._compiled:
            self._compiled[name] = _CompiledTemplate(self._sources[name], self.special_tokens)
        return self._compiled[name]


class _CompiledTemplate:
    """One template, ready to render."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        from edge_runtime.text.template_sandbox import Sandbox

        self._special_tokens = special_tokens
        self._sandbox = Sandbox()
        self._source = source
        self._template: Template = _refusing(lambda: self._sandbox.compile_template(source))
        self._takes_texts: bool | None = None
        self._takes_parts: bool | None = None

    def render(
        self, messages: Sequence[Mapping[str, Any]], config: ChatConfig, add_generation_prompt: bool = True
    ) -> str:
        variables = {
            **self._special_tokens,
            **config.template_options,
            "messages": list(messages),
            "tools": None if config.tools is None else list(config.tools),
            "documents": None if config.documents is None else list(config.documents),
            "add_generation_prompt": add_generation_prompt,
        }
        return _refusing(lambda: self._sandbox.render(self._template, variables))

    def adapt(self, messages: Sequence[Message]) -> list[Mapping[str, Any]]:
        """Return the messages with contents of the kind that this template understands."""
        return [self._adapt(i, message) for i, message in enumerate(messages)]

    def _adapt(self, i: int, message: Message) -> Mapping[str, Any]:
        self._check_role(message["role"])
        content = message.get("content")
        if content is None and "tool_calls" not in self._source:
            raise ConfigError(
                f"message {i} has tool calls in place of a text, which the model's chat template does not support",
                "use a model that calls tools",
            )
        if isinstance(content, str) and not self._understands_texts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if content is not None and not isinstance(content, str) and not self._understands_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message

    def _check_role(self, role: Any) -> None:
        """Refuse a role that most templates would render as it is, misspelt or not, and the model has never seen."""
        if role not in ROLES and not re.search(rf"(['\"]){re.escape(str(role))}\1", self._source):
            near = nearest(str(role), ROLES)
            hint = f"did you mean `{near}`?" if near else "a role of the model's own must stand in its chat template"
            raise ConfigError(f"a message has role {role!r:.60}, expected one of {', '.join(ROLES)}", hint)

    @property
    def _understands_texts(self) -> bool:
        """Whether a text as content is written; only templates that write parts alone do not."""
        if self._takes_texts is None:
            self._takes_texts = PROBE in self._probe(PROBE) or not self._understands_parts
        return self._takes_texts

    @property
    def _understands_parts(self) -> bool:
        """Whether a list of parts is written part by part, not as the list that it is."""
        if self._takes_parts is None:
            made = self._probe([{"type": "text", "text": PROBE}])
            self._takes_parts = PROBE in made and not any(mark in made for mark in ("'type'", '"type"'))
        return self._takes_parts

    def _probe(self, content: Any) -> str:
        try:
            return self.render([{"role": "user", "content": content}], ChatConfig())
        except ConfigError:
            return ""


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ConfigError(f"message {i} is {message!r:.60}, expected a dictionary with role and content")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if content is None:
        raise ConfigError(f"message {i} is {message!r:.60}, expected a dictionary with role and content")
    if isinstance(content, (list, tuple)):
        for part in content:
            _check_part(i, part)
    elif not isinstance(content, str):
        raise ConfigError(f"message {i} is {message!r:.60}, expected its content to be a text or a list of text parts")


def _check_part(i: int, part: Any) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind != "text":
        named = f"a part of type {kind!r:.40}" if kind else f"the part {part!r:.40}"
        raise ConfigError(f"message {i} holds {named}, but this model reads only text", "leave it out of the message")
    if not isinstance(part.get("text"), str):
        raise ConfigError(f"message {i} holds the part {part!r:.60}, expected a text in its entry `text`")


def _continued(messages: list[Mapping[str, Any]], render: Callable[[list[Mapping[str, Any]]], str]) -> str:
    """Return the text of a chat up to where its last message ends, as transformers finds that place."""
    last = dict(messages[-1])
    content = last.get("content")
    if isinstance(content, str):
        ending, last["content"] = content, content + CUT
    elif content:
        ending = content[-1]["text"]
        last["content"] = [*content[:-1], {**content[-1], "text": ending + CUT}]
    else:
        raise ConfigError("continue_final_message is set, but the last message has no text to continue")
    text = render([*messages[:-1], last])
    cut = text.rfind(CUT.strip())
    if cut < 0 or ending.strip() not in text:
        raise ConfigError("continue_final_message is set, but the chat template does not write the last message as is")
    return text[:cut] if text[cut : cut + len(CUT)] == CUT else text[:cut].rstrip()


def _refusing(work: Callable[[], T]) -> T:
    """Do what a template asks for, and say in one line why it failed."""
    try:
        return work()
    except Exception as error:  # a template can raise whatever Python can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"the model's chat template refuses these messages: {reason:.300}") from error


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return templates by name; files take precedence over what JSON files hold."""
    given = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    named = {DEFAULT: given} if isinstance(given, str) else given
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ModelFormatError(
            f"the chat template of `{folder}` is {given!r:.60}, expected a text or named texts",
            "copy tokenizer_config.json from the original model",
        )
    files = {path.stem: path for path in sorted((folder / TEMPLATES_NAME).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files[DEFAULT] = folder / "chat_template.jinja"
    return {**named, **{name: _read_text(path) for name, path in files.items()}}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelFormatError(
            f"`{path}` is not UTF-8 at byte {error.start}", "copy it from the original model, or save it as UTF-8"
        ) from error
    except OSError as error:
        raise ModelFormatError(f"`{path}` cannot be read: {error.strerror}", "copy the model folder again") from error


def _named_tokens(config: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that templates know by name.

    Args:
        config: Content of tokenizer_config.json.
        legacy: Content of special_tokens_map.json, which counts more where the config has no `added_tokens_decoder`.
    """
    first, second = (config, legacy) if "added_tokens_decoder" in config else (legacy, config)
    named: dict[str, Any] = {}
    for content in (second, first):
        named |= {name: token for name, token in content.items() if name.endswith("_token")}
        for key in ("model_specific_special_tokens", "extra_special_tokens"):
            named |= content[key] if isinstance(content.get(key), dict) else {}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
