"""What the commands of `edge-run bench` can be told, and the defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError

MLP_WEIGHTS = ("int8", "int4", "bf16")


@dataclass(frozen=True, kw_only=True)
class DraftSettings:
    """What is measured.

    Attributes:
        num_draft_tokens: Every K; the draft is also measured with the pacing's own choice.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0 is greedy. Otherwise a prompt's line seeds all its answers, so that all variants give the same
            answer; a seed costs some of the acceptance that a request without one has (`noise.py`).
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
                raise ConfigError(
                    f"num_draft_tokens is {length}, expected at least 1", "plain decoding always runs for comparison"
                )

    def request(self, **options: Any) -> GenerationConfig:
        """Return the options of one answer."""
        return GenerationConfig(max_new_tokens=self.max_new_tokens, temperature=self.temperature, **options)


@dataclass(frozen=True, kw_only=True)
class CatsSettings:
    """What to measure.

    Attributes:
        hidden: H, the MLP's inputs and outputs.
        ffn: F, its neurons.
        weights: Precisions of the weights, from MLP_WEIGHTS.
        rows: Numbers of tokens in a step.
        sparsity: Fractions of the neurons skipped.
        rounds: Runs of each variant that count.
    """

    hidden: int = 4096
    ffn: int = 14336
    weights: tuple[str, ...] = MLP_WEIGHTS[:2]
    rows: tuple[int, ...] = (1, 2, 4, 5, 8, 256)
    sparsity: tuple[float, ...] = (0.0, 0.25, 0.5, 0.7, 0.9)
    rounds: int = 15

    def __post_init__(self) -> None:
        for name, value, least in (("hidden", self.hidden, 128), ("ffn", self.ffn, 128)):
            if value < least or value % 128:
                raise ConfigError(f"{name} is {value}, expected a multiple of 128")
        if unknown := set(self.weights) - set(MLP_WEIGHTS):
            raise ConfigError(f"weights is {min(unknown)!r}, expected one of {', '.join(MLP_WEIGHTS)}")
        if not self.rows or min(self.rows) < 1 or self.rounds < 1:
            raise ConfigError(f"rows is {self.rows} and rounds {self.rounds}, expected numbers of at least 1")
        if any(not 0 <= share < 1 for share in self.sparsity):
            raise ConfigError(f"sparsity is {self.sparsity}, expected fractions from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What to measure.

    Attributes:
        contexts: Context lengths, in tokens.
        strides: Strides of S2-Attention, in KV blocks.
        window: Local window of S2-Attention, in tokens.
        kept: Tokens that a sparse layer of LongGen keeps, sink and window together.
        chunk: Tokens of a prefill step.
        num_heads: H of one layer.
        num_kv_heads: H_kv.
        head_size: D.
        rounds: Runs of each variant that count.
        longest_peer: Contexts beyond are not measured with OpenVINO's own attention, which takes long there.
    """

    contexts: tuple[int, ...] = tuple(4096 << i for i in range(6))
    strides: tuple[int, ...] = (8, 16, 64)
    window: int = 1024
    kept: int = 2048
    chunk: int = 512
    num_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    rounds: int = 7
    longest_peer: int = 32_768

    def __post_init__(self) -> None:
        for name in ("window", "kept", "chunk", "num_heads", "num_kv_heads", "head_size", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} heads cannot share {self.num_kv_heads} KV heads evenly")
        if not self.contexts or min(self.contexts) < 2 * self.chunk:
            raise ConfigError(
                f"contexts are {list(self.contexts)}, expected each to be at least two chunks of {self.chunk} tokens"
            )
        if self.head_size % 16 or self.head_size > 256:
            raise ConfigError(f"head_size is {self.head_size}, expected a multiple of 16 up to 256")
        if any(stride < 1 for stride in self.strides):
            raise ConfigError(f"strides are {list(self.strides)}, expected numbers of at least 1")
