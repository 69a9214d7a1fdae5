"""The NPU's model, run through NPUW on the CPU: what NPUW answers wrongly without a word is never asked of it.

The reference is PagedAttention on the CPU in f32, whose own exactness other files pin.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from edge_runtime.errors import ContextOverflowError
from edge_runtime.manifest import MANIFEST_NAME, MODEL_NAME
from edge_runtime.models.base import Span, advance, catch_up
from edge_runtime.models.static import StaticModel
from tests.runtime.npuw import CHUNKS, KEYS_IN_F16, Alone, V, load, random_ids, reference
from tests.tiny_models import export_tiny


@pytest.fixture(autouse=True)
def _npuw_on_cpu(monkeypatch):
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")


@pytest.fixture(scope="module")
def made():
    """Return models by family and options, compiled once."""
    return {}


@pytest.fixture
def pair(made, tiny_ir):
    """Return a function to a static model and its reference, each with an empty sequence."""

    def get(family: str = "llama", step_tokens: int = 8, **options) -> tuple[Alone, Alone]:
        key = (family, step_tokens, *sorted(options.items()))
        if key not in made:
            made[key] = load(tiny_ir(family), step_tokens, **options), reference(tiny_ir(family))
        static, paged = made[key]
        return Alone(static), Alone(paged)

    return get


def calls_of(model: StaticModel, monkeypatch) -> list[tuple[int, int]]:
    """Return the list that NPUW's calls are written into from now on."""
    calls, infer = [], model._infer
    monkeypatch.setattr(model, "_infer", lambda begin, end: calls.append((begin, end)) or infer(begin, end))
    return calls


def learn_nothing(model: StaticModel, monkeypatch) -> None:
    """Keep the costs that a test sets."""
    monkeypatch.setattr(model, "_learn", lambda _, begin, prompt_tokens: setattr(model, "_unstepped", prompt_tokens))


def assert_close(pair: tuple[Alone, Alone], ids: list[int], num_rows: int) -> None:
    rows, expected = (model.forward(ids, num_rows) for model in pair)
    assert rows.shape == expected.shape
    np.testing.assert_allclose(rows, expected, atol=KEYS_IN_F16, rtol=0)


@pytest.mark.parametrize(
    ("family", "step_tokens", "options"),
    [
        ("llama", 8, {}),
        ("llama", 8, CHUNKS),
        ("llama", 1, {"context_length": 100}),
        ("gemma2", 16, CHUNKS),
        ("gpt2", 8, {}),
    ],
    ids=["one chunk", "chunks", "single tokens", "sliding window", "learnt positions"],
)
def test_random_walks_equal_paged_attention(pair, family, step_tokens, options):
    """Prompts, steps of every width, any rows, rollbacks near and far, up to the last token of the context."""
    models = static, paged = pair(family, step_tokens, **options)
    random = np.random.default_rng(1)
    filled = 0
    for _ in range(150):
        near = static.num_tokens - int(random.integers(0, 5))
        kept = int(random.integers(0, static.num_tokens + 1)) if random.random() < 0.2 else max(0, near)
        static.rollback(kept)
        paged.rollback(kept)
        if kept == static.model.context_length:
            continue
        widest = random.choice([8, 100, 1000], p=[0.7, 0.27, 0.03])
        width = min(int(random.integers(1, widest + 1)), static.model.context_length - kept)
        assert_close(models, random.integers(0, V, width).tolist(), int(random.integers(1, width + 1)))
        filled += static.num_tokens == static.model.context_length
    assert filled, "the context was never full"


def test_a_far_rollback_hides_what_lies_behind(pair):
    """A step writes only as much of NPUW's mask as it is given: tokens rolled back stayed visible, logits off by 8."""
    models = pair()
    for begin in range(0, 120, 8):
        assert_close(models, random_ids(8, begin), 8)
    for kept in (50, 3):
        for model in models:
            model.rollback(kept)
        assert_close(models, random_ids(5, kept), 5)


@pytest.mark.parametrize("kept", [1, 20, 64, 99])
@pytest.mark.parametrize("options", [{}, CHUNKS], ids=["one chunk", "chunks"])
def test_a_rollback_into_a_prompt_that_no_step_has_followed(pair, kept, options):
    """NPUW then copies the prompt's last keys for its first ones, or fails, where it goes on with a step."""
    models = pair(**options)
    assert_close(models, random_ids(100), 1)
    for model in models:
        model.rollback(kept)
    assert_close(models, random_ids(3, 1), 3)
    assert_close(models, random_ids(2, 2), 1)


def test_a_prompt_returns_rows_beyond_its_last_chunk(pair):
    """NPUW gives the rows of the last chunk only, here two tokens, and garbage for those before."""
    assert_close(pair(**CHUNKS), random_ids(130), 130)


