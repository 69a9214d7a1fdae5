"""Models whose layers see a part of the context: what they say is what the dense model with the mask says.

Reference: transformers in f32 with the mask of `LayerPattern.token_mask` in every layer.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import LoadConfig
from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.manifest import load_manifest
from edge_runtime.models.attention import FULL, AttentionPattern, LayerPattern, longgen, s2
from edge_runtime.models.base import advance
from edge_runtime.models.kv.sequence import PagedSequence
from edge_runtime.models.loading import load_model
from edge_runtime.models.paged import PagedModel
from tests.tiny_models import make_hf_model

pytestmark = pytest.mark.kernels

BLOCK = 16
EXACT = 2e-5
"""Largest difference of f32 logits, relative to the largest: order of sums."""
PATTERNS: dict[str, AttentionPattern] = {
    "longgen": longgen(3, sink=20, window=48, block_size=BLOCK),
    "longgen, strided": longgen(3, sink=0, window=32, stride=3, block_size=BLOCK),
    "s2": s2(3, 2, window=32, stride=2, dense_every=3, block_size=BLOCK),
    "s2, shards over layers": s2(3, 2, window=16, stride=6, block_size=BLOCK),
    "by tokens": AttentionPattern.of_layers(
        [LayerPattern(window=37, by_tokens=True), FULL, LayerPattern(window=5, by_tokens=True)], BLOCK
    ),
    "a shard for each query head": AttentionPattern.of_layers(
        [LayerPattern(window=16, stride=4, offsets=(0, 1, 2, 3), num_dense_heads=1)] * 3, BLOCK
    ),
}


@pytest.fixture(scope="module", params=PATTERNS)
def pattern(request) -> AttentionPattern:
    return PATTERNS[request.param]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_hf_model("llama", tmp_path_factory.mktemp("hybrid") / "hf", num_hidden_layers=3)


@pytest.fixture(scope="module")
def dense(source) -> Path:
    from edge_export.convert import export_model

    export_model(source, source.with_name("ir"), weights="fp32")
    return source.with_name("ir")


@pytest.fixture
def hybrid(dense, pattern, tmp_path) -> Path:
    return with_pattern(dense, pattern, tmp_path / "hybrid")


def with_pattern(folder: Path, pattern: AttentionPattern, output: Path) -> Path:
    """Copy a model folder and give it a pattern."""
    shutil.copytree(folder, output)
    dataclasses.replace(load_manifest(output), attention=pattern).save(output)
    return output


def load(folder: Path, **options: Any) -> PagedModel:
    return load_model(folder, load_manifest(folder), LoadConfig(**{"precision": "f32", **options}))


def random_ids(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def masked_logits(source: Path, pattern: AttentionPattern, token_ids: list[int]) -> np.ndarray:
    """Return (T, V) logits of transformers with each layer's mask written out."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM

        def attend(module, query, key, value, attention_mask, scaling=None, **_):
            count, (_, heads, length, _) = module.num_key_value_groups, query.shape
            mask = pattern.of_layer(module.layer_idx).token_mask(np.arange(length), length, heads, pattern.block_size)
            scores = query @ key.repeat_interleave(count, 1).transpose(2, 3) * scaling
            weights = scores.masked_fill(~torch.from_numpy(mask), -torch.inf).softmax(-1)
            return (weights @ value.repeat_interleave(count, 1)).transpose(1, 2).contiguous(), None

        AttentionInterface.register("pattern_reference", attend)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
        model.config._attn_implementation = "pattern_reference"
        with torch.no_grad():
            return model(torch.tensor([token_ids])).logits[0].numpy()


def assert_same(got: np.ndarray, wanted: np.ndarray, bound: float = EXACT) -> None:
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


