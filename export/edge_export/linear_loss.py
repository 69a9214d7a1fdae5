"""Cross-entropy of an output layer without its logits in memory: a few rows at a time, gradients at once.

A draft is mostly vocabulary: for one window of 1 024 tokens and 128 K entries the logits take half a gigabyte, their
gradient as much again, and each is read several times. Here a block of rows is multiplied, turned into probabilities,
into the gradient of the logits and multiplied again while it is in a cache. Source of the idea: Hsu et al. 2024 (Liger
kernel, arXiv 2410.10989, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK_ELEMENTS = 1 << 20
"""Logits of a block: 4 MB in f32."""


class _LinearCrossEntropy(torch.autograd.Function):
    """(N, D) states, (V, D) weight and (N,) labels to the mean cross-entropy; both gradients are made on the way."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _loss_and_gradients(states.to(dtype), weight.to(dtype), labels)
        ctx.save_for_backward(gradients[0].to(states.dtype), gradients[1].to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        of_states, of_weight = ctx.saved_tensors
        return of_states * outer[0], of_weight * outer[0], None


def _loss_and_gradients(
    states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.zeros((), device=states.device)
    of_states, of_weight = torch.empty_like(states), torch.zeros_like(weight, dtype=torch.float32)
    rows = max(1, BLOCK_ELEMENTS // len(weight))
    for begin in range(0, len(states), rows):
        block, label = states[begin : begin + rows], labels[begin : begin + rows, None]
        logits = (block @ weight.T).float()
        largest = logits.amax(1, keepdim=True)
        wanted = logits.gather(1, label)
        probabilities = logits.sub_(largest).exp_()
        sums = probabilities.sum(1, keepdim=True)
        total += (sums.log() + largest - wanted).sum()
        of_logits = probabilities.div_(sums * len(states))
        of_logits.scatter_add_(1, label, of_logits.new_full(label.shape, -1 / len(states)))
        narrow = of_logits.to(weight.dtype)
        of_states[begin : begin + rows] = narrow @ weight
        of_weight.addmm_(narrow.T, block) if narrow.dtype == torch.float32 else of_weight.add_(narrow.T @ block)
    return total / len(states), of_states, of_weight


def linear_cross_entropy(states: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log softmax(states @ weight.T)[labels], a scalar.

    Args:
        states: (N, D), what the output layer reads.
        weight: (V, D), the output layer; it has no bias.
        labels: (N,) token ids.
    """
    loss: torch.Tensor = _LinearCrossEntropy.apply(states, weight, labels)
    return loss
