"""What the tests of the NPU share: NPUW on the CPU, and PagedAttention on the CPU in f32 to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.config import LoadConfig
from edge_runtime.manifest import load_manifest
from edge_runtime.models.base import CausalModel, Rows, advance
from edge_runtime.models.loading import load_model
from edge_runtime.models.static import StaticModel

KEYS_IN_F16 = 0.1
"""Logits spread over several units. Keys and values in f16 move them by up to 0.042 (80,000 rows; in PagedAttention by
0.024), a mask or cache that is wrong by one token by more than 1."""
V = 384
CHUNKS = {"context_length": 200, "prefill_chunk_size": 64}


class Alone:
    """A model and the one sequence of it that is used.

    Args:
        model: Any.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sequence = model.sequence()

    @property
    def num_tokens(self) -> int:
        return self.sequence.num_tokens

    def forward(self, token_ids: list[int], num_rows: int = 1) -> Rows:
        return advance(self.model, self.sequence, token_ids, num_rows)

    def rollback(self, num_tokens: int) -> None:
        assert self.sequence.rollback(num_tokens) == min(num_tokens, self.num_tokens)

    def begin_anew(self) -> None:
        self.sequence.close()
        self.sequence = self.model.sequence()


def load(folder: Path, step_tokens: int = 8, **options: Any) -> StaticModel:
    config = LoadConfig(device="NPU", npu_step_tokens=step_tokens, **options)
    model = load_model(folder, load_manifest(folder), config)
    assert isinstance(model, StaticModel)
    return model


def reference(folder: Path) -> CausalModel:
    return load_model(folder, load_manifest(folder), LoadConfig(precision="f32"))


def random_ids(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, number).tolist()
