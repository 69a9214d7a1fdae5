"""Speculation over real graphs: five architectures, in float32, token for token.

Weights are random with logits spread over several units, so near-ties, where rounding could decide, do not occur.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import LoadConfig
from edge_runtime.errors import ConfigError, DeviceError
from edge_runtime.manifest import load_manifest
from edge_runtime.models.base import advance
from edge_runtime.models.plan import make_plan
from edge_runtime.models.weights import Weights
from tests.tiny_models import SENTENCES, export_tiny, make_hf_model

FAMILIES = ("llama", "qwen3", "phi3", "gemma3", "gpt2")
LENGTHS = (1, 3, 5, 8, "auto")
BLOCK = 32
"""Tokens of a cache block on CPU."""
OPTIONS: dict[str, Any] = {"max_new_tokens": 50, "ignore_eos": True}
IrOf = Callable[[str], Path]


def unrelated(family: str) -> str:
    """Return a family whose random weights agree with this one's by chance only; all share one tokenizer."""
    return "gpt2" if family == "llama" else "llama"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pairs(family, tiny_ir: IrOf) -> dict[str, EdgeLLM]:
    """The family's model with an unrelated draft, and with itself as draft."""
    target = tiny_ir(family)
    return {
        "unrelated": EdgeLLM.load(target, draft=tiny_ir(unrelated(family)), precision="f32"),
        "itself": EdgeLLM.load(target, draft=target, precision="f32"),
    }


def ask(llm: EdgeLLM, prompt: Any = SENTENCES[0], **options: Any) -> list[int]:
    return llm.generate(prompt, **{**OPTIONS, **options}).token_ids


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 300, length).tolist()


def test_plain_decoding_equals_transformers(pairs, family, tiny_hf):
    """Beyond Gemma's window of 24 tokens, where a mask that is too wide shows."""
    from edge_export.quiet import quiet

    with quiet():
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny_hf(family), dtype=torch.float32).eval()
        for prompt in (random_prompt(5), random_prompt(60, 1)):
            ids = torch.tensor([prompt])
            wanted = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False, eos_token_id=-1
            )
            assert ask(pairs["itself"], prompt, num_draft_tokens=0) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("num_draft_tokens", LENGTHS)
@pytest.mark.parametrize("draft", ["unrelated", "itself"])
def test_greedy_speculative_equals_greedy(pairs, draft, num_draft_tokens):
    for prompt in (*SENTENCES[:3], random_prompt(BLOCK)):
        wanted = ask(pairs[draft], prompt, num_draft_tokens=0)
        assert ask(pairs[draft], prompt, num_draft_tokens=num_draft_tokens) == wanted


def test_model_as_its_own_draft_is_accepted_entirely(pairs):
    """Its cache is fed in other portions than the target's, and still agrees."""
    metrics = pairs["itself"].generate(SENTENCES[0], **OPTIONS, num_draft_tokens=6).metrics
    assert metrics.acceptance_rate == 1.0
    assert metrics.block_efficiency == 7.0


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.8, "frequency_penalty": 0.4},
        {"logit_bias": {40: 3.0, 41: float("-inf")}},
        {"lookup": True},
        {"lookup": True, "repetition_penalty": 1.1},
        {"temperature": 0.8, "top_k": 1},
    ],
    ids=str,
)
def test_options_do_not_break_equality(pairs, options):
    plain = {name: value for name, value in options.items() if name != "lookup"}
    for prompt in (SENTENCES[0] * 3, random_prompt(50)):
        wanted = ask(pairs["itself"], prompt, num_draft_tokens=0, **plain)
        for llm in pairs.values():
            assert ask(llm, prompt, num_draft_tokens=4, **options) == wanted


def test_stop_strings_and_stop_tokens_end_at_the_same_place(pairs):
    plain = pairs["itself"].generate(SENTENCES[0], **OPTIONS, num_draft_tokens=0)
    for at in (1, 7, 20):
        wanted = pairs["itself"].generate(SENTENCES[0], **OPTIONS, num_draft_tokens=0, stop=plain.text[at : at + 3])
        for llm in pairs.values():
            made = llm.generate(SENTENCES[0], **OPTIONS, num_draft_tokens=5, stop=plain.text[at : at + 3])
            assert (made.text, made.token_ids) == (wanted.text, wanted.token_ids)
            stop = plain.token_ids[at]
            made = llm.generate(SENTENCES[0], **OPTIONS, num_draft_tokens=5, stop_token_ids=[stop])
            assert made.token_ids == plain.token_ids[: plain.token_ids.index(stop)]


def test_abandoned_answer_leaves_nothing_to_repair(pairs):
    llm = pairs["unrelated"]
    wanted = ask(llm, num_draft_tokens=0)
    for taken in range(1, 12):
        stream = llm.stream(SENTENCES[0], **OPTIONS, num_draft_tokens=4)
        assert [next(stream).token.token_id for _ in range(taken)] == wanted[:taken]
        stream.close()
    assert ask(llm, num_draft_tokens=4) == wanted