def in_parts(
    model: PagedModel, token_ids: list[int], sizes: list[int], sequence: PagedSequence | None = None
) -> np.ndarray:
    """Feed tokens to a sequence in parts of these sizes, over and over; return the logits of all."""
    sequence = sequence or model.sequence()
    rows, begin, turn = [], 0, 0
    while begin < len(token_ids):
        part = token_ids[begin : begin + sizes[turn % len(sizes)]]
        rows.append(advance(model, sequence, part, len(part)).copy())
        begin, turn = begin + len(part), turn + 1
    return np.concatenate(rows)


@pytest.mark.parametrize("sizes", [[1], [5], [8, 1, 3], [40], [300]], ids=str)
def test_logits_are_those_of_the_masked_model(hybrid, source, pattern, sizes):
    """Token by token, in blocks of a draft's length across every edge, and in chunks of a prompt."""
    ids = random_ids(300)
    assert_same(in_parts(load(hybrid), ids, sizes), masked_logits(source, pattern, ids))


def test_the_mask_matters(dense, source, pattern):
    """Else the test above would compare nothing."""
    ids = random_ids(300)
    whole = in_parts(load(dense), ids, [300])
    assert np.abs(whole - masked_logits(source, pattern, ids))[-1].max() > 1e-2 * np.abs(whole).max()


def test_rejected_drafts_leave_no_trace(hybrid):
    """Eight drafted tokens at every place of a block, of which a part is forgotten again."""
    ids, wrong = random_ids(200), random_ids(300, seed=1)
    model = load(hybrid)
    wanted, disturbed = in_parts(model, ids, [1]), model.sequence()
    rows = [advance(model, disturbed, ids[:150]).copy()]
    for place in range(150, 199):
        advance(model, disturbed, wrong[place : place + 8], 8)
        assert disturbed.rollback(place) == place
        rows.append(advance(model, disturbed, ids[place : place + 1]).copy())
    assert_same(np.concatenate(rows), wanted[149:199])


@pytest.mark.parametrize("num_draft_tokens", [1, 4, 8, "auto"])
def test_greedy_speculation_equals_plain_decoding(hybrid, tiny_ir, num_draft_tokens):
    """Token for token in f32, with an unrelated draft, a perfect one that sees less itself, and prompt lookup."""
    options = {"max_new_tokens": 80, "ignore_eos": True}
    prompt = random_ids(130)
    wanted = EdgeLLM.load(hybrid, precision="f32").generate(prompt, num_draft_tokens=0, **options).token_ids
    for draft in (tiny_ir("gpt2"), hybrid):
        llm = EdgeLLM.load(hybrid, draft=draft, precision="f32")
        for lookup in (False, True):
            got = llm.generate(prompt, num_draft_tokens=num_draft_tokens, lookup=lookup, **options)
            assert got.token_ids == wanted


def test_a_perfect_draft_is_accepted(hybrid):
    """A hybrid draft's own caches stay right over many blocks."""
    llm = EdgeLLM.load(hybrid, draft=hybrid, precision="f32")
    result = llm.generate(random_ids(100), num_draft_tokens=4, max_new_tokens=100, ignore_eos=True)
    assert result.metrics.acceptance_rate > 0.99


def test_sampled_answers_depend_on_the_seed_alone(hybrid):
    """Whatever is drafted, one seed's plain answers are reproduced after other requests have used the caches."""
    llm = EdgeLLM.load(hybrid, precision="f32")
    options = {"temperature": 0.8, "seed": 3, "max_new_tokens": 60, "ignore_eos": True}
    first = llm.generate(random_ids(90), **options).token_ids
    llm.generate(random_ids(140, seed=5), max_new_tokens=40)
    assert llm.generate(random_ids(90), **options).token_ids == first


@pytest.mark.parametrize("shared", [3, 60, 120, 239, 240])
def test_prompts_that_begin_alike_are_answered_alike(hybrid, shared):
    """What a window has given up is computed again; what is held is used."""
    options = {"max_new_tokens": 20, "ignore_eos": True}
    first, second = random_ids(240), random_ids(240)[:shared] + random_ids(60, seed=9)
    llm = EdgeLLM.load(hybrid, precision="f32")
    llm.generate(first, **options)
    fresh = EdgeLLM.load(hybrid, precision="f32").generate(second, **options)
    assert llm.generate(second, **options).token_ids == fresh.token_ids


