"""The NPU's model, run through NPUW on the CPU: what NPUW answers wrongly without a word is never asked of it.

The reference is PagedAttention on the CPU in f32, whose own exactness other files pin.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import openvino as ov
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.cli import devices as cli_devices
from edge_runtime.config import LoadConfig
from edge_runtime.devices import check_device, describe_devices, npu_properties
from edge_runtime.errors import ConfigError, ContextOverflowError, DeviceError, ModelFormatError
from edge_runtime.manifest import load_manifest
from edge_runtime.paged_model import PagedModel
from edge_runtime.static_model import StaticModel
from tests.tiny_models import export_tiny

KEYS_IN_F16 = 0.1
"""Logits spread over several units. Keys and values in f16 move them by up to 0.042 (80,000 rows; in PagedAttention by
0.024), a mask or cache that is wrong by one token by more than 1."""
V = 384
CHUNKS = {"context_length": 200, "prefill_chunk_size": 64}
LABEL = "NPU (NPUW on CPU)"


@pytest.fixture(autouse=True)
def _npuw_on_cpu(monkeypatch):
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")


@pytest.fixture(scope="module")
def made():
    """Return models by family and options, compiled once."""
    return {}


@pytest.fixture
def pair(made, tiny_ir):
    """Return a function to a static model and its reference, both empty."""

    def get(family: str = "llama", step_tokens: int = 8, **options) -> tuple[StaticModel, PagedModel]:
        key = (family, step_tokens, *sorted(options.items()))
        if key not in made:
            made[key] = load(tiny_ir(family), step_tokens, **options), reference(tiny_ir(family))
        for model in made[key]:
            model.rollback(0)
        return made[key]

    return get


def load(folder: Path, step_tokens: int = 8, **options) -> StaticModel:
    config = LoadConfig(device="NPU", npu_step_tokens=step_tokens, **options)
    return StaticModel(folder, load_manifest(folder), "NPU", config)


def reference(folder: Path) -> PagedModel:
    return PagedModel(folder, load_manifest(folder), "CPU", LoadConfig(precision="f32"))


def random_ids(number: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, number).tolist()


def calls_of(model: StaticModel, monkeypatch) -> list[tuple[int, int]]:
    """Return the list that NPUW's calls are written into from now on."""
    calls, infer = [], model._infer
    monkeypatch.setattr(model, "_infer", lambda begin, end: calls.append((begin, end)) or infer(begin, end))
    return calls


def assert_close(pair: tuple[StaticModel, PagedModel], ids: list[int], num_rows: int) -> None:
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
        if kept == static.context_length:
            continue
        widest = random.choice([8, 100, 1000], p=[0.7, 0.27, 0.03])
        width = min(int(random.integers(1, widest + 1)), static.context_length - kept)
        assert_close(models, random.integers(0, V, width).tolist(), int(random.integers(1, width + 1)))
        filled += static.num_tokens == static.context_length
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
    calls = calls_of(static, monkeypatch)
    monkeypatch.setattr(static, "_learn", lambda _, prompt_tokens: setattr(static, "_unstepped", prompt_tokens))
    static._chunk_s, static._step_s = 1.0, 0.2  # 20 tokens: 3 steps against a chunk of 61 tokens
    assert_close(models, random_ids(20), 2)
    assert calls == [(41, 49), (49, 57), (57, 61)]
    calls.clear()
    static._step_s = 0.4
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
    static._step_s = 100.0
    assert_close(models, random_ids(8), 8)
    assert calls == [(61, 69)], "a single step is never replaced"


def test_costs_are_learnt_from_what_runs(pair):
    static, _ = pair(**CHUNKS)
    static._step_s = static._chunk_s = 0.0
    static.forward(random_ids(40), 1)
    assert static._chunk_s > 0 and static._step_s == 0
    static.forward(random_ids(1), 1)
    assert static._step_s > 0


def test_a_call_that_fails_leaves_what_was_held(pair, monkeypatch):
    """NPUW may have overwritten it: the next call begins anew."""
    models = static, _ = pair()
    for ids in (random_ids(30), random_ids(1)):
        assert_close(models, ids, 1)
    calls = calls_of(static, monkeypatch)
    with pytest.raises(RuntimeError), monkeypatch.context() as broken:
        broken.setattr(static, "_request", _Broken(static._request))
        static.forward(random_ids(8, 2), 8)
    assert_close(models, random_ids(8, 3), 1)
    assert calls == [(31, 39), (0, 39)]


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
    static.forward(random_ids(199), 1)
    with pytest.raises(ContextOverflowError, match="201 tokens do not fit the NPU's context of 200") as raised:
        static.forward([1, 2], 1)
    assert "context_length" in raised.value.hint
    assert static.num_tokens == 199
    static.forward([1], 1)


