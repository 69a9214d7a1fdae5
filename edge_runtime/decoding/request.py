"""A request: one prompt, its options, and all the state of its answer. Whoever steps it holds nothing of it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Literal, NamedTuple, Protocol

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters.base import Draft
from edge_runtime.decoding.pacing import Pacing
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.errors import ConfigError, ContextOverflowError
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import Sequence

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a stop token or string; `length`: max_new_tokens or the context; `error`: see `Request.error`."""


class Token(NamedTuple):
    """One emitted token.

    Attributes:
        token_id: Its id.
        is_drafted: Whether it was drafted and accepted, rather than drawn from the target.
        logprob: Log-probability under the model's own distribution; None unless asked for.
        top_logprobs: The most likely ids and their log-probabilities; None unless asked for.
    """

    token_id: int
    is_drafted: bool
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class Reader(Protocol):
    """Takes what a request emits. The engine's thread calls it, so it returns at once and waits for nobody."""

    @property
    def wants_more(self) -> bool:
        """Whether to go on: a reader that has much unread is left alone until it has read."""

    @property
    def has_reader(self) -> bool:
        """Whether a thread that keeps the process from ending has asked for tokens; asked as the process ends."""

    def take_progress(self, done: int, wanted: int) -> None:
        """Learn how many of the prompt's tokens are held before the next chunk of it is read."""

    def take(self, token: Token) -> bool:
        """Take a token; return whether it ends the answer, as a stop string does."""

    def wake(self, is_over: bool) -> None:
        """Learn that a step has brought something, or that the request is over."""


class Drafting(NamedTuple):
    """One source of drafts of a request.

    Attributes:
        draft: Drafts for it.
        pacing: How many tokens are worth drafting.
    """

    draft: Draft
    pacing: Pacing


class Request:
    """One prompt and its answer, as far as it is written.

    Args:
        prompt_ids: At least one token.
        config: Its options.
        context_length: Most tokens of prompt and answer.
        reader: Takes the tokens.
        stop_token_ids: Ids that end the answer; they are not emitted.
        metrics: Filled while it runs.

    Attributes:
        token_ids: Prompt and answer so far.
        end: How many tokens those are at most.
        sampler: Its random numbers and counts.
        sequence: Its share of the target's cache; None while it waits.
        draftings: Its sources of drafts, the one asked first first; none while it waits.
        is_cancelled: Set by any thread to end it after the current step.
        finish_reason: Why it ended; None before. Set last, after all that it has emitted.
        stop_token: The one of `stop_token_ids` that ended it; None where none did.
        error: What it failed of.

    Raises:
        ConfigError: The prompt is empty.
        ContextOverflowError: The prompt leaves no room for a token.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        config: GenerationConfig,
        context_length: int,
        reader: Reader,
        stop_token_ids: Iterable[int] = (),
        metrics: Metrics | None = None,
    ) -> None:
        check_prompt(prompt_ids, context_length)
        self.config, self.reader, self.metrics = config, reader, metrics or Metrics()
        self.stop_token_ids = frozenset(stop_token_ids)
        self.token_ids = list(prompt_ids)
        self.end = len(prompt_ids) + min(config.max_new_tokens, context_length - len(prompt_ids))
        self.sampler = Sampler(config, prompt_ids)
        self.sequence: Sequence | None = None
        self.draftings: list[Drafting] = []
        self.is_cancelled = False
        self.finish_reason: FinishReason | None = None
        self.stop_token: Token | None = None
        self.error: BaseException | None = None
        self.metrics.prompt_tokens = len(prompt_ids)
        self._started = time.perf_counter()

    @property
    def unread_ids(self) -> list[int]:
        """Tokens that the target has not read; the logits after the last of them give the next one."""
        return self.token_ids[self.sequence.num_tokens :]  # type: ignore[union-attr]

    @property
    def is_reading(self) -> bool:
        """Whether more than the last token is to be read."""
        return self.sequence is not None and len(self.token_ids) - self.sequence.num_tokens > 1

    def emit(self, token: Token) -> FinishReason | None:
        """Add a token to the answer; return why it is the last, or None."""
        self.token_ids.append(token.token_id)
        metrics, elapsed = self.metrics, time.perf_counter() - self._started
        metrics.new_tokens += 1
        if metrics.new_tokens == 1:
            metrics.ttft_s = elapsed
        metrics.decode_s = elapsed - metrics.ttft_s
        if self.reader.take(token):
            return "stop"
        return "length" if len(self.token_ids) >= self.end else None


def check_prompt(prompt_ids: list[int], context_length: int, longest: int | None = None) -> None:
    """Refuse a prompt that cannot be answered.

    Args:
        prompt_ids: The prompt.
        context_length: Tokens that the model holds as it was loaded.
        longest: Tokens that it could hold; None if unknown.

    Raises:
        ConfigError: It is empty.
        ContextOverflowError: It leaves no room for one token.
    """
    if not prompt_ids:
        raise ConfigError("the prompt is empty", "give at least one character")
    if len(prompt_ids) >= context_length:
        load = f", or load the model with `context_length` up to {longest}" if (longest or 0) > context_length else ""
        raise ContextOverflowError(
            f"the prompt has {len(prompt_ids)} tokens, but the model's context holds {context_length}",
            f"shorten it to at most {context_length - 1} tokens{load}",
        )
