"""Device NPU from loading to the last token, run through NPUW on the CPU, and what is refused there.

The model alone is compared with PagedAttention in `test_static_model.py`.
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
from edge_runtime.devices import check_device, describe_devices
from edge_runtime.errors import ConfigError, ContextOverflowError, DeviceError, ModelFormatError
from edge_runtime.manifest import load_manifest
from edge_runtime.models.attention import longgen
from edge_runtime.models.base import advance
from edge_runtime.models.loading import load_model
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import Weights
from tests.runtime.npuw import KEYS_IN_F16, load, random_ids, reference

LABEL = "NPU (NPUW on CPU)"
PROMPT = "Once upon a time there was a little fox"


@pytest.fixture(autouse=True)
def _npuw_on_cpu(monkeypatch):
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")


def assert_true(llm: EdgeLLM, prompt_ids: list[int], result, is_greedy: bool) -> None:
    """Compare with one forward of the reference over prompt and answer: every cache was right at every token."""
    places = np.arange(len(result.token_ids)), result.token_ids
    model = reference(llm.folder)
    logits = advance(model, model.sequence(), (prompt_ids + result.token_ids)[:-1], len(result.token_ids))
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
            of_draft = {"draft_device": draft_device} if draft else {}
            options = {"device": device, "context_length": 256, **of_draft}
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


def test_the_embedded_pair_loads_and_speculates():
    """Its draft has 4 layers, which NPUW's default partitioning cannot cut: "undeclared parameters"."""
    llm = EdgeLLM.load(device="NPU", context_length=128)
    assert llm.report()["draft"]["device"] == LABEL
    assert llm.generate("Once upon a time", num_draft_tokens=3, max_new_tokens=8).metrics.proposed_tokens


def test_a_property_that_the_npu_refuses_is_one_line(tiny_ir):
    with pytest.raises(DeviceError, match="NPU refuses property NO_SUCH=1: ") as raised:
        load(tiny_ir("llama"), properties={"NO_SUCH": 1})
    assert "\n" not in str(raised.value)


def test_properties_of_the_user_win_and_are_reported(tiny_ir):
    static = load(tiny_ir("llama"), context_length=64, properties={"NPUW_ONLINE_PIPELINE": "NONE"})
    assert static.report()["npuw_online_pipeline"] == "NONE"
    assert static.report()["properties"] == {"NPUW_ONLINE_PIPELINE": "NONE"}


def test_next_request_keeps_what_it_shares(llm):
    """A stopped, a cancelled and a whole answer; then one that shares all, some or nothing of the last sequence."""
    model = llm()
    plain = {"ignore_eos": True, "logprobs": 0, "num_draft_tokens": 5}
    first = model.generate(PROMPT, max_new_tokens=20, **plain)
    ids = model.tokenizer.encode(PROMPT)
    stopped = model.generate(PROMPT, max_new_tokens=20, stop_token_ids=(first.token_ids[7],), **plain)
    cut = first.token_ids.index(first.token_ids[7])
    assert (stopped.token_ids, stopped.finish_reason) == (first.token_ids[:cut], "stop")
    stream = model.stream(PROMPT, max_new_tokens=20, **plain)
    next(stream)
    stream.cancel()
    assert stream.finish().finish_reason == "cancelled"
    for prompt in (ids + first.token_ids + ids, ids[:5] + random_ids(30), random_ids(9), ids):
        result = model.generate(prompt, max_new_tokens=12, **plain)
        assert_true(model, prompt, result, is_greedy=True)
    whole = ids + first.token_ids
    model.generate(PROMPT, max_new_tokens=20, **plain)
    assert model.generate(whole + ids, max_new_tokens=2, **plain).metrics.reused_tokens >= len(whole) - 1