def test_four_layers_and_a_context_beyond_1024(tmp_path):
    """NPUW's partitioner fails on 4 layers where a prompt is one chunk: "Model references undeclared parameters".

    Its caches of several sizes, the first of 1024, took no step of several tokens across that border.
    """
    folder = export_tiny("llama", tmp_path / "ir", num_hidden_layers=4, max_position_embeddings=4096)
    for context_length, pipeline, length in ((200, "NONE", 90), (None, "REP", 1015)):
        models = static, _ = load(folder, context_length=context_length), reference(folder)
        assert static.properties["npuw_online_pipeline"] == pipeline
        assert_close(models, random_ids(length), 1)
        for step in range(3):
            assert_close(models, random_ids(8, step), 8)
    assert static.context_length == 2048


def test_cached_models_are_those_asked_for(tmp_path, tiny_ir):
    """One cache for two models and two step sizes, each loaded twice."""
    rows = []
    for family, step_tokens in [("llama", 8), ("gpt2", 8), ("llama", 1)] * 2:
        model = load(tiny_ir(family), step_tokens, cache_dir=tmp_path, context_length=64)
        assert_close((model, reference(tiny_ir(family))), random_ids(30), 3)
        rows.append(model.forward([1], 1).copy())
    for first, again in zip(rows[:3], rows[3:], strict=True):
        np.testing.assert_array_equal(first, again)
    assert len(list(tmp_path.iterdir())) >= 3


def test_bytes_of_keys_and_values(pair):
    """Llama: 2 layers x keys and values x 2 heads x 16 x 2 bytes."""
    assert pair()[0].kv_bytes == 512 * (2 * 2 * 2 * 16 * 2)


PROMPT = "Once upon a time there was a little fox"


def assert_true(llm: EdgeLLM, prompt_ids: list[int], result, is_greedy: bool) -> None:
    """Compare with one forward of the reference over prompt and answer: every cache was right at every token."""
    places = np.arange(len(result.token_ids)), result.token_ids
    logits = reference(llm.folder).forward((prompt_ids + result.token_ids)[:-1], len(result.token_ids))
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    got = [token.logprob for token in result.logprobs]
    np.testing.assert_allclose(got, logprobs[places], atol=KEYS_IN_F16, rtol=0)
    if is_greedy:
        assert (logits[places] > logits.max(axis=-1) - 2 * KEYS_IN_F16).all()


@pytest.fixture(scope="module")
def llms():
    return {}


@pytest.fixture
def llm(llms, tiny_ir):
    """Return a function to a loaded target with a draft, the target itself or a stranger; loaded once."""

    def get(device: str = "NPU", draft_device: str = "NPU", draft: str | None = "llama") -> EdgeLLM:
        key = device, draft_device, draft
        if key not in llms:
            options = {"device": device, "draft_device": draft_device, "context_length": 256}
            options["precision"] = "f32" if device == "CPU" else "auto"
            llms[key] = EdgeLLM.load(tiny_ir("llama"), draft=draft and tiny_ir(draft), **options)
            llms[key].folder = tiny_ir("llama")
        return llms[key]

    return get


@pytest.mark.parametrize("draft", ["llama", "gpt2"], ids=["good draft", "bad draft"])
@pytest.mark.parametrize(("device", "draft_device"), [("NPU", "NPU"), ("NPU", "CPU"), ("CPU", "NPU")])
def test_speculation_says_what_the_target_says(llm, device, draft_device, draft):
    """5 drafted tokens fit one step, 12 take two; accepted, rejected and half accepted blocks, greedy and sampled."""
    model = llm(device, draft_device, draft)
    ids = model.tokenizer.encode(PROMPT)
    for temperature, num_draft_tokens in ((0, 5), (0, 12), (1.0, 5), (1.0, 12)):
        options = {"temperature": temperature, "seed": 3, "ignore_eos": True, "logprobs": 0, "max_new_tokens": 40}
        result = model.generate(PROMPT, num_draft_tokens=num_draft_tokens, **options)
        assert len(result.token_ids) == 40
        assert_true(model, ids, result, is_greedy=temperature == 0)
        metrics = result.metrics
        assert (metrics.accepted_tokens > metrics.proposed_tokens / 2) == (draft == "llama"), metrics


def test_a_cpu_target_with_an_npu_draft_says_exactly_what_it_says_alone(llm):
    """The draft's device and its f16 change nothing: f32 was asked for and is what the target computes in."""
    model = llm("CPU", "NPU", "llama")
    plain, drafted = (model.generate(PROMPT, num_draft_tokens=k, max_new_tokens=60, ignore_eos=True) for k in (0, 5))
    assert drafted.token_ids == plain.token_ids
    assert drafted.metrics.accepted_tokens > 30


def test_next_request_keeps_what_it_shares(llm):
    """A stopped, a closed and a whole answer; then one that shares all, some or nothing of the last sequence."""
    model = llm()
    plain = {"ignore_eos": True, "logprobs": 0, "num_draft_tokens": 5}
    first = model.generate(PROMPT, max_new_tokens=20, **plain)
    ids = model.tokenizer.encode(PROMPT)
    stopped = model.generate(PROMPT, max_new_tokens=20, stop_token_ids=(first.token_ids[7],), **plain)
    cut = first.token_ids.index(first.token_ids[7])
    assert (stopped.token_ids, stopped.finish_reason) == (first.token_ids[:cut], "stop")
    stream = model.stream(PROMPT, max_new_tokens=20, **plain)
    next(stream)
    stream.close()
    for prompt in (ids + first.token_ids + ids, ids[:5] + random_ids(30), random_ids(9), ids):
        result = model.generate(prompt, max_new_tokens=12, **plain)
        assert_true(model, prompt, result, is_greedy=True)
    whole = ids + first.token_ids
    model.generate(PROMPT, max_new_tokens=20, **plain)
    assert model.generate(whole + ids, max_new_tokens=2, **plain).metrics.reused_tokens >= len(whole) - 1