def test_a_longer_continuation_takes_the_cheaper_way(pair, monkeypatch):
    models = static, paged = pair(**CHUNKS)
    assert_close(models, random_ids(40), 1)
    assert_close(models, random_ids(1), 1)
    model = static.model
    calls = calls_of(model, monkeypatch)
    learn_nothing(model, monkeypatch)
    model._chunk_s, model._step_s = 1.0, 0.2  # 20 tokens: 3 steps against a chunk of 61 tokens
    assert_close(models, random_ids(20), 2)
    assert calls == [(41, 49), (49, 57), (57, 61)]
    calls.clear()
    model._step_s = 0.4
    static.rollback(41)
    paged.rollback(41)
    assert_close(models, random_ids(20), 1)
    assert calls == [(0, 61)]
    assert_close(models, random_ids(1), 1)
    calls.clear()
    static.rollback(41)
    paged.rollback(41)
    assert_close(models, random_ids(20), 2)
    assert calls == [(41, 49), (49, 57), (57, 61)], "the second row would take a step of its own"
    calls.clear()
    model._step_s = 100.0
    assert_close(models, random_ids(8), 8)
    assert calls == [(61, 69)], "a single step is never replaced"


@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_prompt_is_read_chunk_by_chunk(pair, monkeypatch, num_rows):
    """Each call reads one chunk, so that a cancel takes effect between two; NPUW reads the whole prompt in one call."""
    models = static, _ = pair(**CHUNKS)
    model = static.model
    model._step_s = model._chunk_s = 1.0
    learn_nothing(model, monkeypatch)
    assert model.chunk_size == 64
    runs, run = [], model._run
    monkeypatch.setattr(model, "_run", lambda *span, **kind: runs.append(span[:2]) or run(*span, **kind))
    ids = random_ids(190)
    for begin in (0, 64, 128):
        assert_close(models, ids[begin : begin + 64], num_rows if begin else 1)
    assert (64, 72) in runs and (64, 128 - num_rows + 1) in runs, "one step, then the chunk"
    for width in (8, 1):
        assert_close(models, random_ids(width, width), width)


def test_a_chunk_that_fails_is_read_again_from_the_start(pair, monkeypatch):
    models = static, _ = pair(**CHUNKS)
    ids = random_ids(128)
    assert_close(models, ids[:64], 1)
    with pytest.raises(RuntimeError), monkeypatch.context() as broken:
        broken.setattr(static.model, "_request", _Broken(static.model._request))
        static.forward(ids[64:], 1)
    rows = catch_up(static.model, static.sequence, ids)
    np.testing.assert_allclose(rows, models[1].forward(ids[64:]), atol=KEYS_IN_F16, rtol=0)
    for model in models:
        model.rollback(0)
    assert_close(models, ids[:1], 1)
    assert_close(models, ids[1:100], 1)


def test_costs_are_learnt_from_what_runs(pair):
    static, _ = pair(**CHUNKS)
    model = static.model
    model._step_s = model._chunk_s = 0.0
    static.forward(random_ids(40))
    assert model._chunk_s > 0 and model._step_s == 0
    static.forward(random_ids(1))
    assert model._step_s > 0


def test_a_call_that_fails_leaves_nothing_held(pair, monkeypatch):
    """NPUW may have overwritten it: whoever goes on computes all of it again."""
    models = static, _ = pair()
    for ids in (random_ids(30), random_ids(1)):
        assert_close(models, ids, 1)
    calls = calls_of(static.model, monkeypatch)
    with pytest.raises(RuntimeError), monkeypatch.context() as broken:
        broken.setattr(static.model, "_request", _Broken(static.model._request))
        static.forward(random_ids(8, 2), 8)
    assert static.num_tokens == 0
    for model in models:
        model.rollback(0)
    assert_close(models, random_ids(8, 3), 1)
    assert calls == [(31, 39), (0, 8)]


class _Broken:
    """A request that fails after it ran."""

    def __init__(self, request) -> None:
        self._request = request
        self.set_tensor = request.set_tensor

    def infer(self, **options) -> None:
        self._request.infer(**options)
        raise RuntimeError("the device was lost")


def test_context_is_an_error_before_it_is_garbage(pair):
    static, _ = pair(**CHUNKS)
    static.forward(random_ids(199))
    with pytest.raises(ContextOverflowError, match="201 tokens do not fit the NPU's context of 200") as raised:
        static.forward([1, 2])
    assert "context_length" in raised.value.hint
    assert static.num_tokens == 199
    static.forward([1])


def test_four_layers_and_a_context_beyond_1024(tmp_path):
    """NPUW's default partitioning fails on 3 and 4 layers: "Model references undeclared parameters".

    Its caches of several sizes, the first of 1024, took no step of several tokens across that border.
    """
    folder = export_tiny("llama", tmp_path / "ir", num_hidden_layers=4, max_position_embeddings=4096)
    for context_length, pipeline, length in ((200, "REG", 90), (None, "REP", 1015)):
        model = load(folder, context_length=context_length)
        models = Alone(model), Alone(reference(folder))
        assert model.report()["npuw_online_pipeline"] == pipeline
        assert_close(models, random_ids(length), 1)
        for step in range(3):
            assert_close(models, random_ids(8, step), 8)
    assert model.context_length == 2048