def test_the_next_turn_reuses_the_last(hybrid):
    """A chat's prompt is the last one, its answer and a few tokens more: nearly all of it is held."""
    llm = EdgeLLM.load(hybrid, precision="f32")
    prompt = random_ids(200)
    answer = llm.generate(prompt, max_new_tokens=30, ignore_eos=True).token_ids
    again = llm.generate([*prompt, *answer, *random_ids(10)], max_new_tokens=5, ignore_eos=True)
    assert again.metrics.reused_tokens >= len(prompt) + len(answer) - 1


def test_prefill_chunks_give_the_same_answer(hybrid):
    options = {"max_new_tokens": 40, "ignore_eos": True}
    answers = {
        size: EdgeLLM.load(hybrid, precision="f32", prefill_chunk_size=size).generate(random_ids(250), **options)
        for size in (7, 16, 100, 512)
    }
    assert len({tuple(answer.token_ids) for answer in answers.values()}) == 1


def test_several_answers_at_once(hybrid):
    prompts = [random_ids(length, seed=length) for length in (120, 33, 70)]
    llm = EdgeLLM.load(hybrid, precision="f32", prefix_cache_bytes=0)
    options = {"max_new_tokens": 25, "ignore_eos": True}
    for prompt, answer in zip(prompts, llm.generate_many(prompts, **options), strict=True):
        assert answer.token_ids == llm.generate(prompt, **options).token_ids


@pytest.mark.parametrize(("kept_as", "bound"), [("bf16", 0.02), ("u8", 0.05)])
def test_rounded_keys_stay_near(hybrid, source, pattern, kept_as, bound):
    """Root mean square; random weights spread an error of 1 % in every layer, and a neuron or a head may tip."""
    ids = random_ids(200)
    wanted = masked_logits(source, pattern, ids)
    difference = in_parts(load(hybrid, kv_precision=kept_as), ids, [64]) - wanted
    assert np.square(difference).mean() <= bound**2 * np.square(wanted).mean()