def test_reading_a_prompt_can_be_cancelled_between_its_chunks(tiny_ir):
    """The whole prompt was one call of NPUW's: a cancel took effect after it."""
    llm = EdgeLLM.load(tiny_ir("llama"), device="NPU", context_length=256, prefill_chunk_size=64)
    prompt, done = random_ids(200), []
    stream = llm.stream(prompt, on_prefill=lambda held, wanted: done.append(held) or (held and stream.cancel()))
    assert stream.finish().finish_reason == "cancelled"
    assert done == [0, 64]
    assert len(llm.target._held) == 128, "the chunk in which it was cancelled, and none after it"
    llm.folder = tiny_ir("llama")
    result = llm.generate(prompt, max_new_tokens=4, logprobs=0, ignore_eos=True)
    assert_true(llm, prompt, result, is_greedy=True)


def test_an_answer_may_fill_the_context(llm):
    model = llm()
    ids = random_ids(230)
    result = model.generate(ids, max_new_tokens=500, ignore_eos=True, logprobs=0, num_draft_tokens=5)
    assert (len(result.token_ids), result.finish_reason) == (26, "length")
    assert_true(model, ids, result, is_greedy=True)


@pytest.mark.parametrize("device", ["NPU", "CPU"])
def test_a_prompt_beyond_the_loaded_context_says_how_to_load_more(llm, device):
    with pytest.raises(ContextOverflowError, match="300 tokens, but the model's context holds 256") as raised:
        llm(device).generate(random_ids(300))
    assert raised.value.hint == "shorten it to at most 255 tokens, or load the model with `context_length` up to 512"


def test_steps_are_wide_only_where_something_is_verified(llm, tiny_ir):
    assert llm().target._step_tokens == 8
    assert llm().drafter.model._step_tokens == 1
    assert llm(draft=None).target._step_tokens == 1
    own = EdgeLLM.load(tiny_ir("llama"), device="NPU", npu_step_tokens=16, context_length=64)
    assert own.target._step_tokens == 16


def test_what_stands_in_for_the_npu_says_so(llm, capsys):
    static = llm().target
    assert static.device == static.report()["device"] == LABEL
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
    monkeypatch.setattr("edge_runtime.models.loading.check_device", str)
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
        ({"precision": "f32"}, "precision is f32, but the NPU computes and stores in f16"),
        ({"kv_precision": "u8"}, "kv_precision is u8, but the NPU"),
        ({"prefill_chunk_size": 500}, "prefill_chunk_size is 500, expected a power of two of at least 8 on NPU"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is 4, expected a power of two of at least 8 on NPU"),
    ],
)
def test_options_that_the_npu_lacks_are_refused(tiny_ir, options, told):
    with pytest.raises(ConfigError, match=told):
        load(tiny_ir("llama"), **options)


def test_nothing_is_moved_to_the_cpu_unless_asked(monkeypatch):
    """NPUW's default runs what the NPU cannot on the CPU and says nothing."""
    assert make_plan("NPU", LoadConfig(), Weights(num_bytes=1)).properties["NPUW_DEVICES"] == "CPU"
    monkeypatch.delenv("EDGE_NPUW_DEVICES")
    assert make_plan("NPU", LoadConfig(), Weights(num_bytes=1)).properties["NPUW_DEVICES"] == "NPU"


def test_models_that_the_npu_cannot_run_are_refused(tiny_ir, tmp_path):
    folder = tiny_ir("llama")
    hybrid = dataclasses.replace(load_manifest(folder), attention=longgen(2, num_full=1))
    with pytest.raises(DeviceError, match="no kernel for block-sparse attention"):
        load_model(folder, hybrid, LoadConfig(device="NPU"))
    text = (folder / "openvino_model.xml").read_text().replace('names="position_ids"', 'names="places"')
    (tmp_path / "openvino_model.xml").write_text(text)
    (tmp_path / "openvino_model.bin").write_bytes((folder / "openvino_model.bin").read_bytes())
    with pytest.raises(ModelFormatError, match="no input `position_ids`"):
        load_model(tmp_path, load_manifest(folder), LoadConfig(device="NPU"))
