"""One step of many requests: read, draft, one forward of the target, verify, emit. Token ids in, tokens out; no text.

There is one loop. Plain decoding is speculation with nothing drafted, one request is a batch of one, and a prompt is a
token that is due with others before it: each step gives the target what it has not read of each request, a chunk of it
where it is long. Where that reaches the end, the request's sources of drafts are asked in order, each with its own
pacing; what they draft goes into the same forward, and one token after another is emitted until a stop rule ends the
request.

One thread at a time steps an engine. All state of a request is in `Request`; here is only what requests share: the
models, and what their steps were measured to cost.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters.base import Drafter
from edge_runtime.decoding.drafters.lookup import PromptLookup
from edge_runtime.decoding.pacing import ALONE, Load, Pacing, TargetCosts
from edge_runtime.decoding.request import Drafting, FinishReason, Request, Token
from edge_runtime.decoding.sampling import top_logprobs
from edge_runtime.decoding.speculative import NO_PROPOSAL, Proposal, VerifiedBlock, verify
from edge_runtime.errors import LogitsError
from edge_runtime.models.base import CausalModel, Output, Span

PROMPT_TOKENS_BESIDE_ANSWERS = 128
"""Prompt tokens of a step while others write: a chunk long enough to be read at full speed, and not longer."""
RESERVED = 1024
"""Tokens of an answer that memory is found for before it begins."""


class _Source:
    """A source of drafts, and what the last request that ended has learned of it."""

    def __init__(self, drafter: Drafter, costs: TargetCosts) -> None:
        self.drafter, self.pacing = drafter, Pacing(costs)


class _Part:
    """One request's part in a step.

    Args:
        request: Whose.
        token_ids: What the target is going to read of it.

    Attributes:
        is_prompt: Whether it belongs to the prompt, or to a text that is read again.
        is_whole: Whether nothing is left to be read after it, so that the next token comes.
        proposal: What is drafted to follow.
        num_drafted: How many tokens that are.
        drafting: What drafted it; None where nothing was.
        lag: Tokens that this had to read first.
        draft_s: Seconds that it took.
        load: What the other requests add to the step.
        block: What is emitted; None before it is known, and where nothing is.
    """

    proposal: Proposal = NO_PROPOSAL
    drafting: Drafting | None = None
    num_drafted = lag = 0
    draft_s = 0.0
    load: Load = ALONE
    block: VerifiedBlock | None = None

    def __init__(self, request: Request, token_ids: list[int], is_prompt: bool, is_whole: bool) -> None:
        self.request, self.token_ids, self.is_prompt, self.is_whole = request, token_ids, is_prompt, is_whole

    @property
    def span(self) -> Span:
        return Span(self.request.sequence, self.token_ids + self.proposal.token_ids, 1 + self.num_drafted)  # type: ignore[arg-type]


class Engine:
    """Steps requests with a target and, if given, a drafter.

    Args:
        target: The model whose answers are wanted.
        drafter: Drafts for it, mostly a `DraftModel`; prompt lookup needs none.
    """

    def __init__(self, target: CausalModel, drafter: Drafter | None = None) -> None:
        self.target, self.drafter = target, drafter
        self._costs = TargetCosts()
        self._lookup = _Source(PromptLookup(), self._costs)
        self._draft = drafter and _Source(drafter, self._costs)

    def can_draft(self, config: GenerationConfig) -> bool:
        """Return whether a request with these options has a source of drafts."""
        return bool(self._sources(config))

    def open(self, request: Request) -> None:
        """Give a request its share of the models; what is held already of its tokens is not computed again."""
        sequence = request.sequence = self.target.sequence(request.token_ids)
        sequence.reserve(min(request.end, len(request.token_ids) + RESERVED))
        if not request.metrics.new_tokens:
            request.metrics.reused_tokens = sequence.num_tokens
        request.draftings = [
            Drafting(source.drafter.open(request), source.pacing.for_request())
            for source in self._sources(request.config)
        ]

    def close(self, request: Request) -> None:
        """Take back a request's share; it may be opened again and goes on where it was."""
        for source, drafting in zip(self._sources(request.config), request.draftings, strict=False):
            source.pacing = drafting.pacing
            drafting.draft.close()
        request.draftings = []
        if request.sequence:
            request.sequence.close()
            request.sequence = None

    def finish(self, request: Request, reason: FinishReason, error: BaseException | None = None) -> None:
        """End a request, and let its reader know."""
        self.close(request)
        request.error, request.finish_reason = error, reason
        request.reader.wake(is_over=True)

    def step(self, requests: Sequence[Request]) -> None:
        """Take one step of requests that are open; those that end in it are finished.

        What fails for one request ends that one. What fails for all, such as the target's forward, is raised, and the
        requests are as before.

        Args:
            requests: At least one; none is finished. The prompts of the first are read first, as far as a step reads.
        """
        parts, has_prompt = self._parts(requests)
        self._propose(parts, has_prompt)
        began = time.perf_counter()
        outputs = self.target.forward([part.span for part in parts])
        for part, output in zip(parts, outputs, strict=True):
            self._verify(part, output)
        if not has_prompt:
            self._learn(parts, time.perf_counter() - began)
        for part, output in zip(parts, outputs, strict=True):
            if part.block:
                self._emit(part, part.block, output)

    def _sources(self, config: GenerationConfig) -> list[_Source]:
        """Return the sources of drafts of a request, the one asked first first."""
        if config.num_draft_tokens == 0:
            return []
        sources = [self._lookup] if config.lookup else []
        return [*sources, self._draft] if self._draft else sources

    def _parts(self, requests: Sequence[Request]) -> tuple[list[_Part], bool]:
        """Share the step out: what each request has unread, and whether any of it is a prompt's."""
        parts, left = [], None
        for request in requests:
            unread = request.unread_ids
            if len(unread) == 1 and request.metrics.new_tokens:
                parts.append(_Part(request, unread, False, True))
                continue
            left = self._prompt_tokens(requests) if left is None else left
            if left > 0:
                chunk = unread[:left]
                left -= len(chunk)
                request.reader.take_progress(len(request.token_ids) - len(unread), len(request.token_ids))
                parts.append(_Part(request, chunk, True, len(chunk) == len(unread)))
        return parts, left is not None

    def _prompt_tokens(self, requests: Sequence[Request]) -> int:
        """Return how many tokens of prompts a step reads, all requests together."""
        most = self.target.chunk_size
        return most if all(request.is_reading for request in requests) else min(most, PROMPT_TOKENS_BESIDE_ANSWERS)

    def _propose(self, parts: list[_Part], has_prompt: bool) -> None:
        """Let the sources of each answer draft, one request after another, who know what the step has already."""
        rows, tokens = 0, 0.0
        for part in parts:
            if part.is_prompt or not part.request.draftings:
                continue
            if len(parts) > 1:
                part.load = Load(sum(len(each.token_ids) for each in parts) - 1 + rows, len(parts) - 1 + tokens)
            self._ask(part, has_prompt)
            if part.drafting and len(parts) > 1:
                rows += part.num_drafted
                tokens += part.drafting.pacing.expected_tokens(part.num_drafted) - 1

    def _ask(self, part: _Part, has_prompt: bool) -> None:
        """Ask a request's sources in turn, and take the first draft that comes."""
        request = part.request
        began = time.perf_counter()
        for drafting in request.draftings:
            lag = drafting.draft.num_unread
            wanted = self._num_draft_tokens(request, drafting.pacing, lag, part.load, has_prompt)
            if wanted > 0:
                proposal = drafting.draft.propose(wanted, request.sampler)
                if proposal.token_ids:
                    part.proposal, part.drafting, part.lag = proposal, drafting, lag
                    part.num_drafted = len(proposal.token_ids)
                    break
        part.draft_s = time.perf_counter() - began
        request.metrics.draft_s += part.draft_s

    @staticmethod
    def _num_draft_tokens(request: Request, pacing: Pacing, lag: int, load: Load, has_prompt: bool) -> int:
        # The target adds one token of its own, so the last remaining one is never drafted.
        config, remaining = request.config, request.end - len(request.token_ids)
        if config.num_draft_tokens != "auto":
            return min(config.num_draft_tokens, remaining - 1)
        if has_prompt:  # whose rows fill the processor: each drafted one costs what it costs
            return 0
        return pacing.choose(min(config.max_draft_tokens, remaining - 1), lag, remaining, load)

    def _verify(self, part: _Part, output: Output) -> None:
        """Find what is emitted, and let the sequence hold nothing that is not."""
        if not part.is_whole:
            return
        request = part.request
        assert request.sequence is not None
        try:
            block = verify(output.logits, part.proposal, request.sampler)
        except LogitsError as error:
            sequence, request.sequence = request.sequence, None
            sequence.discard()  # keys and values may be NaN, and a later prompt may begin with these tokens
            self.finish(request, "error", error)
            return
        if block.num_accepted < part.num_drafted:
            request.sequence.rollback(len(request.token_ids) + block.num_accepted)
        for drafting in request.draftings:
            drafting.draft.observe(block, output)
        part.block = block

    def _learn(self, parts: list[_Part], seconds: float) -> None:
        """Learn what a step without prompts cost and brought."""
        rows = len(parts) + sum([part.num_drafted for part in parts])
        self._costs.record(rows, seconds)
        for part in parts:
            if not part.block:
                continue
            accepted = part.block.num_accepted
            part.request.metrics.count_block(part.num_drafted, accepted)
            if part.drafting:
                load = Load(rows - 1 - part.num_drafted, _num_emitted(parts, part)) if len(parts) > 1 else ALONE
                part.drafting.pacing.record(part.num_drafted, accepted, part.draft_s, seconds, part.lag, load)

    def _emit(self, part: _Part, block: VerifiedBlock, output: Output) -> None:
        """Emit the verified tokens up to a stop rule."""
        request = part.request
        reason: FinishReason | None = None
        try:
            for index, token_id in enumerate(block.token_ids):
                token = _token(request.config, token_id, index, block, output)
                if token_id in request.stop_token_ids:
                    request.stop_token, reason = token, "stop"
                else:
                    reason = request.emit(token)
                if reason:
                    self.finish(request, reason)
                    return
            request.reader.wake(is_over=False)
        except Exception as error:  # noqa: BLE001 - the reader's, whose tokenizer fails: no other request does
            self.finish(request, "error", error)


def _token(config: GenerationConfig, token_id: int, index: int, block: VerifiedBlock, output: Output) -> Token:
    is_drafted = index < block.num_accepted
    if config.logprobs is None:
        return Token(token_id, is_drafted)
    return Token(token_id, is_drafted, *top_logprobs(output.logits[index], token_id, config.logprobs))


def _num_emitted(parts: Iterable[_Part], but: _Part) -> float:
    """Return how many tokens the other parts of a step emit."""
    return float(sum(len(part.block.token_ids) for part in parts if part.block and part is not but))