def test_bytes_are_what_the_pattern_says(dense, tmp_path):
    """Measured from the buffers after a long answer, in whole blocks: one block a head beside what is seen."""
    pattern = longgen(3, sink=16, window=48, block_size=BLOCK)
    model = load(with_pattern(dense, pattern, tmp_path / "hybrid"))
    sequence = model.sequence()
    sequence.reserve(512)
    for part in (*[random_ids(100)] * 5, [5]):
        advance(model, sequence, part)
    each = 2 * BLOCK * 2 * 16 * 4  # two KV heads, keys and values of 16 floats
    assert model.kv_bytes <= each * (512 // BLOCK + 2 * (1 + 3 + 1 + 1))
    assert model.kv_bytes >= each * (512 // BLOCK + 2 * (1 + 3))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gemma3", "gpt2"])
def test_our_op_serves_models_without_a_pattern(tiny_ir, family):
    """Also those that slide by nature, whose graph says so."""
    ids = random_ids(150)
    ours, stock = (load(tiny_ir(family), attention=kind) for kind in ("block_sparse", "stock"))
    assert_same(in_parts(ours, ids, [70, 1, 5]), in_parts(stock, ids, [70, 1, 5]))


def test_a_window_of_the_graph_shrinks_the_caches(tiny_ir):
    model = load(tiny_ir("mistral"), attention="block_sparse")
    in_parts(model, random_ids(400), [50, 1])
    stock = load(tiny_ir("mistral"))
    in_parts(stock, random_ids(400), [50, 1])
    assert model.kv_bytes < stock.kv_bytes / 2


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (longgen(4, window=64), "patterns for 4 layers, but the model has 3"),
        (AttentionPattern.of_layers([LayerPattern(window=64, stride=2, offsets=(0, 1, 0))] * 3), "3 offsets for 2 KV"),
        (
            AttentionPattern.of_layers([LayerPattern(window=64, stride=2, num_dense_heads=5)] * 3),
            "5 dense heads, expected at most the 4",
        ),
    ],
    ids=["layers", "offsets", "dense heads"],
)
def test_a_pattern_that_does_not_fit_is_refused(dense, tmp_path, pattern, told):
    with pytest.raises(ModelFormatError, match=told) as caught:
        load(with_pattern(dense, pattern, tmp_path / "hybrid"))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"attention": "stock"}, "this model uses sparse attention, which attention=stock"),
        ({"kv_precision": "u4"}, "kv_precision is u4, expected one of"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(hybrid, options, told):
    with pytest.raises(ConfigError, match=told):
        load(hybrid, **options)


def test_large_models_get_our_op_by_themselves(dense, monkeypatch):
    """Where keys can be kept as asked; else the stock op, without a word of complaint."""
    assert "attention" not in load(dense).report()
    monkeypatch.setattr("edge_runtime.models.passes.block_sparse_attention.OURS_FROM", 1)
    assert load(dense).report()["attention"] == "block_sparse"
    assert "attention" not in load(dense, kv_precision="u4").report()
    assert "attention" not in load(dense, attention="stock").report()
    monkeypatch.setattr("ov_kernels.library_path", lambda: None)
    assert "attention" not in load(dense).report()


def test_a_library_of_another_release_leaves_the_stock_op(dense, tmp_path, monkeypatch, caplog):
    """Dense models ran without our ops before they had one for attention, and still do."""
    import ov_kernels

    library = tmp_path / "libedge_kernels.so"
    shutil.copy(ov_kernels.library_path(), library)
    (tmp_path / "openvino_version.txt").write_text("2020.1.0", encoding="utf-8")
    monkeypatch.setattr("edge_runtime.models.passes.block_sparse_attention.OURS_FROM", 1)
    monkeypatch.setenv("EDGE_KERNELS_LIBRARY", str(library))
    assert "attention" not in load(dense).report()
    assert "built for OpenVINO 2020.1.0" in caplog.text


def test_sizes_that_our_op_lacks_leave_the_stock_one(tmp_path, monkeypatch):
    from edge_export.convert import export_model

    monkeypatch.setattr("edge_runtime.models.passes.block_sparse_attention.OURS_FROM", 1)
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    export_model(make_hf_model("llama", tmp_path / "hf", **sizes), tmp_path / "ir", weights="fp32")
    assert "attention" not in load(tmp_path / "ir").report()


def test_it_is_said_what_runs(hybrid):
    report = load(hybrid, kv_precision="u8").report()
    assert (report["attention"], report["kv_cache_precision"]) == ("block_sparse", "u8")


def test_skipped_neurons_sparse_attention_and_drafts_compose(tmp_path, tiny_ir):
    """CATS, a hybrid pattern and speculation in one model: greedy with a draft equals greedy without."""
    from edge_export.convert import export_model
    from tests.tiny_models import SENTENCES

    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES) * 30, encoding="utf-8")
    source = make_hf_model("llama", tmp_path / "hf", num_hidden_layers=3, hidden_size=128, intermediate_size=256)
    export_model(source, tmp_path / "ir", weights="int8", cats=0.5, calibration_text=text)
    folder = with_pattern(tmp_path / "ir", PATTERNS["longgen"], tmp_path / "hybrid")
    options = {"max_new_tokens": 80, "ignore_eos": True}
    llm = EdgeLLM.load(folder, draft=tiny_ir("gpt2"), precision="f32", mlp="fused")
    wanted = llm.generate(random_ids(120), num_draft_tokens=0, **options).token_ids
    for num_draft_tokens in (1, 4, 7):
        got = llm.generate(random_ids(120), num_draft_tokens=num_draft_tokens, lookup=True, **options)
        assert got.token_ids == wanted