def test_cached_models_are_those_asked_for(tmp_path, tiny_ir):
    """One cache for two models and two step sizes, each loaded twice."""
    rows = []
    for family, step_tokens in [("llama", 8), ("gpt2", 8), ("llama", 1)] * 2:
        model = Alone(load(tiny_ir(family), step_tokens, cache_dir=tmp_path, context_length=64))
        assert_close((model, Alone(reference(tiny_ir(family)))), random_ids(30), 3)
        rows.append(model.forward([1]).copy())
    for first, again in zip(rows[:3], rows[3:], strict=True):
        np.testing.assert_array_equal(first, again)
    assert len(list(tmp_path.iterdir())) >= 3


def test_bytes_of_keys_and_values(pair):
    """Llama: 2 layers x keys and values x 2 heads x 16 x 2 bytes."""
    model = pair()[0].model
    assert model.token_kv_bytes == 2 * 2 * 2 * 16 * 2
    assert model.kv_bytes == model.report()["kv_bytes"] == 512 * model.token_kv_bytes


def with_nan_token(folder: Path, copy: Path, token_id: int) -> Path:
    """Copy a model, with NaN in one token's embedding."""
    shutil.copytree(folder, copy)
    model = ov.Core().read_model(folder / MODEL_NAME)
    gather = next(op for op in model.get_ops() if op.get_type_name() == "Gather" and "embed" in op.get_friendly_name())
    weights = gather.input_value(0).get_node().data.copy()
    weights[token_id] = np.nan
    gather.input(0).replace_source_output(ov.opset13.constant(weights).output(0))
    ov.save_model(model, copy / MODEL_NAME, compress_to_fp16=False)
    (copy / MANIFEST_NAME).unlink()  # it knows the files' sizes
    return copy


@pytest.mark.parametrize("way", ["rollback", "new sequence", "place taken back"])
def test_nan_in_a_step_is_not_seen_by_the_next_prompt(tiny_ir, tmp_path, way):
    """Keys and values behind the mask are multiplied by 0, and 0 * NaN is NaN: every later step was."""
    folder = with_nan_token(tiny_ir("llama"), tmp_path / "copy", 5)
    model, prompt, step = Alone(load(folder)), list(range(10, 100)), [7, 8, 9]
    wanted = [model.forward(ids).copy() for ids in (prompt, step)]
    assert np.isnan(model.forward([5])).all()
    if way == "rollback":
        assert model.sequence.rollback(len(prompt)) == 0, "what is kept would see NaN behind the mask"
    elif way == "new sequence":
        model.sequence = model.model.sequence(prompt + step)
        assert model.num_tokens == 0
    else:
        model.model.sequence()
    for ids, rows in zip((prompt, step), wanted, strict=True):
        np.testing.assert_array_equal(model.forward(ids), rows)


def test_two_sequences_in_turn_say_what_each_says_alone(pair):
    """Each takes the place of the other, which then holds nothing and is read again: wrong keys would show."""
    (static, paged) = (alone.model for alone in pair())
    prompts = random_ids(40, 1), random_ids(30, 2)
    wanted = []
    for ids in prompts:
        text, sequence = list(ids), paged.sequence()
        for _ in range(6):
            text.append(int(catch_up(paged, sequence, text).argmax()))
        wanted.append(text)
    texts, sequences = [list(ids) for ids in prompts], [static.sequence(), static.sequence()]
    for _ in range(6):
        for text, sequence, other in zip(texts, sequences, sequences[::-1], strict=True):
            text.append(int(catch_up(static, sequence, text).argmax()))
            assert (sequence.num_tokens, other.num_tokens) == (len(text) - 1, 0)
    assert texts == wanted


def test_tokens_of_a_closed_sequence_are_reused_by_one_that_begins_with_them(pair, monkeypatch):
    static, paged = pair()
    ids = random_ids(30)
    static.forward(ids)
    static.forward(random_ids(8, 1), 8)
    static.sequence.close()
    assert (static.num_tokens, static.sequence.token_ids) == (0, [])
    calls = calls_of(static.model, monkeypatch)
    again = static.model.sequence([*ids, 5, 6])
    assert again.token_ids == ids
    rows = advance(static.model, again, [5, 6])
    assert calls == [(30, 32)]
    np.testing.assert_allclose(rows, paged.forward([*ids, 5, 6]), atol=KEYS_IN_F16, rtol=0)
    assert static.model.sequence([*ids, 5, 6]).num_tokens == 31, "the last token is left to be computed"


def test_a_context_that_overflows_takes_nobody_s_place(pair):
    static, _ = pair(**CHUNKS)
    other, static.sequence = static.sequence, static.model.sequence()
    static.forward(random_ids(10))
    with pytest.raises(ContextOverflowError):
        static.model.forward([Span(other, random_ids(201))])
    assert static.num_tokens == 10


def test_a_closed_model_holds_no_memory(tiny_ir):
    model = load(tiny_ir("llama"), context_length=64)
    sequence = model.sequence()
    advance(model, sequence, [1, 2])
    model.close()
    assert sequence.num_tokens == 0
    assert not [value for value in vars(model).values() if isinstance(value, (ov.CompiledModel, ov.InferRequest))]