def test_an_answer_may_fill_the_context(llm):
    model = llm()
    ids = random_ids(230)
    result = model.generate(ids, max_new_tokens=500, ignore_eos=True, logprobs=0, num_draft_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (26, "length")
    assert_true(model, ids, result, is_greedy=True)


@pytest.mark.parametrize("device", ["NPU", "CPU"])
def test_a_prompt_beyond_the_loaded_context_says_how_to_load_more(llm, device):
    with pytest.raises(ContextOverflowError, match="300 tokens, the model's context holds 256") as raised:
        llm(device).generate(random_ids(300))
    assert raised.value.hint == "shorten it to at most 255 tokens, or load the model with `context_length` up to 512"


def test_steps_are_wide_only_where_something_is_verified(llm, tiny_ir):
    assert llm().engine.target.model._step_tokens == 8
    assert llm().engine._draft.drafter._cached.model._step_tokens == 1
    assert llm(draft=None).engine.target.model._step_tokens == 1
    own = EdgeLLM.load(tiny_ir("llama"), device="NPU", npu_step_tokens=16, context_length=64)
    assert own.engine.target.model._step_tokens == 16


def test_what_stands_in_for_the_npu_says_so(pair, capsys):
    static, _ = pair()
    assert static.device == static.properties["device"] == LABEL
    assert {"device": "NPU", "name": LABEL} in describe_devices()
    cli_devices.devices()
    assert f"NPU   {LABEL}" in capsys.readouterr().out
    assert check_device("npu") == "NPU"


def test_an_npu_that_is_not_there_is_an_error(monkeypatch, tiny_ir):
    monkeypatch.delenv("EDGE_NPUW_DEVICES")
    if "NPU" in ov.Core().available_devices:
        pytest.skip("this machine has an NPU")
    assert all(device["device"] != "NPU" for device in describe_devices())
    with pytest.raises(DeviceError, match="device `NPU` is not on this machine"):
        EdgeLLM.load(tiny_ir("llama"), device="NPU")


def test_a_missing_compiler_is_one_line(monkeypatch, tiny_ir):
    """OpenVINO's Linux wheel has the NPU's plugin but not its compiler."""
    monkeypatch.delenv("EDGE_NPUW_DEVICES")
    if list(Path(ov.__file__).parent.glob("libs/*npu_compiler*")) or "NPU" in ov.Core().available_devices:
        pytest.skip("this machine has an NPU compiler")
    with pytest.raises(DeviceError, match=r"NPU cannot compile the model: .*compiler") as raised:
        load(tiny_ir("llama"))
    assert "\n" not in str(raised.value)
    assert raised.value.hint == "install Intel's NPU driver with its compiler"


def test_another_stand_in_is_refused(monkeypatch):
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "GPU")
    with pytest.raises(ConfigError, match="EDGE_NPUW_DEVICES is 'GPU', expected CPU"):
        check_device("NPU")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "f32"}, "precision is f32, the NPU computes and stores in f16"),
        ({"kv_precision": "u8"}, "kv_precision is u8, the NPU"),
        ({"prefill_chunk_size": 500}, "prefill_chunk_size is 500, on NPU a power of two"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is 4, on NPU a power of two not below a step of 8"),
    ],
)
def test_options_that_the_npu_lacks_are_refused(tiny_ir, options, told):
    with pytest.raises(ConfigError, match=told):
        load(tiny_ir("llama"), **options)


def test_nothing_is_moved_to_the_cpu_unless_asked(monkeypatch):
    """NPUW's default runs what the NPU cannot on the CPU and says nothing."""
    assert npu_properties(LoadConfig(), 64)["NPUW_DEVICES"] == "CPU"
    monkeypatch.delenv("EDGE_NPUW_DEVICES")
    assert npu_properties(LoadConfig(), 64)["NPUW_DEVICES"] == "NPU"


def test_models_that_the_npu_cannot_run_are_refused(tiny_ir, tmp_path):
    folder = tiny_ir("llama")
    grouped = dataclasses.replace(load_manifest(folder), attention_groups=((0,), (1,)))
    with pytest.raises(DeviceError, match="attention groups"):
        StaticModel(folder, grouped, "NPU", LoadConfig(device="NPU"))
    text = (folder / "openvino_model.xml").read_text().replace('names="position_ids"', 'names="places"')
    (tmp_path / "openvino_model.xml").write_text(text)
    (tmp_path / "openvino_model.bin").write_bytes((folder / "openvino_model.bin").read_bytes())
    with pytest.raises(ModelFormatError, match="no input `position_ids`"):
        StaticModel(tmp_path, load_manifest(folder), "NPU", LoadConfig(device="NPU"))
