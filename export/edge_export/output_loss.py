"""Losses of a model's output layer without its logits in memory: a few rows at a time, gradients at once.

A draft is mostly vocabulary: for one window of 1 024 tokens and 128 K entries the logits take half a gigabyte, their
gradient as much again, and each is read several times. Here a block of rows becomes logits, a loss, the gradient of the
logits and that of states and weight while it is in a cache: 0.36 s instead of 0.54 for forward and backward of a draft
of 0.7 M parameters with 8 K entries (4 windows, 2 cores; docs/measurements). Source of the idea: Hsu et al. 2024
(Liger kernel, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LossOfRows = Callable[[torch.Tensor, slice], torch.Tensor]
"""(logits (R, V) in f32, which of all counted rows they are) to the loss of each row, (R,)."""

BLOCK_ELEMENTS = 1 << 20
"""Logits of a block: 4 MB in f32."""
PLAIN_HEADS = ("llama", "gpt2")
"""Families whose logits are the last hidden states times a matrix and nothing else, as far as tests show."""


def mean_loss(model: Any, token_ids: torch.Tensor, counts: torch.Tensor, loss_of_rows: LossOfRows) -> torch.Tensor:
    """Return the mean loss of those positions that count, a scalar; 0 where none does.

    Args:
        model: A transformers causal language model, or accelerate's wrapper of one.
        token_ids: (B, T).
        counts: (B, T), bool: the positions whose logits have a loss.
        loss_of_rows: What a row of logits costs; rows are the positions that count, in order.
    """
    plain = getattr(model, "module", model)
    number = max(1, int(counts.sum()))
    if plain.config.model_type not in PLAIN_HEADS:
        logits = model(input_ids=token_ids, use_cache=False).logits[counts]
        return loss_of_rows(logits.float(), slice(None)).sum() / number
    made = model(input_ids=token_ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    states = made.hidden_states[-1][counts]
    loss: torch.Tensor = _Blockwise.apply(states, plain.get_output_embeddings().weight, loss_of_rows) / number
    return loss


class _Blockwise(torch.autograd.Function):
    """(N, D) states and (V, D) weight to the sum of the rows' losses; both gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, loss_of_rows: LossOfRows) -> torch.Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _loss_and_gradients(states.to(dtype), weight.to(dtype), loss_of_rows)
        ctx.save_for_backward(gradients[0].to(states.dtype), gradients[1].to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_states, of_weight = ctx.saved_tensors
        return of_states * outer[0], of_weight * outer[0], None


def _loss_and_gradients(
    states: torch.Tensor, weight: torch.Tensor, loss_of_rows: LossOfRows
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.zeros((), device=states.device)
    of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight, dtype=torch.float32)
    rows = max(1, BLOCK_ELEMENTS // len(weight))
    for begin in range(0, len(states), rows):
        part = slice(begin, begin + rows)
        logits = (states[part] @ weight.T).float().requires_grad_()
        with torch.enable_grad():
            loss = loss_of_rows(logits, part).sum()
        of_logits = torch.autograd.grad(loss, logits)[0].to(weight.dtype)
        total += loss.detach()
        of_states[part] = of_logits @ weight
        if weight.dtype == torch.float32:
            of_weight.addmm_(of_logits.T, states[part])
        else:
            of_weight += of_logits.T @ states[part]
    return total, of_states, of_weight
