"""Thresholds leave dead the share that was asked for, on data whose quantiles are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from edge_export.cats import MIN_WINDOWS, MlpFormat
from edge_export.cats.calibrate import Quantiles, find_thresholds, masked, realised_sparsity, sparsify
from edge_runtime.errors import ConfigError, ExportError

SHARE_TOLERANCE = 1e-3
"""A tenth of a point."""
VOCAB, HIDDEN, FFN = 512, 8, 64


class Mlp(nn.Module):
    """One gated MLP over random rows, as large as is needed for known statistics."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, FFN, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(FFN, HIDDEN, bias=False)
        self.act_fn = nn.SiLU()
        self.up_proj.weight.data *= torch.linspace(0.1, 4, FFN)[:, None]

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Decoder(nn.Module):
    """Looks up a row for each token and runs two MLPs over it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Mlp(1), Mlp(2)])

    def forward(self, token_ids: Any, use_cache: bool = False) -> Any:
        x = self.rows(token_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=x)


WINDOWS = [list(range(begin, begin + 64)) for begin in range(0, VOCAB, 64)]


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_quantile_of_a_normal_distribution(share, scale):
    quantiles, random = Quantiles(), torch.Generator().manual_seed(0)
    samples = [torch.randn(1000, 300, generator=random) * scale for _ in range(4)]
    for sample in samples:
        quantiles.add(sample)
    limit = quantiles.quantile(share)
    realised = float((torch.cat(samples).abs() <= limit).double().mean())
    assert share <= realised < share + SHARE_TOLERANCE
    assert 2 * norm.cdf(limit / scale) - 1 == pytest.approx(share, abs=2 * SHARE_TOLERANCE)


def test_quantile_of_zeros_is_zero_for_every_use():
    quantiles = Quantiles()
    quantiles.add(torch.cat([torch.zeros(600), torch.ones(400)]))
    assert quantiles.quantile(0.5) < np.finfo(np.float32).tiny
    assert 1 <= quantiles.quantile(0.7) < 1.001


def activations(model, layer):
    """Return |a| (tokens, F) and E[u²] (F,) of a layer of the dense model, computed here."""
    with torch.no_grad():
        x = model.rows(torch.arange(VOCAB))
        for before in model.layers[:layer]:
            x = x + before(x)
        mlp = model.layers[layer]
        return mlp.act_fn(mlp.gate_proj(x)).abs(), mlp.up_proj(x).square().mean(0)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_cats_is_the_quantile_of_each_layer(share):
    model = Decoder()
    for layer, limits in enumerate(find_thresholds(model, WINDOWS, MlpFormat(cats=share))):
        a, _ = activations(model, layer)
        assert limits.shape == (1,)
        assert float((a <= float(limits[0])).float().mean()) == pytest.approx(share, abs=SHARE_TOLERANCE)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_chess_is_the_quantile_of_what_a_neuron_contributes(share):
    model = Decoder()
    for layer, limits in enumerate(find_thresholds(model, WINDOWS, MlpFormat(cats=share, cats_method="chess"))):
        a, squares = activations(model, layer)
        assert limits.shape == (FFN,)
        assert float((a <= torch.from_numpy(limits)).float().mean()) == pytest.approx(share, abs=SHARE_TOLERANCE)
        budgets = limits**2 * squares.numpy()
        np.testing.assert_allclose(budgets, np.quantile((a.square() * squares).numpy(), share), rtol=5e-3)


def test_merged_projection_is_gate_then_up():
    class Merged(Mlp):
        def __init__(self, seed: int) -> None:
            super().__init__(seed)
            self.gate_up_proj = nn.Linear(HIDDEN, 2 * FFN, bias=False)
            self.gate_up_proj.weight.data = torch.cat([self.gate_proj.weight.data, self.up_proj.weight.data])
            self.activation_fn = self.act_fn
            del self.gate_proj, self.up_proj, self.act_fn

        def forward(self, x: Any) -> Any:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(self.activation_fn(gate) * up)

    one, other, form = Decoder(), Decoder(), MlpFormat(cats=0.5, cats_method="chess")
    other.layers = nn.ModuleList([Merged(1), Merged(2)])
    for mine, theirs in zip(find_thresholds(one, WINDOWS, form), find_thresholds(other, WINDOWS, form), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3)


def test_realised_sparsity_is_measured_with_earlier_layers_sparse():
    """A later layer sees what the sparse earlier ones leave, in the model that runs."""
    model = Decoder()
    first, second = find_thresholds(model, WINDOWS, MlpFormat(cats=0.9))
    realised = realised_sparsity(model, WINDOWS, (first, second))
    x = model.rows(torch.arange(VOCAB))
    for limits, share, mlp in zip((first, second), realised, model.layers, strict=True):
        a = mlp.act_fn(mlp.gate_proj(x))
        is_dead = a.abs() <= float(limits[0])
        assert share == pytest.approx(float(is_dead.float().mean()), abs=1e-5)
        x = x + mlp.down_proj(a.masked_fill(is_dead, 0) * mlp.up_proj(x))
    assert realised[0] == pytest.approx(0.9, abs=SHARE_TOLERANCE)
    assert abs(realised[1] - 0.9) > SHARE_TOLERANCE


def test_masks_leave_nothing_behind():
    model, ids = Decoder(), torch.tensor([WINDOWS[0]])
    before = model(ids).logits
    with masked(model, [np.array([np.inf], np.float32)] * 2):
        assert torch.equal(model(ids).logits, model.rows(ids))
    assert torch.equal(model(ids).logits, before)


def test_last_windows_are_held_back():
    """Their tokens are found nowhere else: thresholds must not have seen them."""
    model, ids = Decoder(), np.array([WINDOWS[0]])
    model.rows.weight.data[VOCAB * 7 // 8 :] = 0
    dense = model(torch.from_numpy(ids)).logits.detach().numpy()
    sparsity, logits = sparsify(model, WINDOWS, MlpFormat(cats=0.5), ids, dense)
    assert sparsity.realised[0] > 0.7  # one of the two windows held back is all zeros
    np.testing.assert_array_equal(sparsity.thresholds[0], find_thresholds(model, WINDOWS[:6], MlpFormat(cats=0.5))[0])
    assert sparsity.effect.error > 0
    assert not np.array_equal(logits, dense)


def test_text_that_is_too_short_is_refused():
    with pytest.raises(ConfigError, match="less than 320 tokens, which cats needs"):
        sparsify(Decoder(), WINDOWS[: MIN_WINDOWS - 1], MlpFormat(cats=0.5), np.zeros((1, 1), np.int64), np.zeros(1))


def test_model_without_gated_mlp_is_refused():
    with pytest.raises(ExportError, match="cats supports gated MLPs"):
        find_thresholds(nn.Linear(2, 2), WINDOWS, MlpFormat(cats=0.5))
