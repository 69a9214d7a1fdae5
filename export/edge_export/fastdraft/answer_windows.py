"""Written answers as windows to train on: tokens, a mark on those that the target wrote, and its distributions of them.

The mark is bit 31 of the id: the losses count marked tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_export.corpus import Windows
from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    import torch

WRITTEN = 1 << 31
"""Marks a token of a window that the target wrote."""


class Teacher:
    """The target's sparse distributions of the tokens of windows.

    Args:
        top_ids: (N, T, k) token ids.
        probabilities: (N, T, k) of those tokens; 0 where the target wrote nothing.
    """

    def __init__(self, top_ids: NDArray[np.int32], probabilities: NDArray[np.float16]) -> None:
        self.top_ids, self.probabilities = top_ids, probabilities

    def batch(self, index: NDArray[np.int64], device: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and probabilities of some windows, (B, T, k) each."""
        import torch

        ids = torch.from_numpy(self.top_ids[index].astype(np.int64)).to(device)
        return ids, torch.from_numpy(self.probabilities[index].astype(np.float32)).to(device)


def answer_windows(answers: Path, length: int, end_of_text: int, top: int) -> tuple[Windows, Teacher | None]:
    """Pack prompts and answers into windows, what the target wrote marked; the incomplete rest is left out.

    Args:
        answers: JSON lines of `write_answers`.
        length: T of a window.
        end_of_text: Id that separates an answer from the next prompt, as it does documents; unmarked.
        top: k; 0 for no teacher.

    Raises:
        ConfigError: The answers do not fill one window.
    """
    tokens: list[NDArray[np.uint32]] = []
    tops: list[_Top] = []
    with answers.open(encoding="utf-8") as lines:
        for answer in map(json.loads, lines):
            prompt, written = (np.array(answer[name], np.uint32) for name in ("prompt_ids", "answer_ids"))
            tokens += [prompt, written | np.uint32(WRITTEN), np.array([end_of_text], np.uint32)]
            if top:
                tops += [_Top.of([[]] * len(prompt), top), _Top.of(answer["top"], top), _Top.of([[]], top)]
    ids = np.concatenate([*tokens, np.zeros(0, np.uint32)])
    count = len(ids) // length
    if count == 0:
        raise ConfigError(
            f"the answers have {len(ids)} tokens, but a window needs {length}",
            "write more answers, or a shorter --window",
        )
    windows = ids[: count * length].reshape(count, length)
    first = np.sort(np.unique(windows, axis=0, return_index=True)[1])
    if not top:
        return windows[first], None
    parts = (np.concatenate(some)[: count * length] for some in zip(*tops, strict=True))
    kept = (some.reshape(count, length, top)[first] for some in parts)
    return windows[first], Teacher(*kept)


class _Top(NamedTuple):
    """The most likely tokens of T positions and their probabilities, (T, k) each; 0 where fewer are known."""

    ids: NDArray[np.int32]
    probabilities: NDArray[np.float16]

    @classmethod
    def of(cls, positions: Sequence[Sequence[tuple[int, float]]], top: int) -> _Top:
        """Take what an answer's line holds, ids with log-probabilities."""
        some = cls(np.zeros((len(positions), top), np.int32), np.zeros((len(positions), top), np.float16))
        for row, pairs in enumerate(positions):
            if pairs:
                ids, logprobs = zip(*pairs[:top], strict=True)
                some.ids[row, : len(ids)], some.probabilities[row, : len(ids)] = ids, np.exp(logprobs)
        return some
