"""Widening keeps the function, and adds nothing that an engine could skip but the zeros that it needs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edge_export import torch_source, verify
from edge_runtime import EdgeLLM
from edge_runtime.demo import demo_target
from edge_runtime.errors import ConfigError
from tests.tiny_models import make_hf_model

SEED = 3


@pytest.fixture(scope="module")
def widen(script: Callable[[str], ModuleType]) -> Any:
    return script("widen")


@pytest.fixture(scope="module", params=["tied", "untied", "no whole groups"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with two query heads for each KV head; 64 and 128 wide, or 96 and 136."""
    sizes = {"hidden_size": 96, "intermediate_size": 136, "head_dim": 16} if "groups" in request.param else {}
    folder = tmp_path_factory.mktemp("source") / "hf"
    return make_hf_model("llama", folder, tie_word_embeddings=request.param == "tied", **sizes)


@pytest.fixture(scope="module")
def pair(widen: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The source and a model of 20 times its size, as loaded from disk."""
    small = widen.load(source)
    config = widen.wide(small.config, 20 * torch_source.num_parameters(small))
    folder = widen.save_wide(small, source, config, tmp_path_factory.mktemp("wide"), SEED)
    return small, widen.load(folder)


@pytest.mark.parametrize(("output", "told"), [("hf", "is the source"), (".", "holds the source"), ("out", "not empty")])
def test_nothing_is_written_over(
    widen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, told: str
) -> None:
    """With its source as OUT/hf, it wrote random weights over it."""
    for name in ("hf", "out/hf"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["widen.py", str(tmp_path / "hf"), "-o", str(tmp_path / output)])
    with pytest.raises(ConfigError, match=told):
        widen.main()


def test_logits_are_the_sources(widen: Any, pair: tuple[Any, Any]) -> None:
    token_ids = np.random.default_rng(0).integers(0, 384, (2, 24))
    small, large = (torch_source.reference_logits(model, token_ids) for model in pair)
    assert np.abs(small - large).max() <= widen.TOLERANCE * small.std()


def test_size_is_the_asked_one(widen: Any, pair: tuple[Any, Any]) -> None:
    wanted, got = 20 * torch_source.num_parameters(pair[0]), torch_source.num_parameters(pair[1])
    assert got == widen.num_parameters(pair[1].config)
    assert abs(got / wanted - 1) < 0.1


def test_added_weights_are_zero_only_where_the_residual_is_written(widen: Any, pair: tuple[Any, Any]) -> None:
    for name, value in pair[1].state_dict().items():
        if not any(writer in name for writer in widen.WRITERS):
            assert (value != 0).all(), name


def test_added_weights_leave_each_rows_grid_as_it_was(widen: Any, pair: tuple[Any, Any]) -> None:
    """int8 has a scale for each row, int4 for each group: a larger weight among them would coarsen the trained ones."""
    small, large = (model.state_dict()["model.layers.0.mlp.gate_proj.weight"] for model in pair)
    rows = large[: len(small)]
    assert (rows.amax(1) == small.amax(1)).all() and (rows.amin(1) == small.amin(1)).all()
    begin = small.shape[1] // widen.GROUP * widen.GROUP
    group = rows[:, begin : begin + widen.GROUP]
    assert (group.amax(1) == small[:, begin:].amax(1)).all()


def test_added_weights_are_as_large_as_trained_ones(pair: tuple[Any, Any]) -> None:
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
        small, large = (model.state_dict()[f"model.layers.1.{name}.weight"].std() for model in pair)
        assert abs(large / small - 1) < 0.1, name


def test_added_layers_add_nothing_but_work(widen: Any, source: Path, tmp_path: Path) -> None:
    """The proportions of common models leave so small a source its two layers: ask for more of them."""
    small = widen.load(source)
    least = widen.padded(small.config)
    deeper = widen.resized(least, least.hidden_size, 256, 5, least.num_attention_heads)
    large = widen.load(widen.save_wide(small, source, deeper, tmp_path, SEED))
    token_ids = np.random.default_rng(1).integers(0, 384, (1, 24))
    logits = [torch_source.reference_logits(model, token_ids) for model in (small, large)]
    assert verify.compare(*logits).max_abs_error <= widen.TOLERANCE * logits[0].std()
    assert not large.state_dict()["model.layers.4.mlp.down_proj.weight"].any()


def test_too_few_parameters_are_refused_in_one_line(widen: Any, pair: tuple[Any, Any]) -> None:
    with pytest.raises(SystemExit, match=r"^error: 1e\+04 parameters are too few"):
        widen.wide(pair[0].config, 1e4)


def test_the_same_seed_gives_the_same_weights(widen: Any, pair: tuple[Any, Any]) -> None:
    small, large = pair
    again = widen.widen(small, large.config, SEED)
    assert all((value == again[name]).all() for name, value in large.state_dict().items())


def test_the_embedded_targets_ir_is_read_back(widen: Any) -> None:
    """The float target is not in the package: without this nobody could repeat the measurement."""
    token_ids = np.array([[5, 900, 17, 4000, 260, 33, 8191, 7]])
    llm = EdgeLLM.load(demo_target(), **widen.PRECISIONS["exact"][0])
    expected = widen.ir_logits(llm, token_ids)
    got = torch_source.reference_logits(widen.load(demo_target()), token_ids)
    assert np.abs(got - expected).max() <= 1e-3 * expected.std()