def test_chat_turns_that_reuse_keys_equal_a_fresh_model(pairs, family, tiny_ir):
    """Three turns; each keeps what it shares with the one before, answer included."""
    fresh = EdgeLLM.load(tiny_ir(family), precision="f32", prefix_cache_bytes=0)
    for llm in pairs.values():
        messages = [{"role": "user", "content": SENTENCES[0]}]
        held: list[int] = []
        for sentence in SENTENCES[1:4]:
            prompt = llm.tokenizer.apply_chat_template(messages)
            answer = llm.chat(messages, **OPTIONS, num_draft_tokens=3)
            assert answer.token_ids == ask(fresh, prompt)
            assert not held or answer.metrics.reused_tokens == num_shared(held, prompt) > 10
            held = prompt + answer.token_ids[:-1]
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": sentence}]


def num_shared(first: list[int], second: list[int]) -> int:
    """Return how many leading tokens are equal; random bytes of an answer may be encoded otherwise than they came."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_block_boundaries_are_crossed_in_every_way(pairs):
    """Prompts that end around a block's end, continued by blocks of drafts that straddle it."""
    for size in (1, BLOCK - 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK):
        prompt = random_prompt(size, size)
        wanted = ask(pairs["itself"], prompt, num_draft_tokens=0, max_new_tokens=BLOCK + 4)
        for llm in pairs.values():
            assert ask(llm, prompt, num_draft_tokens=5, max_new_tokens=BLOCK + 4) == wanted


def test_context_is_filled_to_its_end(pairs):
    prompt = random_prompt(500)
    wanted = ask(pairs["itself"], prompt, num_draft_tokens=0)
    assert len(wanted) == 12
    for llm in pairs.values():
        result = llm.generate(prompt, **OPTIONS, num_draft_tokens=5)
        assert (result.token_ids, result.finish_reason) == (wanted, "length")


@pytest.mark.parametrize("chunk_size", [1, 7, BLOCK, 100])
def test_prefill_chunks_give_the_same_answer(tiny_ir, chunk_size):
    prompt = random_prompt(90)
    whole = EdgeLLM.load(tiny_ir("llama"), precision="f32")
    chunked = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), precision="f32", prefill_chunk_size=chunk_size)
    assert ask(chunked, prompt, num_draft_tokens=3) == ask(whole, prompt)


ROUNDING = 1e-3
"""Largest difference of f32 logits of size 20 that the order of sums makes; rounding activations makes 0.2."""


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_compressed_weights_stay_lossless(tmp_path, tiny_ir, weights):
    """The CPU plugin rounds activations to int8, but only where there are several tokens: 2 of 20 stories changed."""
    from edge_export.convert import export_model

    source = make_hf_model("llama", tmp_path / "source", hidden_size=256, intermediate_size=256)
    export_model(source, tmp_path / "ir", weights=weights, group_size=64)
    llm = EdgeLLM.load(tmp_path / "ir", draft=tiny_ir("gpt2"), precision="f32")
    model, ids = llm.target, random_prompt(30)
    sequence = model.sequence()
    single = np.concatenate([advance(model, sequence, [token_id]).copy() for token_id in ids])
    sequence.rollback(0)
    np.testing.assert_allclose(advance(model, sequence, ids, len(ids)), single, atol=ROUNDING)
    for prompt in (*SENTENCES, random_prompt(60)):
        wanted = ask(llm, prompt, num_draft_tokens=0)
        for num_draft_tokens in (1, 4, 8):
            assert ask(llm, prompt, num_draft_tokens=num_draft_tokens) == wanted


@pytest.mark.parametrize("kv_precision", ["f32", "u8"])
def test_quantised_keys_stay_lossless(tiny_ir, kv_precision):
    llm = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), precision="f32", kv_precision=kv_precision)
    for prompt in (*SENTENCES, random_prompt(60)):
        wanted = ask(llm, prompt, num_draft_tokens=0)
        for num_draft_tokens in (1, 4, 8):
            assert ask(llm, prompt, num_draft_tokens=num_draft_tokens) == wanted


@pytest.mark.parametrize("rows", [352, 448], ids=["fewer rows than the target", "more"])
def test_padded_draft_of_the_same_tokenizer_works(tiny_ir, tmp_path, rows):
    """Models pad their embedding to round numbers; a draft with fewer rows is even fed ids that it lacks."""
    draft = export_tiny("gpt2", tmp_path / "draft", vocab_size=rows)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_ir("llama") / name, draft)
    load_manifest(draft).save(draft)  # the checksums of what was copied
    llm = EdgeLLM.load(tiny_ir("llama"), draft=draft, precision="f32")
    penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2}
    for options in ({}, penalties, {"logit_bias": {383: 100.0}}):
        wanted = ask(llm, num_draft_tokens=0, **options)
        assert ask(llm, num_draft_tokens=4, **options) == wanted
    assert ask(llm, num_draft_tokens=4, temperature=1.5, seed=1, **penalties)


