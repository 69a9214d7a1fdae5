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


RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_k": 0, "repetition_penalty": 1.5, "suppress_tokens": [3]}


def test_chat_follows_generation_config_and_says_so(edge_run, copy_of):
    folder = copy_of()
    (folder / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    options = EdgeLLM.load(folder).recommended_options
    assert options == {
        "temperature": 0.6,
        "repetition_penalty": 1.5,
        "logit_bias": {3: float("-inf")},
    }

    def talk(*flags):
        return edge_run("chat", "-m", folder, *FLAGS, "--seed", 5, *flags, stdin=b"Hello\n")

    followed = talk()
    told = "temperature 0.6, repetition-penalty 1.5, 1 token suppressed; -t 0 for greedy"
    assert f"note: sampling from the model's generation_config.json: {told}" in followed.err
    llm = EdgeLLM.load(folder)
    assert followed.out == llm.chat("Hello", max_new_tokens=12, ignore_eos=True, seed=5, **options).text + "\n"

    greedy = talk("-t", "0")
    assert "note: from the model's generation_config.json: repetition-penalty 1.5, 1 token suppressed\n" in greedy.err
    own = talk("-t", "0", "--repetition-penalty", "1", "--logit-bias", "3=0")
    assert "generation_config" not in own.err
    plain = llm.chat("Hello", max_new_tokens=12, ignore_eos=True).text  # the API takes nothing by itself
    assert own.out == f"{plain}\n"


def test_generation_config_that_cannot_be_used_is_one_note(edge_run, copy_of):
    folder = copy_of()
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": -1}')
    done = edge_run("chat", "-m", folder, *FLAGS, stdin=b"Hello\n")
    assert (done.code, done.err.count("note: ")) == (0, 1)
    assert "temperature is -1, expected at least 0" in done.err


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


def test_saved_conversation_with_its_system_message_goes_on_after_load(talk, tmp_path):
    path = tmp_path / "story.json"
    _, spoken = talk("/system Be kind", "Hello", f"/save {path}", "And then?")
    first, second = spoken
    saved = path.read_bytes()
    assert json.loads(saved)[0] == {"role": "system", "content": "Be kind"}
    _, resumed = talk(f"/load {path}", "And then?")
    assert resumed[0].metrics.prompt_tokens == second.metrics.prompt_tokens
    assert resumed[0].text == second.text
    done, _ = talk(f"/load {path}", "/save")
    assert path.read_bytes() == saved
    assert "loaded 1 question and its answer from" in done.err
    done, results = talk(f"/load {path}", "/undo", "/undo", "Hello")
    assert "nothing to take back" in done.err
    assert results[0].token_ids == first.token_ids


def test_load_takes_the_place_of_the_system_message_too(talk, tmp_path):
    path = tmp_path / "none.json"
    path.write_text("[]")
    _, plain = talk("Hello")
    _, loaded = talk("/system Be kind", "Hello", f"/load {path}", "Hello")
    assert loaded[1].metrics.prompt_tokens == plain[0].metrics.prompt_tokens


BAD_TRANSCRIPTS = {
    "{": "is no JSON file",
    "[" * 100_000: "is no JSON file",
    "{}": "expected a role and a text",
    "5": "expected a role and a text",
    '[{"role": "user", "content": 5}, {"role": "assistant", "content": "a"}]': "message 1 of",
    '[{"role": "user"}, {"role": "assistant", "content": "a"}]': "message 1 of",
    '[{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]': "has role 'usr', expected 'user'",
    '[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]': "message 2 of",
    '[{"role": "user", "content": "a"}]': "ends with a question",
}


@pytest.mark.parametrize("content", BAD_TRANSCRIPTS, ids=range(len(BAD_TRANSCRIPTS)))
def test_load_of_something_else_is_one_line_and_changes_nothing(talk, tmp_path, content):
    path = tmp_path / "story.json"
    path.write_text(content)
    done, results = talk("Hello", f"/load {path}", "And then?")
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert BAD_TRANSCRIPTS[content] in lines[0]
    assert results[1].metrics.reused_tokens


def test_load_of_a_file_that_cannot_be_read_is_one_line(talk, tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    done, _ = talk("/load", f"/load {tmp_path / 'no.json'}", f"/load {tmp_path}", f"/load {tmp_path / 'bytes.json'}")
    assert [line.split(":")[0] for line in done.err.splitlines()].count("error") == 4


def test_save_replaces_only_what_this_chat_saved_or_loaded(talk, tmp_path):
    path = tmp_path / "thesis.json"
    path.write_text("years of work")
    done, _ = talk("Hello", f"/save {path}")
    assert f"`{path}` exists already" in done.err
    assert path.read_text() == "years of work"
    path.unlink()
    done, _ = talk("Hello", f"/save {path}", "And then?", f"/save {path}")
    assert "error" not in done.err
    assert len(json.loads(path.read_text(encoding="utf-8"))) == 4


def test_end_of_input_within_a_message_of_several_lines_keeps_the_conversation(edge_run, model, monkeypatch):
    """On a terminal Ctrl-D ends a line, not the input: the chat goes on."""
    lines = iter(["Hello", '"""And', EOFError, "/undo", EOFError])

    def read_line(prompt):
        line = next(lines)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr(chat, "_read_line", read_line)
    done = edge_run("chat", "-m", model, *FLAGS)
    assert done.code == 0
    assert "error: the message is dropped" in done.err
    assert "taken back: Hello" in done.err


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
    assert "cut off after 12 tokens; `-n`" in talk("Hello")[0].err


def test_unknown_command_suggests_and_goes_on(talk):
    done, results = talk("/rest", "/etc/hosts is a file", "/exit", "never read")
    assert "did you mean `/reset`?" in done.err
    assert len(results) == 1


def test_help_names_every_command(talk, model):
    done, _ = talk("/help")
    assert {word for word in done.err.split() if word.startswith("/")} == {
        *("/undo", "/reset", "/system", "/stats", "/save", "/load", "/help", "/quit", "/exit")
    }


def test_embedded_pair_is_refused_before_it_is_loaded(edge_run):
    done = edge_run("chat", stdin=b"Hello\n")
    assert (done.code, done.out) == (2, "")
    assert "the embedded pair cannot chat" in done.err
    assert "edge-run pull" in done.err


def test_model_without_a_template(edge_run, copy_of):
    folder = copy_of()
    (folder / "chat_template.jinja").unlink()
    done = edge_run("chat", "-m", folder, stdin=b"Hello\n")
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[0].endswith("has no chat template")
    assert done.err.splitlines()[1].startswith("hint: use `edge-run generate`")


@pytest.mark.parametrize("command", ["/save", "/load"])
@pytest.mark.parametrize("name", ["~nobody-has-this-name/x.json", "x" * 5000])
def test_name_that_no_file_can_have_does_not_end_the_chat(talk, command, name):
    """The conversation was lost with it."""
    done, results = talk(f"{command} {name}", "Hello")
    assert "is no file name: " in done.err
    assert len(results) == 1


def test_half_a_character_is_not_loaded(talk, tmp_path):
    """Nothing could be answered or saved after it."""
    path = tmp_path / "half.json"
    path.write_text(r'[{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "x"}]')
    done, results = talk(f"/load {path}", "Hello")
    assert "message 1 of" in done.err
    assert "holds half a character" in done.err
    assert len(results) == 1


def test_saving_through_a_link_keeps_the_link(talk, tmp_path):
    (tmp_path / "real.json").write_text("[]")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    talk(f"/load {tmp_path / 'link.json'}", "Hello", "/save")
    assert (tmp_path / "link.json").is_symlink()
    assert len(json.loads((tmp_path / "real.json").read_text())) == 2


@pytest.fixture
def home(monkeypatch, tmp_path):
    """The user's folders, empty."""
    for name in ("cache", "data"):
        monkeypatch.setattr(f"edge_runtime.user_folders.{name}_folder", lambda name=name: tmp_path / name)
    monkeypatch.setattr(chat, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("edge_runtime.cli.transcript.data_folder", lambda: tmp_path / "data")
    return tmp_path


LONG = "Once upon a time there was a little fox who lived in a quiet forest. " * 3


def test_a_chat_that_has_a_name_goes_on_where_it_was_and_is_not_read_again(talk, home):
    flags = (*FLAGS, "--resume", "my fox")
    done, (first,) = talk(LONG, flags=(*flags, "--system", "Be brief"))
    chats = json.loads((home / "data" / "chats" / "my fox.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in chats] == ["system", "user", "assistant"]
    done, (second,) = talk("And then?", flags=flags)
    assert "1 question and its answer" in done.err
    assert second.metrics.reused_tokens >= first.metrics.prompt_tokens
    chats = json.loads((home / "data" / "chats" / "my fox.json").read_text(encoding="utf-8"))
    assert [message["content"] for message in chats[:2]] == ["Be brief", LONG]
    assert len(chats) == 5


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 101, "a\nb"])
def test_what_is_no_name_of_a_chat_is_refused(edge_run, model, home, name):
    done = edge_run("chat", "-m", model, "--resume", name)
    assert (done.code, done.out) == (2, "")
    assert "error: the chat's name is" in done.err
    assert not list(home.iterdir())
