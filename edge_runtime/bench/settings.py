"""What `edge-run bench draft` can be told, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """What is measured.

    Attributes:
        num_draft_tokens: Every K; the draft is also measured with the pacing's own choice.
        max_new_tokens: Of each answer.
        temperature: 0 is greedy. Otherwise a prompt's line seeds all its answers.
        drafters: What is measured beside plain decoding, in the words of a row.
        is_chat: Whether prompts are questions, to be asked in the model's chat template.
    """

    num_draft_tokens: tuple[int, ...] = (1, 3, 5)
    max_new_tokens: int = 128
    temperature: float = 0.0
    drafters: tuple[str, ...] = ("draft", "lookup", "random")
    is_chat: bool = False

    def __post_init__(self) -> None:
        for length in self.num_draft_tokens:
            self.request(num_draft_tokens=length)
            if length < 1:
                raise ConfigError(f"num_draft_tokens is {length}, expected at least 1", "plain decoding is included")

    def request(self, **options: Any) -> GenerationConfig:
        """Return the options of one answer."""
        return GenerationConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature, **options)