@pytest.mark.parametrize("precision", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("kv_precision", ["f32", "bf16", "f16", "u8", "u4"])
def test_precisions_are_honoured_or_refused(tiny_ir, precision, kv_precision):
    """The plugin keeps keys in bf16 when asked for f16 under bf16 arithmetic, and says f16."""
    try:
        llm = EdgeLLM.load(tiny_ir("llama"), precision=precision, kv_precision=kv_precision)
    except DeviceError as error:
        assert "\n" not in str(error)
        assert error.hint
        return
    model = llm.target
    tokens = BLOCK * 2 * 2 * 2 * 16  # one block of two layers, keys and values, 2 heads of 16
    bits = {"f32": 32, "bf16": 16, "f16": 16, "u8": 8, "u4": 4}[kv_precision]
    assert model.report()["inference_precision_hint"] == precision
    assert model.report()["kv_cache_precision"] == kv_precision
    assert 1 <= model.kv_bytes * 8 / (bits * tokens) < (1.01 if bits > 8 else 3)  # scales and zero points
    assert ask(llm, max_new_tokens=5)


def test_threads_are_as_many_as_asked_for(tiny_ir):
    """One by default for a model this small: waking another costs more than it saves."""
    for options, wanted in (({}, 1), ({"num_threads": 2}, 2)):
        llm = EdgeLLM.load(tiny_ir("llama"), precision="f32", **options)
        assert llm.target.report()["inference_num_threads"] == wanted


def test_two_processes_do_not_share_a_core():
    """A single thread was pinned, to the first core in every process: two of them took turns on it."""
    small, large = (make_plan("CPU", LoadConfig(), Weights(num_bytes=size)).properties for size in (1 << 20, 1 << 30))
    assert small["ENABLE_CPU_PINNING"] is False
    assert "ENABLE_CPU_PINNING" not in large


def test_compiled_models_are_kept_in_the_cache_folder(tiny_ir, tmp_path):
    wanted = ask(EdgeLLM.load(tiny_ir("llama"), precision="f32"))
    for _ in range(2):
        llm = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), precision="f32", cache_dir=tmp_path)
        assert ask(llm, num_draft_tokens=3) == wanted
        assert list(tmp_path.glob("*.blob"))


def test_a_cache_folder_that_cannot_be_written_is_named(tiny_ir, tmp_path):
    """It was told as a precision that the device lacks."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache_dir is `.*file.*`, which cannot be written: .+"):
        EdgeLLM.load(tiny_ir("llama"), cache_dir=tmp_path / "file")
    EdgeLLM.load(tiny_ir("llama"), cache_dir=tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").glob("*.blob"))


def test_properties_of_the_user_win_and_are_reported(tiny_ir):
    llm = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), properties={"ENABLE_CPU_PINNING": True})
    compiled = llm.target._compiled
    assert compiled.get_property("ENABLE_CPU_PINNING") is True, "False is ours for one thread"
    assert [model["properties"] for model in llm.report().values()] == [{"ENABLE_CPU_PINNING": True}] * 2
    alone = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), draft_properties={"ENABLE_CPU_PINNING": "YES"})
    assert "properties" not in alone.report()["target"]
    assert alone.report()["draft"]["properties"] == {"ENABLE_CPU_PINNING": "YES"}


@pytest.mark.parametrize("properties", [{"NO_SUCH": 1}, {"NUM_STREAMS": "many"}])
def test_a_property_that_openvino_refuses_is_one_line(tiny_ir, properties):
    with pytest.raises(DeviceError, match=f"CPU refuses property {next(iter(properties))}=") as caught:
        EdgeLLM.load(tiny_ir("llama"), properties=properties)
    assert "\n" not in str(caught.value)


def test_options_that_keep_a_model_from_compiling_are_named(tiny_ir):
    """Precisions were blamed whatever was asked for."""
    with pytest.raises(DeviceError, match=r"model with attention=stock, properties=\{'KEY_CACHE_GROUP_SIZE': 3\}: "):
        EdgeLLM.load(tiny_ir("llama"), properties={"KEY_CACHE_GROUP_SIZE": 3}, attention="stock")


def test_draft_may_run_on_a_device_of_its_own(tiny_ir):
    llm = EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), draft_device="cpu", precision="f32")
    assert ask(llm, num_draft_tokens=3) == ask(llm, num_draft_tokens=0)
    with pytest.raises(DeviceError, match="device `TPU` is not on this machine"):
        EdgeLLM.load(tiny_ir("llama"), draft=tiny_ir("gpt2"), draft_device="TPU")
