"""What a user sees: texts, reasons to stop, and every option honoured or refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.config import GenerationConfig, LoadConfig
from edge_runtime.errors import ConfigError, ContextOverflowError, LogitsError, ModelFormatError
from edge_runtime.text.chat_template import ROLES, ChatTemplate
from edge_runtime.text.stream import GenerationResult
from tests.runtime.fakes import LETTERS, blended_table, make_engine, make_llm, random_table

TARGET = random_table(24, 1)
DRAFT = blended_table(TARGET, random_table(24, 2), 0.4)
PROMPT = "abcx"


@pytest.fixture
def llm(tmp_path) -> EdgeLLM:
    """A target with a draft."""
    return make_llm(tmp_path, make_engine(TARGET, DRAFT))


@pytest.fixture
def plain(tmp_path_factory) -> EdgeLLM:
    """The target alone."""
    return make_llm(tmp_path_factory.mktemp("plain"), make_engine(TARGET))


def test_stream_and_generate_give_the_same(llm):
    chunks = list(llm.stream(PROMPT, max_new_tokens=20))
    result = llm.generate(PROMPT, max_new_tokens=20)
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [chunk.token.token_id for chunk in chunks[:-1]] == result.token_ids
    assert chunks[-1].token is None
    assert result.text == "".join(LETTERS[i] for i in result.token_ids)


def test_prompt_as_text_and_as_ids_are_the_same(llm):
    ids = [LETTERS.index(letter) for letter in PROMPT]
    wanted = llm.generate(PROMPT, max_new_tokens=10).text
    for prompt in (ids, tuple(ids), np.array(ids), (i for i in ids)):
        assert llm.generate(prompt, max_new_tokens=10).text == wanted


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (None, "the prompt is None, expected text or token ids"),
        (5, "the prompt is 5, expected text or token ids"),
        (b"abc", "the prompt is b'abc', expected text or token ids"),
        ([1.5], "the prompt holds 1.5, expected text or token ids"),
        (["a"], "the prompt holds 'a', expected text or token ids"),
        ([1, 24], "the prompt holds token id 24, expected an id from 0 to 23"),
        ([-1], "the prompt holds token id -1, expected an id from 0 to 23"),
    ],
)
def test_bad_prompt_is_refused_before_anything_runs(llm, prompt, told):
    """Bytes are iterable as numbers, and half a token used to be rounded down."""
    with pytest.raises(ConfigError) as caught:
        llm.stream(prompt)
    assert str(caught.value) == told


def test_prompt_that_fills_the_context_is_refused(tmp_path):
    llm = make_llm(tmp_path, make_engine(TARGET, context_length=10))
    with pytest.raises(ContextOverflowError, match="the prompt has 10 tokens, but the model's context holds 10"):
        llm.generate("a" * 10)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4])
def test_reason_to_stop_is_told(tmp_path_factory, num_draft_tokens):
    def load(**options: Any) -> EdgeLLM:
        eos = options.pop("eos", ())
        return make_llm(tmp_path_factory.mktemp("x"), make_engine(TARGET, DRAFT, **options), eos)

    def reason(llm: EdgeLLM, **options: Any) -> tuple[str, int]:
        result = llm.generate(PROMPT, **{"max_new_tokens": 20, "num_draft_tokens": num_draft_tokens, **options})
        return result.finish_reason, len(result.token_ids)

    ids = load().generate(PROMPT, max_new_tokens=20).token_ids
    at = next(i for i in range(6, 20) if ids[i] not in ids[:i])
    assert reason(load()) == ("length", 20)
    assert reason(load(context_length=10)) == ("length", 6)
    assert reason(load(eos=[ids[at]])) == ("stop", at)
    assert reason(load(eos=[ids[at]]), max_new_tokens=at) == ("length", at)
    assert reason(load(eos=[ids[at]]), ignore_eos=True) == ("length", 20)
    assert reason(load(), stop_token_ids=[ids[at]]) == ("stop", at)
    assert reason(load(), stop=LETTERS[ids[at]]) == ("stop", at + 1)


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 3, 5, 8, "auto"])
def test_stop_string_ends_the_answer_wherever_blocks_end(llm, plain, num_draft_tokens):
    """Of one to four tokens, at every place: the text ends before it, and no token after it is kept."""
    text = plain.generate(PROMPT, max_new_tokens=30).text
    for start in range(0, 20, 3):
        for size in (1, 2, 4):
            stop = text[start : start + size]
            result = llm.generate(PROMPT, max_new_tokens=30, stop=[stop], num_draft_tokens=num_draft_tokens)
            assert result.text == text[: text.index(stop)]
            assert len(result.token_ids) == text.index(stop) + size
            assert result.finish_reason == "stop"


def test_the_stop_token_that_ended_an_answer_is_told_and_is_none_of_its_tokens(llm):
    """Whoever trains on answers lost where they end, and the distribution there."""
    whole = llm.generate(PROMPT, max_new_tokens=8, logprobs=3)
    last = whole.logprobs[5]
    stopped = llm.generate(PROMPT, max_new_tokens=8, logprobs=3, stop_token_ids=[last.token_id])
    at = whole.token_ids.index(last.token_id)
    assert (stopped.token_ids, stopped.finish_reason) == (whole.token_ids[:at], "stop")
    assert stopped.stop_token.token_id == last.token_id
    assert stopped.stop_token.top_logprobs == whole.logprobs[at].top_logprobs
    assert whole.stop_token is None
    assert llm.generate(PROMPT, max_new_tokens=8, stop=LETTERS[last.token_id]).stop_token is None


def test_stop_string_that_never_completes_is_shown_at_the_end(llm, plain):
    """Text that was held back because a stop string might have begun."""
    text = plain.generate(PROMPT, max_new_tokens=12).text
    result = llm.generate(PROMPT, max_new_tokens=12, stop=[text[-2:] + "?"])
    assert (result.text, result.finish_reason) == (text, "length")


def test_chat_reuses_earlier_turns(llm, plain):
    """The answer equals that of a model that has seen nothing before."""
    messages = [{"role": "user", "content": "abcab"}]
    first = llm.chat(messages, max_new_tokens=10)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "qrs"}]
    second = llm.chat(messages, max_new_tokens=10)
    assert second.metrics.reused_tokens == 5 + 10 - 1
    assert second.text == plain.generate("abcab" + first.text + "qrs", max_new_tokens=10).text


def test_chat_of_one_message_may_be_a_string(llm):
    wanted = llm.chat([{"role": "user", "content": "abc"}], max_new_tokens=5).text
    assert llm.chat("abc", max_new_tokens=5).text == wanted
    assert llm.stream_chat("abc", max_new_tokens=5).finish().text == wanted


@pytest.mark.parametrize("messages", [["abc"], [{"role": "user"}], [{"content": "abc"}], [None]])
def test_message_without_role_or_content_is_refused(llm, messages):
    """A template would render a missing entry as nothing."""
    with pytest.raises(ConfigError, match="expected a dictionary with role and content"):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "the chat is None, expected text or a list of messages"),
        (5, "the chat is 5, expected text or a list of messages"),
        (b"abc", "the chat is b'abc', expected text or a list of messages"),
        ({"role": "user", "content": "a"}, "expected text or a list of messages"),
        ([], "the chat holds no message"),
    ],
)
def test_chat_that_is_none_is_refused(llm, messages, told):
    for call in (llm.chat, llm.stream_chat):
        with pytest.raises(ConfigError) as caught:
            call(messages)
        assert told in str(caught.value)


def test_misspelt_role_is_refused_and_the_nearest_suggested(llm):
    """Templates of the ChatML kind write whatever role they are given, and the model has never seen this one."""
    with pytest.raises(ConfigError, match="role 'usr', expected one of system, user, assistant") as caught:
        llm.chat([{"role": "usr", "content": "abc"}])
    assert caught.value.hint == "did you mean `user`?"
    for role in (None, ["user"], "robot", ""):
        with pytest.raises(ConfigError, match="a message has role"):
            llm.chat([{"role": role, "content": "abc"}])


@pytest.mark.parametrize("role", ROLES)
def test_known_role_is_the_templates_to_refuse(llm, role):
    """Also a chat of one system message alone."""
    assert llm.chat([{"role": role, "content": "abc"}], max_new_tokens=3).token_ids


def test_role_that_the_template_names_is_passed_on(tmp_path):
    llm = make_llm(tmp_path, make_engine(TARGET))
    template = "{% for m in messages %}{% if m.role == 'ipython' %}{{ m.content }}{% endif %}{% endfor %}"
    llm.tokenizer._template = ChatTemplate(tmp_path, {"chat_template": template})
    assert llm.chat([{"role": "ipython", "content": "abc"}], max_new_tokens=3).token_ids


def test_options_may_come_as_one_config(llm):
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.5)
    wanted = llm.generate(PROMPT, max_new_tokens=7, repetition_penalty=1.5)
    assert llm.generate(PROMPT, config).token_ids == wanted.token_ids
    assert llm.stream(PROMPT, config=config, max_new_tokens=4).finish().token_ids == wanted.token_ids[:4]
    assert llm.chat(PROMPT, config).token_ids == llm.stream_chat(PROMPT, config).finish().token_ids


@pytest.mark.parametrize("config", [5, {"temperature": 1.0}, "greedy", LoadConfig()])
def test_config_of_another_kind_names_the_keywords(llm, config):
    for call in (llm.generate, llm.stream, llm.chat, llm.stream_chat):
        with pytest.raises(ConfigError, match="expected a GenerationConfig") as caught:
            call(PROMPT, config)
        assert "max_new_tokens=" in caught.value.hint


def test_on_prefill_that_cannot_be_called_is_refused(llm):
    with pytest.raises(ConfigError, match="on_prefill is 5, expected a function"):
        llm.stream(PROMPT, on_prefill=5)


@pytest.mark.parametrize("name", ["model", "draft"])
@pytest.mark.parametrize("path", ["a\0b", "a" * 5000])
def test_path_that_the_system_refuses_is_told_in_one_line(name, path):
    with pytest.raises(ConfigError, match=f"{name} is .*, which cannot be read: "):
        EdgeLLM.load(**{name: path})


@pytest.mark.parametrize("option", [{"draft_device": "NPU"}, {"draft_properties": {"NUM_STREAMS": 1}}])
def test_options_of_a_draft_are_refused_without_one(tiny_ir, option):
    """They were dropped without a word."""
    with pytest.raises(ConfigError, match=f"{next(iter(option))} is .*, but no draft is loaded"):
        EdgeLLM.load(tiny_ir("llama"), **option)


def test_file_that_vanishes_while_loading_is_told_in_one_line(tiny_ir, monkeypatch):
    folder = tiny_ir("llama")
    gone = FileNotFoundError(2, "No such file or directory", str(folder / "openvino_model.bin"))
    monkeypatch.setattr("edge_runtime.models.loading.load_model", Mock(side_effect=gone))
    with pytest.raises(ModelFormatError, match=r"openvino_model\.bin` cannot be read: No such file or directory"):
        EdgeLLM.load(folder)


@pytest.mark.parametrize("options", [{"model": 123}, {"model": b"folder"}, {"draft": 5}, {"device": None}])
def test_load_refuses_what_is_no_name(options):
    name = next(iter(options))
    with pytest.raises(ConfigError, match=f"{name} is .*, expected a"):
        EdgeLLM.load(**options)


def test_unknown_option_names_the_nearest(llm):
    """mlx-lm and nano-vllm drop options that they do not know."""
    for call in (llm.generate, llm.stream, llm.chat, llm.stream_chat):
        with pytest.raises(ConfigError, match="unknown option `temprature`") as caught:
            call("abc", temprature=1.0)
        assert caught.value.hint == "did you mean `temperature`?"


@pytest.mark.parametrize("options", [{"stop_token_ids": [24]}, {"logit_bias": {24: 1.0}}])
def test_token_id_that_the_model_lacks_is_refused(llm, options):
    """It would never stop anything, and bias nothing."""
    with pytest.raises(ConfigError, match="holds token id 24, expected an id from 0 to 23"):
        llm.generate(PROMPT, **options)


def test_drafting_without_a_draft_is_refused(plain):
    """Plain decoding would be something else than was asked for."""
    with pytest.raises(ConfigError, match="num_draft_tokens is 4, but no draft model is loaded") as caught:
        plain.generate(PROMPT, num_draft_tokens=4)
    assert caught.value.hint
    for options in ({"num_draft_tokens": 0}, {"num_draft_tokens": "auto"}, {"num_draft_tokens": 4, "lookup": True}):
        plain.generate(PROMPT, max_new_tokens=2, **options)


# --- every option is honoured ---------------------------------------------------------------------------------------


def positions(result: GenerationResult) -> int:
    """Return the longest block that was drafted."""
    return len(result.metrics.proposed_by_position)


def spread(result: GenerationResult) -> int:
    """Return how many different tokens an answer has."""
    return len(set(result.token_ids))


def acceptance(ask: Callable[..., GenerationResult], **options: Any) -> float:
    """Return the acceptance over an answer so long that it repeats itself."""
    return ask(max_new_tokens=200, **options).metrics.acceptance_rate


def distinct(results: list[GenerationResult]) -> int:
    return len({tuple(result.token_ids) for result in results})


Ask = Callable[..., GenerationResult]
SAMPLED = {"temperature": 1.5, "num_draft_tokens": 3}


def many(ask: Ask, **options: Any) -> list[GenerationResult]:
    """Return sampled answers for several seeds."""
    return [ask(**{**SAMPLED, "seed": seed, **options}) for seed in range(8)]


def is_greedy(ask: Ask, **options: Any) -> bool:
    """Whether sampling with these options leaves only the most likely token."""
    return {tuple(result.token_ids) for result in many(ask, **options)} == {tuple(ask().token_ids)}


HONOURED: dict[str, Callable[[Ask], bool]] = {
    "max_new_tokens": lambda ask: len(ask(max_new_tokens=7).token_ids) == 7,
    "temperature": lambda ask: distinct(many(ask)) == 8 and is_greedy(ask, temperature=1e-6),
    "top_k": lambda ask: is_greedy(ask, top_k=1),
    "top_p": lambda ask: is_greedy(ask, top_p=1e-6),
    "min_p": lambda ask: is_greedy(ask, min_p=1.0),
    "repetition_penalty": lambda ask: spread(ask(repetition_penalty=5.0)) > spread(ask()),
    "presence_penalty": lambda ask: spread(ask(presence_penalty=50.0)) == 20,
    "frequency_penalty": lambda ask: spread(ask(frequency_penalty=50.0)) == 20,
    "logit_bias": lambda ask: ask(logit_bias={5: 100.0}).token_ids == [5] * 20,
    "seed": lambda ask: distinct([ask(**SAMPLED, seed=3) for _ in range(5)]) == 1,
    "stop": lambda ask: ask(stop=LETTERS[ask().token_ids[4]]).finish_reason == "stop",
    "stop_token_ids": lambda ask: ask(stop_token_ids=[ask().token_ids[4]]).finish_reason == "stop",
    "ignore_eos": lambda ask: len(ask(ignore_eos=True).token_ids) > len(ask(ignore_eos=False).token_ids),
    "logprobs": lambda ask: len(ask(logprobs=2).logprobs[0].top_logprobs) == 2 and ask().logprobs is None,
    "num_draft_tokens": lambda ask: [positions(ask(num_draft_tokens=k)) for k in (0, 1, 5)] == [0, 1, 5],
    "max_draft_tokens": lambda ask: positions(ask(num_draft_tokens="auto", max_draft_tokens=3)) == 3,
    "lookup": lambda ask: acceptance(ask, lookup=True) > acceptance(ask, lookup=False),
}


def test_every_option_has_its_effect_here():
    assert set(HONOURED) == {field.name for field in dataclasses.fields(GenerationConfig)}


@pytest.mark.parametrize("option", HONOURED)
def test_option_is_honoured_while_speculating(option, tmp_path):
    """mlx-lm drops `max_kv_size` when a draft is given."""
    eos = [LETTERS.index("k")] if option == "ignore_eos" else []
    table = TARGET.copy()
    if option == "ignore_eos":
        table[:, LETTERS.index("x"), eos[0]] = 50.0  # the first token ends the answer
    llm = make_llm(tmp_path, make_engine(table, random_table(24, 2)), eos)

    def ask(**options: Any) -> GenerationResult:
        return llm.generate(PROMPT, **{"max_new_tokens": 20, "num_draft_tokens": 2, **options})

    assert HONOURED[option](ask)


@pytest.mark.parametrize("attention", ["stock", "block_sparse"])
@pytest.mark.parametrize("precision", ["f32", "auto"])
def test_answer_after_nan_keys_is_that_of_a_fresh_model(attention, precision):
    """The request that met them ends with an error, and nothing of them is left in what the next one reads."""
    llm, fresh = (EdgeLLM.load(precision=precision, attention=attention) for _ in range(2))
    ids, options = list(range(300, 380)), {"max_new_tokens": 12, "ignore_eos": True}
    stream = llm.stream(ids, **options)
    next(stream)
    for pool in llm.target._sequences.pools:
        for tensor in pool.memory._memory:
            tensor[...] = 0xFF
    with pytest.raises(LogitsError, match="the model's largest logit is nan"):
        stream.finish()
    assert llm.generate(ids, **options).token_ids == fresh.generate(ids, **options).token_ids
