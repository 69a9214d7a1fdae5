"""Several answers at once: one forward carries a token of each, so that the weights are read once for all of them.

For offline work. Batching already saturates the CPU, so drafting is off. Each answer has its own options and random
numbers, and equals what `Engine` would write alone, but for the rounding of wider matrix products.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.sampling import Sampler, top_logprobs
from edge_runtime.decoding.speculative import NO_PROPOSAL, verify
from edge_runtime.models.base import Rows
from edge_runtime.models.paged import PagedModel

MOST_SEQUENCES = 16
"""A choice, not tuned: one reading of the weights serves 16 tokens, and a batch still ends soon."""
MOST_KV_BYTES = 1 << 30
"""Most bytes of keys and values, all sequences together."""


class BatchAnswer:
    """One answer as it is written.

    Args:
        prompt_ids: At least one token.
        config: Options of this answer.

    Attributes:
        token_ids: Tokens written so far; the last is the stop token, if one came.
        top_logprobs: Most likely ids and their log-probabilities for each token, where the options ask for them.
        is_done: Whether it is complete.
    """

    def __init__(self, prompt_ids: list[int], config: GenerationConfig) -> None:
        self.token_ids: list[int] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.is_done = False
        self._config = config
        self._sampler = Sampler(config, prompt_ids)

    def take(self, row: Rows, stop_token_ids: Collection[int]) -> None:
        """Draw the next token from its logits, (1, V)."""
        (token_id,) = verify(row, NO_PROPOSAL, self._sampler).token_ids
        if self._config.logprobs is not None:
            self.top_logprobs.append(top_logprobs(row[0], token_id, self._config.logprobs)[1])
        self.token_ids.append(token_id)
        self.is_done = token_id in stop_token_ids or len(self.token_ids) >= self._config.max_new_tokens


class SequenceBatch:
    """Sequences that share a model's cache, each in blocks of its own, until the model serves something else.

    Args:
        model: Whose caches they share.
        count: B, how many.
        num_tokens: The longest may have.
    """

    def __init__(self, model: PagedModel, count: int, num_tokens: int) -> None:
        self._model = model
        self._held = np.zeros(count, np.int32)
        self._blocks = np.arange(count * model.blocks_for(num_tokens), dtype=np.int32).reshape(count, -1)
        model.reserve_sequences(self._blocks.size)

    def forward(self, sequences: Sequence[int], token_ids: Sequence[list[int]]) -> Rows:
        """Append tokens to some of the sequences; return the logits after the last of each, (len(sequences), V).

        The rows are valid until the next call.
        """
        chosen = np.array(sequences)
        past = self._held[chosen]
        self._held[chosen] += np.array([len(ids) for ids in token_ids], np.int32)
        return self._model.forward_sequences(token_ids, past, self._blocks[chosen])


def most_sequences(model: PagedModel, num_tokens: int) -> int:
    """Return how many sequences of a length to write at once: as many as help and as memory is there for."""
    each = model.blocks_for(num_tokens) * model.cache.block_bytes
    return max(1, min(MOST_SEQUENCES, MOST_KV_BYTES // each))


def write_batch(
    model: PagedModel,
    prompts: Sequence[list[int]],
    configs: Sequence[GenerationConfig],
    stop_token_ids: Collection[int] = (),
) -> list[BatchAnswer]:
    """Continue several prompts at once, each until a stop token or its `max_new_tokens`.

    Args:
        model: Serves nothing else meanwhile; what it held before is forgotten.
        prompts: Token ids, at least one each; with its answer each fits the context.
        configs: One for each prompt; stop strings and drafting are not for batches.
        stop_token_ids: Ids that end an answer.

    Raises:
        LogitsError: No token can be drawn for one of the answers.
    """
    answers = [BatchAnswer(ids, config) for ids, config in zip(prompts, configs, strict=True)]
    longest = max(len(ids) + config.max_new_tokens for ids, config in zip(prompts, configs, strict=True))
    batch = SequenceBatch(model, len(prompts), longest)
    for index, ids in enumerate(prompts):
        answers[index].take(batch.forward([index], [ids]), stop_token_ids)
    while active := [index for index, answer in enumerate(answers) if not answer.is_done]:
        rows = batch.forward(active, [answers[index].token_ids[-1:] for index in active])
        for row, index in enumerate(active):
            answers[index].take(rows[row : row + 1], stop_token_ids)
    return answers
