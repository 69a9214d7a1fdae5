"""What the tests of the NPU share: NPUW on the CPU, and PagedAttention on the CPU in f32 to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_runtime.config import LoadConfig
from edge_runtime.manifest import load_manifest
from edge_runtime.models.loading import load_model
from edge_runtime.models.paged import PagedModel
from edge_runtime.models.static import StaticModel

KEYS_IN_F16 = 0.1
"""Logits spread over several units. Keys and values in f16 move them by up to 0.042 (80,000 rows; in PagedAttention by
0.024), a mask or cache that is wrong by one token by more than 1."""
V = 384
CHUNKS = {"context_length": 200, "prefill_chunk_size": 64}


def load(folder: Path, step_tokens: int = 8, **options) -> StaticModel:
    config = LoadConfig(device="NPU", npu_step_tokens=step_tokens, **options)
    return load_model(folder, load_manifest(folder), config)


def reference(folder: Path) -> PagedModel:
    return load_model(folder, load_manifest(folder), LoadConfig(precision="f32"))


def random_ids(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, number).tolist()
