"""Every request of a mixed batch gets exactly the text that it gets alone, in f32, whatever the others do.

Greedy and sampled with a seed, with penalties, stop strings, prompt lookup and a draft; on stock attention, on the
patterns of LongGen and S2-Attention, and with neurons that are skipped. Others come later, are cancelled, fail, or do
not read.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.errors import LogitsError
from edge_runtime.models.attention import longgen, s2
from tests.runtime.models.test_block_sparse import with_pattern
from tests.runtime.models.test_fused_mlp import fused_copy
from tests.tiny_models import SENTENCES, export_tiny

pytestmark = pytest.mark.kernels

MIXES = int(os.environ.get("EDGE_RUN_TEST_MIXES", "8"))
"""Mixes of each model; with 40 there are 200."""
MODELS = ("embedded pair", "stock", "longgen", "s2", "cats")
PROMPTS = (*SENTENCES, "The", SENTENCES[0] + " The fox", " ".join(SENTENCES[:4]))
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Models with their drafts, which know something of the target: the same weights, less exact."""
    folder = tmp_path_factory.mktemp("mixes")
    dense = export_tiny("llama", folder / "dense", num_hidden_layers=3)
    draft = export_tiny("llama", folder / "draft", weights="int8", num_hidden_layers=3)
    patterns = {
        "longgen": longgen(3, sink=20, window=48, block_size=16),
        "s2": s2(3, 2, window=32, stride=2, dense_every=3, block_size=16),
    }
    made = {name: with_pattern(dense, pattern, folder / name) for name, pattern in patterns.items()}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    stock = export_tiny("llama", folder / "int8", weights="int8", **sizes)
    made |= {"stock": dense, "cats": fused_copy(stock, folder / "cats", [np.array([0.2], np.float32)] * 2)}
    return {name: {"model": path, "draft": stock if name == "cats" else draft} for name, path in made.items()}


@pytest.fixture(scope="module", params=MODELS)
def models(request, folders) -> tuple[EdgeLLM, Callable[..., Any]]:
    """One that answers mixes, and what another one answers alone."""
    llm, other = (EdgeLLM.load(**folders.get(request.param, {}), precision="f32") for _ in range(2))
    known: dict[str, Any] = {}

    def alone(prompt: str, options: dict[str, Any]) -> Any:
        key = repr((prompt, options))
        if key not in known:
            known[key] = other.generate(prompt, **{**options, "num_draft_tokens": 0, "lookup": False})
        return known[key]

    return llm, alone


def options_of(chance: random.Random) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": chance.choice([1, 7, 24, 40]),
        "num_draft_tokens": chance.choice([0, 0, 2, 5, "auto"]),
        "lookup": chance.random() < 0.4,
    }
    if chance.random() < 0.5:
        options |= {"temperature": 0.8, "seed": chance.randint(0, 3), "top_p": 0.9}
    if chance.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "presence_penalty": 0.4, "logit_bias": {70: 1.0}}
    if chance.random() < 0.3:
        options["stop"] = [chance.choice(["e", "o", " t"])]
    return options


class Reader(threading.Thread):
    """Reads one answer in its own way, in its own thread."""

    def __init__(self, llm: EdgeLLM, prompt: str, options: dict[str, Any], kind: str, chance: random.Random) -> None:
        super().__init__(daemon=True)
        self.kind = kind
        self.error: BaseException | None = None
        self._llm, self._prompt, self._options = llm, prompt, options
        self._pauses = [chance.random() * 0.01 for _ in range(50)]
        self._leaves_after = chance.randint(0, 6)

    def run(self) -> None:
        """Read."""
        try:
            self._read()
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error

    def _read(self) -> None:
        options = dict(self._options)
        if self.kind == "failing":
            options["logit_bias"] = dict.fromkeys(range(self._llm.vocab_size), float("-inf"))
        stream = self._llm.stream(self._prompt, **options)
        if self.kind in ("whole", "failing"):
            stream.finish()
        for number, _ in enumerate(stream):
            if self.kind == "leaving" and number == self._leaves_after:
                break
            if self.kind == "cancelling" and number == self._leaves_after:
                stream.cancel()
            if self.kind == "slow":
                time.sleep(self._pauses[number % 50])
        self.result = stream.result


@pytest.mark.parametrize("seed", range(MIXES))
def test_each_request_of_a_mix_gets_what_it_gets_alone(models, seed):
    llm, alone = models
    chance = random.Random(seed)
    readers, wanted = [], []
    for _ in range(chance.randint(2, 8)):
        prompt, options = chance.choice(PROMPTS), options_of(chance)
        wanted.append(alone(prompt, options))
        kind = chance.choice(["whole", "whole", "slow", "leaving", "cancelling", "failing"])
        readers.append(Reader(llm, prompt, options, kind, chance))
    for reader in readers:
        reader.start()
        time.sleep(chance.choice([0, 0, 0.003]))
    for reader, answer in zip(readers, wanted, strict=True):
        reader.join(TIMEOUT_S)
        assert not reader.is_alive(), "it waits for ever"
        if reader.kind == "failing":
            assert isinstance(reader.error, LogitsError)
        elif reader.kind in ("whole", "slow"):
            assert (reader.result.text, reader.result.token_ids) == (answer.text, answer.token_ids)
            assert reader.result.finish_reason == answer.finish_reason
        else:
            assert answer.token_ids[: len(reader.result.token_ids)] == reader.result.token_ids
