"""What alignment minimises: the answer's tokens, or the target's distribution of them.

Sequence-level distillation is cross-entropy on what the target wrote and needs no logits; FastDraft (arXiv 2411.11055)
found token-level losses to gain little over it. With p the target's and q the draft's distribution of a token:

    ce    -log q(token the target wrote)
    kl    sum p log(p / q)
    tvd   1/2 sum |p - q| = 1 - sum min(p, q)
    lk    -log sum min(p, q): the acceptance rate itself, without tvd's vanishing gradient (LK losses, 2026)

`ce+kl` and `ce+tvd` are means of two. The target's distribution is sparse: its most likely tokens and one bin for all
others, which only kl and tvd see; lk leaves it out.

Only tokens that the target wrote count (`answer_windows.WRITTEN`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_export.corpus import Windows
from edge_export.fastdraft.answer_windows import WRITTEN, Teacher
from edge_export.one_epoch import window_hash
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

LOSSES = ("ce", "kl", "tvd", "lk", "ce+kl", "ce+tvd")
LEAST = 1e-9
"""Probabilities below it are taken for it in a logarithm."""


def needs_teacher(name: str) -> bool:
    """Whether a loss looks at the target's distribution.

    Raises:
        ConfigError: There is no such loss.
    """
    if name not in LOSSES:
        raise ConfigError(f"loss is {name!r}, expected one of {', '.join(LOSSES)}")
    return name != "ce"


def alignment_loss(name: str, windows: Windows, teacher: Teacher | None) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a loss for `train.train`.

    Args:
        name: One of LOSSES.
        windows: (N, T) marked windows, to find a batch's rows of the teacher by.
        teacher: The target's sparse distributions; None for `ce`.
    """
    parts = name.split("+")
    rows_of = {window_hash(window): index for index, window in enumerate(windows)} if teacher else {}

    def loss(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        import torch

        from edge_export.output_loss import mean_loss

        is_written = (token_ids & WRITTEN) > 0
        is_written[:, 0] = False  # nothing predicts it
        ids = token_ids & (WRITTEN - 1)
        written = ids[is_written]
        if teacher:
            index = [rows_of[window_hash(window)] for window in token_ids.cpu().numpy()]
            top_ids, p = (some[is_written] for some in teacher.batch(np.array(index), ids.device))

        def loss_of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
            logq = torch.log_softmax(logits, -1)
            losses = [
                -logq.gather(1, written[rows, None])[:, 0]
                if part == "ce"
                else _DIVERGENCES[part](top_ids[rows], p[rows], logq)
                for part in parts
            ]
            return torch.stack(losses).mean(0)

        return mean_loss(model, ids, is_written.roll(-1, 1), loss_of_rows)

    return loss


def _kl(top_ids: torch.Tensor, p: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) of each row, (N,): of the listed tokens and of all others as one bin."""
    logq_top = logq.gather(1, top_ids)
    p_rest = (1 - p.sum(1)).clamp(min=0)
    q_rest = (1 - logq_top.exp().sum(1)).clamp(min=LEAST)
    listed = (p * (p.clamp(min=LEAST).log() - logq_top)).sum(1)
    return listed + p_rest * (p_rest.clamp(min=LEAST).log() - q_rest.log())


def _tvd(top_ids: torch.Tensor, p: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Return the total variation distance of each row, (N,)."""
    q = logq.gather(1, top_ids).exp()
    rest = (p.sum(1) - q.sum(1)).abs()
    return 0.5 * ((p - q).abs().sum(1) + rest)


def _lk(top_ids: torch.Tensor, p: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Return -log of the chance of acceptance of each row, (N,)."""
    import torch

    return -torch.minimum(p, logq.gather(1, top_ids).exp()).sum(1).clamp(min=LEAST).log()


_DIVERGENCES = {"kl": _kl, "tvd": _tvd, "lk": _lk}
