"""One pass of training: each window once, whatever kills the process."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_export.one_epoch import Ledger, window_hash
from edge_export.quiet import hide_packages
from edge_export.train import CHECKPOINT, LEDGER, LOG, TrainConfig, learning_rate, train
from edge_runtime.errors import ConfigError, ModelFormatError

CONFIG = TrainConfig(batch_size=4, checkpoint_s=0.0, precision="no")
WINDOWS = np.random.default_rng(0).integers(3, 60, (48, 24)).astype(np.uint32)


class Killed(BaseException):
    pass


@pytest.fixture
def model():
    hide_packages()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64))


def losses(out):
    lines = (out / LOG).read_text().splitlines()
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def kill_at(step):
    def on_step(progress):
        if progress.step == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_killed_run_sees_the_same_windows_and_ends_at_the_same_loss(model, tmp_path, at):
    import copy

    whole = copy.deepcopy(model)
    train(whole, WINDOWS, tmp_path / "whole", CONFIG)
    with pytest.raises(Killed):
        train(copy.deepcopy(model), WINDOWS, tmp_path / "killed", CONFIG, on_step=kill_at(at))
    train(model, WINDOWS, tmp_path / "killed", CONFIG)
    ledger = Ledger(tmp_path / "killed" / CHECKPOINT / LEDGER)
    assert len(ledger) == len(WINDOWS)
    assert all(window in ledger for window in WINDOWS)
    assert losses(tmp_path / "killed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_killed_between_the_two_renames_of_a_checkpoint(model, tmp_path):
    """The last checkpoint lay under another name then, and the run began again from nothing."""
    with pytest.raises(Killed):
        train(model, WINDOWS, tmp_path, CONFIG, on_step=kill_at(6))
    (tmp_path / CHECKPOINT).rename(tmp_path / f"{CHECKPOINT}.last")
    steps = []
    train(model, WINDOWS, tmp_path, CONFIG, on_step=lambda progress: steps.append(progress.step))
    assert steps[0] == 6


def test_it_learns(model, tmp_path):
    windows = np.stack([np.roll(np.arange(3, 27), i) for i in range(24)] * 2)
    windows[24:, -1] = 1
    train(model, windows.astype(np.uint32), tmp_path, TrainConfig(batch_size=4, learning_rate=3e-2, precision="no"))
    by_step = losses(tmp_path)
    assert by_step[12] < by_step[1] - 1


def test_other_text_does_not_continue_a_checkpoint(model, tmp_path):
    train(model, WINDOWS, tmp_path, CONFIG)
    with pytest.raises(ModelFormatError, match="other text"):
        train(model, WINDOWS[::-1].copy()[:24], tmp_path, CONFIG)


def test_a_window_twice_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="second time"):
        train(model, np.concatenate([WINDOWS, WINDOWS[:4]]), tmp_path, CONFIG)


def test_too_little_text_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="3 windows"):
        train(model, WINDOWS[:3], tmp_path, CONFIG)


def test_the_rate_rises_and_ends_at_zero():
    config = TrainConfig(learning_rate=2.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[9] == 2.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01


def test_equal_windows_have_equal_hashes_whatever_their_type():
    assert window_hash(WINDOWS[0]) == window_hash(WINDOWS[0].astype(np.int64))


def test_one_process_may_train_in_one_precision_after_another(model, tmp_path):
    """accelerate keeps the first: on a processor with bf16 a second training in f32 was refused."""
    for precision in ("bf16", "no"):
        config = TrainConfig(batch_size=4, checkpoint_s=0.0, precision=precision)
        train(model, WINDOWS[:8], tmp_path / precision, config)
