"""Alignment losses against their definitions on hand-made distributions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edge_export import output_loss
from edge_export.fastdraft.answer_windows import WRITTEN, Teacher
from edge_export.fastdraft.losses import LOSSES, alignment_loss, needs_teacher
from edge_export.quiet import quiet
from edge_runtime.errors import ConfigError

P = np.array([0.5, 0.3, 0.15, 0.05])
Q = np.array([0.2, 0.2, 0.5, 0.1])
WINDOW = np.array([[3, 1, 2 | WRITTEN]], np.uint32)
"""Only the last token was written by the target."""


def model(**inputs):
    """A draft that says Q everywhere."""
    assert int(inputs["input_ids"].max()) < 4, "the mark reached the model"
    batch, length = inputs["input_ids"].shape
    return SimpleNamespace(logits=torch.tensor(Q).log().expand(batch, length, 4))


model.config = SimpleNamespace(model_type="a test's")


@pytest.fixture
def llama(tiny_hf):
    with quiet():
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(tiny_hf("llama"), dtype=torch.float32, local_files_only=True)


def loss_of(name, listed=4):
    top = np.argsort(-P)[:listed]
    ids, p = np.zeros((1, 3, listed), np.int32), np.zeros((1, 3, listed), np.float16)
    ids[0, 2], p[0, 2] = top, P[top]
    teacher = Teacher(ids, p) if needs_teacher(name) else None
    loss = alignment_loss(name, WINDOW, teacher)
    return float(loss(model, torch.from_numpy(WINDOW.astype(np.int64))))


KL = float((P * np.log(P / Q)).sum())
TVD = float(np.abs(P - Q).sum() / 2)
CE = -math.log(Q[2])
EXPECTED = {"ce": CE, "kl": KL, "tvd": TVD, "lk": -math.log(1 - TVD), "ce+kl": (CE + KL) / 2, "ce+tvd": (CE + TVD) / 2}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_what_its_formula_says(name):
    assert loss_of(name) == pytest.approx(EXPECTED[name], abs=2e-3)  # the teacher is kept in f16


def test_unlisted_tokens_are_one_bin_of_kl_and_tvd():
    """With two tokens listed, both are those of three-way distributions."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert loss_of("kl", 2) == pytest.approx(float((p * np.log(p / q)).sum()), abs=2e-3)
    assert loss_of("tvd", 2) == pytest.approx(float(np.abs(p - q).sum() / 2), abs=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_in_blocks_as_from_whole_logits(name, llama, monkeypatch):
    random = np.random.default_rng(0)
    windows = random.integers(llama.config.vocab_size, size=(3, 12)).astype(np.uint32)
    windows[random.random(windows.shape) < 0.5] |= WRITTEN
    p = random.dirichlet(np.ones(5), size=(3, 12))[..., :4].astype(np.float16)
    teacher = Teacher(random.integers(llama.config.vocab_size, size=(3, 12, 4)).astype(np.int32), p)
    loss = alignment_loss(name, windows, teacher if needs_teacher(name) else None)
    batch = torch.from_numpy(windows[[2, 0]].astype(np.int64))
    monkeypatch.setattr(output_loss, "BLOCK_ELEMENTS", 3 * llama.config.vocab_size)
    in_blocks = loss(llama, batch)
    monkeypatch.setattr(output_loss, "PLAIN_HEADS", ())
    torch.testing.assert_close(in_blocks, loss(llama, batch))


@pytest.mark.parametrize("heads", [output_loss.PLAIN_HEADS, ()])
def test_a_window_of_prompt_alone_teaches_nothing(llama, heads, monkeypatch):
    """Its loss was 0 / 0, and so was the draft after it."""
    monkeypatch.setattr(output_loss, "PLAIN_HEADS", heads)
    window = np.array([[3, 1, 2]], np.uint32)
    loss = alignment_loss("ce", window, None)(llama, torch.from_numpy(window.astype(np.int64)))
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in llama.parameters() if p.grad is not None)


def test_an_unknown_loss_is_refused():
    with pytest.raises(ConfigError, match="loss is 'mse'"):
        needs_teacher("mse")
