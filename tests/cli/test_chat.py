"""`edge-run chat` with questions from a pipe."""

import json

import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.cli import chat

FLAGS = ("-n", 12, "--ignore-eos")


@pytest.fixture
def talk(edge_run, model, monkeypatch):
    """Return a function from lines of input to what was printed, and the results of all answers."""
    results = []
    run_stream = chat.run_stream

    def recorded(*args):
        results.append(run_stream(*args))
        return results[-1]

    monkeypatch.setattr(chat, "run_stream", recorded)

    def call(*lines, flags=FLAGS):
        results.clear()
        done = edge_run("chat", "-m", model, *flags, stdin="".join(f"{line}\n" for line in lines).encode())
        assert done.code == 0
        return done, list(results)

    return call


@pytest.fixture(scope="module")
def llm(model):
    return EdgeLLM.load(model)


def test_answers_are_those_of_the_api_and_earlier_turns_are_not_read_again(talk, llm):
    done, results = talk("Hello", "", "And then?")
    messages = [{"role": "user", "content": "Hello"}]
    first = llm.chat(messages, max_new_tokens=12, ignore_eos=True).text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    second = llm.chat(messages, max_new_tokens=12, ignore_eos=True).text
    assert done.out == f"{first}\n{second}\n"
    first_turn = results[0].metrics.prompt_tokens
    assert results[0].metrics.reused_tokens == 0
    assert first_turn <= results[1].metrics.reused_tokens < results[1].metrics.prompt_tokens


def test_stats_of_the_last_answer(talk):
    done, results = talk("/stats", "Hello", "And then?", "/stats")
    assert "there is no answer yet" in done.err
    assert f"{results[1].metrics.reused_tokens} of them still held" in done.err


def test_undo_takes_back_one_exchange(talk):
    done, results = talk("Hello", "/undo", "/undo", "Hello")
    assert "taken back: Hello" in done.err
    assert "nothing to take back" in done.err
    assert results[0].token_ids == results[1].token_ids


def test_reset_keeps_the_system_message(talk):
    _, results = talk("/system Be kind", "Hello", "And then?", "/reset", "Hello", "/system", "/reset", "Hello")
    with_system, _, again, without = (result.metrics.prompt_tokens for result in results)
    assert with_system == again > without


def test_system_message_from_the_command_line(talk):
    _, typed = talk("/system Be kind", "Hello")
    _, given = talk("Hello", flags=(*FLAGS, "--system", "Be kind"))
    assert typed[0].token_ids == given[0].token_ids
    assert typed[0].metrics.prompt_tokens == given[0].metrics.prompt_tokens


def test_save_writes_the_conversation(talk, tmp_path):
    path = tmp_path / "story.json"
    done, results = talk("Hello", f"/save {path}")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": results[0].text},
    ]
    assert list(tmp_path.iterdir()) == [path]
    assert str(path) in done.err


def test_save_that_fails_does_not_end_the_chat(talk, tmp_path):
    done, results = talk(f"/save {tmp_path / 'no' / 'story.json'}", "/save", "Hello")
    assert done.err.count("error: ") == 2
    assert len(results) == 1


def test_message_of_several_lines(talk, llm):
    _, results = talk('"""Hello', "fox", '"""', '"""and bird"""')
    ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": "Hello\nfox"}])
    assert results[0].metrics.prompt_tokens == len(ids)
    assert len(results) == 2


def test_full_context_is_said_and_can_be_left(talk):
    """Context is 512 tokens: the first answer runs into its end, then the question itself does not fit."""
    long = "fox " * 100
    done, results = talk(long, long, "/reset", "Hello", flags=("-n", 500, "--ignore-eos"))
    assert results[0].finish_reason == "length"
    assert f"the context of 512 tokens is full: {chat.MAKE_ROOM}" in done.err
    assert f"hint: {chat.MAKE_ROOM}" in done.err
    assert len(results) == 2
    assert results[1].text


def test_answer_cut_off_by_n_is_said(talk):
    assert "cut off after 12 tokens: `-n`" in talk("Hello")[0].err


def test_unknown_command_suggests_and_goes_on(talk):
    done, results = talk("/rest", "/etc/hosts is a file", "/exit", "never read")
    assert "did you mean `/reset`?" in done.err
    assert len(results) == 1


def test_help_names_every_command(talk, model):
    done, _ = talk("/help")
    assert {word for word in done.err.split() if word.startswith("/")} == {
        *("/undo", "/reset", "/system", "/stats", "/save", "/quit")
    }


def test_model_without_a_template(edge_run, copy_of):
    folder = copy_of()
    (folder / "chat_template.jinja").unlink()
    done = edge_run("chat", "-m", folder, stdin=b"Hello\n")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0].endswith("has no chat template")
    assert done.err.splitlines()[1].startswith("hint: use `edge-run generate`")
