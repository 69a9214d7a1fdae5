"""Every option of the Python API can be given on the command line, has its default there, and arrives."""

import dataclasses

import pytest
import typer

from edge_runtime.cli.options import flag_of
from edge_runtime.config import GenerationConfig, LoadConfig
from edge_runtime.text.chat_config import ChatConfig

# For each field: what is written after its flag (None for a switch), and the value that must arrive.
GENERATION = {
    "max_new_tokens": (["7"], 7),
    "temperature": (["0.5"], 0.5),
    "top_k": (["3"], 3),
    "top_p": (["0.25"], 0.25),
    "min_p": (["0.125"], 0.125),
    "repetition_penalty": (["1.5"], 1.5),
    "presence_penalty": (["-0.5"], -0.5),
    "frequency_penalty": (["0.75"], 0.75),
    "logit_bias": (["3=-inf", "5=1.5"], {3: float("-inf"), 5: 1.5}),
    "seed": (["11"], 11),
    "stop": ([r"a\n", r"\\n\t"], ("a\n", "\\n\t")),
    "stop_token_ids": (["4", "2"], (4, 2)),
    "ignore_eos": ([None], True),
    "logprobs": (["2"], 2),
    "num_draft_tokens": (["5"], 5),
    "max_draft_tokens": (["3"], 3),
    "lookup": ([None], True),
}
LOAD = {
    "device": (["GPU.1"], "GPU.1"),
    "draft_device": (["CPU"], "CPU"),
    "precision": (["f32"], "f32"),
    "kv_precision": (["u4"], "u4"),
    "num_threads": (["2"], 2),
    "prefill_chunk_size": (["64"], 64),
    "context_length": (["100"], 100),
    "activation_group_size": (["64"], 64),
    "npu_step_tokens": (["8"], 8),
    "mlp": (["stock"], "stock"),
    "attention": (["stock"], "stock"),
    "cache_dir": (["cache"], "cache"),
    "prefix_cache_bytes": (["4096"], 4096),
    "prefix_cache_dir": (["prefixes"], "prefixes"),
    "properties": (["NUM_STREAMS=1", "A=b=c"], {"NUM_STREAMS": "1", "A": "b=c"}),
    "draft_properties": (["NUM_STREAMS=1"], {"NUM_STREAMS": "1"}),
}
FIELDS = {**GENERATION, **LOAD}
CHAT = {
    "template_options": (
        ["enable_thinking=false", "name=Ann", "top=3"],
        {"enable_thinking": False, "name": "Ann", "top": 3},
    ),
    "special_tokens_in_messages": ([None], True),
}
BY_THE_API_ALONE = {"tools", "documents", "continue_final_message"}


@pytest.fixture
def given(edge_run, monkeypatch):
    """Return a function from flags to the two configs that the model would get."""
    taken = []

    def take(options):
        taken.append(options)
        raise typer.Exit(0)

    monkeypatch.setattr("edge_runtime.cli.generate.load_model", take)

    def call(*flags):
        done = edge_run("generate", "-m", "target", *flags, "--json", "x")
        assert (done.code, done.err) == (0, "")
        options = taken.pop()
        return GenerationConfig.from_options(**options.generation), LoadConfig.from_options(**options.load), options

    return call


def test_every_field_is_tested():
    configs = (GenerationConfig, LoadConfig)
    assert {field.name for config in configs for field in dataclasses.fields(config)} == set(FIELDS)
    assert {field.name for field in dataclasses.fields(ChatConfig)} == set(CHAT) | BY_THE_API_ALONE


def test_nothing_given_is_every_default(given):
    generation, load, options = given()
    assert (generation, load) == (GenerationConfig(), LoadConfig())
    assert (options.model, options.draft) == ("target", None)


@pytest.mark.parametrize("name", FIELDS)
def test_value_arrives_and_nothing_else_changes(given, name):
    words, expected = FIELDS[name]
    flags = [part for word in words for part in ((flag_of(name),) if word is None else (flag_of(name), word))]
    generation, load, _ = given(*flags)
    defaults = {**dataclasses.asdict(GenerationConfig()), **dataclasses.asdict(LoadConfig())}
    assert expected != defaults[name]
    assert {**dataclasses.asdict(generation), **dataclasses.asdict(load)} == {**defaults, name: expected}


@pytest.mark.parametrize("name", CHAT)
def test_option_of_chats_arrives(given, name):
    words, expected = CHAT[name]
    flags = [part for word in words for part in ((flag_of(name),) if word is None else (flag_of(name), word))]
    assert given("--chat", *flags)[2].chat == {name: expected}


def test_only_what_is_given_counts_as_given(given):
    """A model's own recommendation gives way to `-t 0`, which is also the default."""
    assert (given()[2].generation, given("-t", "0")[2].generation) == ({}, {"temperature": 0.0})


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--special-tokens-in-messages",), "--special-tokens-in-messages is given without --chat"),
        (("--template-option", "a=1"), "--template-option is given without --chat"),
        (("--chat", "--template-option", "a"), "--template-option is 'a', expected NAME=VALUE"),
        (("--chat", "--template-option", "messages=1"), "sets 'messages', which is not an option of a template"),
    ],
)
def test_option_of_chats_that_cannot_be_used(edge_run, flags, told):
    done = edge_run("generate", "-m", "target", *flags, "x")
    assert (done.code, done.err.count("error: ")) == (2, 1)
    assert told in done.err


@pytest.mark.parametrize("flag", ["-d", "--draft"])
def test_draft_is_taken(given, flag):
    assert given(flag, "small")[2].draft == "small"


def test_auto_can_be_said(given):
    assert given("--num-draft-tokens", "auto")[0].num_draft_tokens == "auto"


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_shows_the_defaults_of_the_config(edge_run, command):
    done = edge_run(command, "--help")
    assert (done.code, done.err) == (0, "")
    said = " ".join(done.out.split())
    for default in (512, 1.0, "auto", "CPU", 8):
        assert f"[default: {default}]" in said
    assert ("--logprobs" in said) == (command == "generate")


@pytest.mark.parametrize("word", ["NUM_STREAMS", "=1", "two words=1", ""])
def test_a_property_without_name_or_value_is_refused(edge_run, word):
    done = edge_run("generate", "--property", word, "x")
    assert (done.code, done.out) == (2, "")
    assert f"property is {word!r}, expected NAME=VALUE" in done.err
