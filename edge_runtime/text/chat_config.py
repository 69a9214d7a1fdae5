"""How the messages of a chat become a prompt: the options of `EdgeLLM.chat` beside those of `GenerationConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from edge_runtime.config import KeywordOptions, check_flag
from edge_runtime.errors import ConfigError

RESERVED_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(KeywordOptions):
    """How messages are written for the model.

    Attributes:
        tools: Functions that the model may call, each as a JSON schema; None for none.
        documents: Texts that the model may quote, each with a title and a text; None for none.
        continue_final_message: Let the model continue the last message instead of answering it.
        template_options: Further variables of the chat template, such as `{"enable_thinking": False}`.
        special_tokens_in_messages: Read special tokens that are spelled out in a message, such as `<|im_end|>`, as
            special tokens. By default they are plain text: whoever writes a message cannot end its turn.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    continue_final_message: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)
    special_tokens_in_messages: bool = False

    def __post_init__(self) -> None:
        for name, values in (("tools", self.tools), ("documents", self.documents)):
            is_list = isinstance(values, (list, tuple)) and all(isinstance(value, Mapping) for value in values)
            if values is not None and not is_list:
                raise ConfigError(f"{name} is {values!r:.60}, expected a list of dictionaries")
        if not isinstance(self.template_options, Mapping):
            raise ConfigError(f"template_options is {self.template_options!r:.60}, expected a dictionary")
        for name in self.template_options:
            if not isinstance(name, str) or name in RESERVED_NAMES:
                raise ConfigError(
                    f"template_options sets {name!r:.60}, which is not an option of a template",
                    "expected names such as `enable_thinking`",
                )
        check_flag("continue_final_message", self.continue_final_message)
        check_flag("special_tokens_in_messages", self.special_tokens_in_messages)

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Return the options that say how messages are written, and those that are left."""
        own = {option.name for option in dataclasses.fields(cls)}
        chat = cls.from_options(**{name: value for name, value in options.items() if name in own})
        return chat, {name: value for name, value in options.items() if name not in own}
