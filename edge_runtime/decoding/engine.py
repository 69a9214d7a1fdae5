"""Prefill, decode loop, stop rules: token ids in, tokens out. Knows no text.

Plain decoding is speculation with nothing drafted: there is one loop. Each step asks the draft sources in order, each
with its own pacing, verifies what was drafted in one target forward, and emits one token after another, so that a stop
rule or a consumer that leaves can end the request after any token. Nothing needs repair then: `CachedModel` knows
which tokens it holds, and the next request keeps those that it shares.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters import Drafter, PromptLookup
from edge_runtime.decoding.pacing import Pacing, TargetCosts
from edge_runtime.decoding.sampling import Sampler, top_logprobs
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, VerifiedBlock, verify
from edge_runtime.errors import ConfigError, ContextOverflowError, LogitsError
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import CachedModel, Rows


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


class _Source(NamedTuple):
    drafter: Drafter
    pacing: Pacing


class Engine:
    """Generates token ids with a target and, if given, a drafter.

    Args:
        target: The model whose answer is wanted.
        drafter: Drafts for it, mostly a `DraftModel`; prompt lookup needs none.
    """

    def __init__(self, target: CachedModel, drafter: Drafter | None = None) -> None:
        self.target, self.drafter = target, drafter
        self._costs = TargetCosts()
        self._lookup = _Source(PromptLookup(), Pacing(self._costs))
        self.current: _Request | None = None
        self._draft = drafter and _Source(drafter, Pacing(self._costs))

    def generate(
        self,
        prompt_ids: list[int],
        config: GenerationConfig,
        stop_token_ids: Sequence[int] = (),
        metrics: Metrics | None = None,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Iterator[Token]:
        """Yield tokens until a stop token (which is not yielded), `max_new_tokens` or the end of the context.

        Args:
            prompt_ids: At least one token.
            config: The request's options.
            stop_token_ids: Ids that end the answer.
            metrics: Filled while running.
            on_chunk: Called with tokens held and wanted before each chunk of the prompt; may raise to cancel.

        Raises:
            ConfigError: The prompt is empty.
            ContextOverflowError: The prompt leaves no room for a token.
            LogitsError: No token can be drawn; raised in the iteration, where the token would come.
        """
        check_prompt(prompt_ids, self.target.model.context_length)
        return _Request(self, prompt_ids, config, stop_token_ids, metrics or Metrics(), on_chunk).run()

    def sources(self, config: GenerationConfig) -> list[_Source]:
        """Return the draft sources of a request, the one asked first first."""
        if config.num_draft_tokens == 0:
            return []
        sources = [self._lookup] if config.lookup else []
        return [*sources, self._draft] if self._draft else sources

    def record_plain_step(self, seconds: float) -> None:
        """Learn what a step with nothing drafted costs."""
        self._costs.record(1, seconds)

    def record_drafted_step(
        self, source: _Source, width: int, accepted: int, draft_s: float, target_s: float, lag: int
    ) -> None:
        """Learn what a drafted step cost and brought."""
        self._costs.record(width, target_s)
        source.pacing.record(width - 1, accepted, draft_s, target_s, lag)


class _Request:
    """The state of one request."""

    def __init__(
        self,
        engine: Engine,
        prompt_ids: list[int],
        config: GenerationConfig,
        stop_token_ids: Sequence[int],
        metrics: Metrics,
        on_chunk: Callable[[int, int], None] | None,
    ) -> None:
        self._started = time.perf_counter()
        self._engine, self._target = engine, engine.target
        self._config, self._stop, self._metrics, self._on_chunk = config, frozenset(stop_token_ids), metrics, on_chunk
        self._ids = list(prompt_ids)
        self._sampler = Sampler(config, prompt_ids)
        self._sources = engine.sources(config)
        self._is_done = False
        room = self._target.model.context_length - len(prompt_ids)
        self._end = len(prompt_ids) + min(config.max_new_tokens, room)
        metrics.prompt_tokens = len(prompt_ids)

    def run(self) -> Iterator[Token]:
        """Prefill, then step until the end."""
        rows = self._prefill()
        while True:
            yield from self._emit(rows)
            if self._is_done:
                return
            rows = self._step()

    def _prefill(self) -> Rows:
        self._take_over()
        self._target.model.reserve(min(self._end, len(self._ids) + 1024))
        self._metrics.reused_tokens = self._target.align(self._ids)
        rows = self._target.catch_up(self._ids, self._metrics.reused_tokens, self._on_chunk)
        self._block = self._verify(rows, NO_PROPOSAL)
        return rows

    def _step(self) -> Rows:
        """Draft, run the target once over the last token and the draft, and verify."""
        if self._engine.current is not self:
            self._resume()
        begin = time.perf_counter()
        proposal, source, lag = self._propose()
        drafted_at = time.perf_counter()
        width = 1 + len(proposal.token_ids)
        rows = self._target.forward(self._ids[-1:] + proposal.token_ids, width)
        self._block = self._verify(rows, proposal)
        self._target.rollback(len(self._ids) + self._block.num_accepted)
        end = time.perf_counter()
        self._metrics.draft_s += drafted_at - begin
        if source is None:
            self._engine.record_plain_step(end - drafted_at)
        else:
            accepted = self._block.num_accepted
            self._engine.record_drafted_step(source, width, accepted, drafted_at - begin, end - drafted_at, lag)
        self._metrics.count_block(width - 1, self._block.num_accepted)
        return rows

    def _verify(self, rows: Rows, proposal: Proposal) -> VerifiedBlock:
        try:
            return verify(rows, proposal, self._sampler)
        except LogitsError:
            self._target.rollback(0)  # its keys and values may be NaN, and a later prompt may begin with these tokens
            raise

    def _resume(self) -> None:
        """Read the sequence again, after another request used the models."""
        self._take_over()
        self._target.catch_up(self._ids[:-1], 0, self._on_chunk)

    def _take_over(self) -> None:
        """Use the models from now on; first of all, so that who used them knows it even where this is interrupted."""
        self._engine.current = self
        for source in self._sources:
            source.drafter.start(self._ids)

    def _propose(self) -> tuple[Proposal, _Source | None, int]:
        """Ask the sources in turn; return the first draft with its source and the tokens it had to read before."""
        remaining = self._end - len(self._ids)
        for source in self._sources:
            lag = source.drafter.lag(len(self._ids))
            wanted = self._num_draft_tokens(source.pacing, remaining, lag)
            if wanted > 0:
                proposal = source.drafter.propose(self._ids, wanted, self._sampler)
                if proposal.token_ids:
                    return proposal, source, lag
        return NO_PROPOSAL, None, 0

    def _num_draft_tokens(self, pacing: Pacing, remaining: int, lag: int) -> int:
        # The target adds one token of its own, so the last remaining one is never drafted.
        config = self._config
        if config.num_draft_tokens != "auto":
            return min(config.num_draft_tokens, remaining - 1)
        return pacing.choose(min(config.max_draft_tokens, remaining - 1), lag, remaining)

    def _emit(self, rows: Rows) -> Iterator[Token]:
        """Yield the verified tokens up to a stop rule."""
        # All of them first: while this request waits between two tokens, another may overwrite the model's rows.
        tokens = [self._token(token_id, index, rows) for index, token_id in enumerate(self._block.token_ids)]
        for token in tokens:
            if token.token_id in self._stop:
                self._is_done = True
                return
            self._ids.append(token.token_id)
            self._count_token()
            self._is_done = len(self._ids) >= self._end
            yield token
            if self._is_done:
                return

    def _token(self, token_id: int, index: int, rows: Rows) -> Token:
        is_drafted = index < self._block.num_accepted
        if self._config.logprobs is None:
            return Token(token_id, is_drafted)
        return Token(token_id, is_drafted, *top_logprobs(rows[index], token_id, self._config.logprobs))

    def _count_token(self) -> None:
        metrics, elapsed = self._metrics, time.perf_counter() - self._started
        metrics.new_tokens += 1
        if metrics.new_tokens == 1:
            metrics.ttft_s = elapsed
        metrics.decode_s = elapsed - metrics.ttft_s


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
