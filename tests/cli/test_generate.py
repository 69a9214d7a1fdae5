"""`edge-run generate`: the same text as the API, on the right stream, in every way of asking for it."""

import re
import shlex
from pathlib import Path

import pytest

from edge_runtime.api import EdgeLLM
from edge_runtime.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Once upon a time there was a little fox"
OPTIONS = {"max_new_tokens": 40, "ignore_eos": True}
# In f32 an answer does not depend on how many tokens are verified at once.
FLAGS = ("-n", 40, "--ignore-eos", "--precision", "f32")


@pytest.fixture(scope="module")
def llm(model):
    return EdgeLLM.load(model, precision="f32")


@pytest.fixture(scope="module")
def text(llm):
    return llm.generate(PROMPT, **OPTIONS).text


def test_prints_the_text_of_the_api_and_one_line_end(edge_run, model, text):
    done = edge_run("generate", "-m", model, *FLAGS, PROMPT)
    assert done == (0, text + "\n", "")


def test_sampling_options_reach_the_model(edge_run, model, llm):
    expected = llm.generate(PROMPT, **OPTIONS, temperature=0.9, top_k=20, seed=7).text
    flags = (*FLAGS, "-t", 0.9, "--top-k", 20, "--seed", 7)
    assert edge_run("generate", "-m", model, *flags, PROMPT).out == expected + "\n"


def test_draft_none_means_no_draft(edge_run, model, text):
    done = edge_run("generate", "-m", model, "-d", "none", *FLAGS, "--json", PROMPT)
    assert done.json["text"] == text
    assert done.json["metrics"]["proposed_tokens"] == 0


def test_json_is_one_object_with_everything_measured(edge_run, model, llm, text):
    done = edge_run("generate", "-m", model, "-d", model, *FLAGS, "--num-draft-tokens", 4, "--json", PROMPT)
    answer = done.json
    assert (done.code, done.err) == (0, "")
    assert set(answer) == {"text", "token_ids", "finish_reason", "metrics", "models"}
    assert answer["text"] == text
    assert answer["token_ids"] == llm.generate(PROMPT, **OPTIONS).token_ids
    assert answer["finish_reason"] == "length"
    metrics = answer["metrics"]
    assert set(metrics) == set(Metrics().as_dict())
    assert metrics["new_tokens"] == 40
    assert metrics["prompt_tokens"] == len(llm.tokenizer.encode(PROMPT))
    assert metrics["accepted_tokens"] / metrics["proposed_tokens"] == pytest.approx(
        metrics["acceptance_rate"], abs=1e-4
    )
    assert metrics["acceptance_rate"] == 1  # its own draft
    assert metrics["block_efficiency"] == pytest.approx(39 / 8, abs=1e-4)
    assert min(metrics[name] for name in ("ttft_s", "tpot_ms", "tokens_per_second", "peak_rss_bytes", "load_s")) > 0


def test_json_with_logprobs_names_the_tokens(edge_run, model, llm):
    answer = edge_run("generate", "-m", model, "-n", 3, "--ignore-eos", "--json", "--logprobs", 2, PROMPT).json
    for token_id, entry in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert entry["token_id"] == token_id == entry["top"][0]["token_id"]
        assert entry["token"] == llm.tokenizer.token(token_id)
        assert entry["logprob"] == entry["top"][0]["logprob"] >= entry["top"][1]["logprob"]


@pytest.mark.parametrize("argument", [("-",), ()])
@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_prompt_is_read_from_stdin_as_utf8(edge_run, model, llm, argument, ending):
    prompt = "Zwölf 🦊"
    expected = llm.generate(prompt, **OPTIONS).text
    done = edge_run("generate", "-m", model, *FLAGS, *argument, stdin=prompt.encode() + ending)
    assert done == (0, expected + "\n", "")


def test_only_the_last_line_end_of_stdin_is_dropped(edge_run, model, llm):
    flags = ("-n", 1, "--json", "-")
    counted = edge_run("generate", "-m", model, *flags, stdin=b"\xef\xbb\xbfa\r\nb\n\n").json["metrics"][
        "prompt_tokens"
    ]
    assert counted == len(llm.tokenizer.encode("a\nb\n"))


def test_stop_ends_before_the_text(edge_run, model, text):
    stop = text[20:23]
    done = edge_run("generate", "-m", model, *FLAGS, "--stop", "no such text", "--stop", stop, "--json", PROMPT)
    assert done.json["text"] == text[: text.index(stop)]
    assert done.json["finish_reason"] == "stop"


def test_stats_go_to_stderr(edge_run, model, text):
    done = edge_run("generate", "-m", model, "-d", model, "--num-draft-tokens", 4, *FLAGS, "--stats", PROMPT)
    assert (done.code, done.out) == (0, text + "\n")
    for word in (
        "prompt",
        "answer  40 tokens",
        "tokens/s",
        "accepted drafts",
        "by position",
        "peak memory",
        "per target step",
        "MiB",
    ):
        assert word in done.err


def test_chat_uses_the_template(edge_run, model, llm):
    expected = llm.chat("Hello", **OPTIONS).text
    assert edge_run("generate", "-m", model, "--chat", *FLAGS, "Hello").out == expected + "\n"


def test_output_is_utf8_on_a_console_that_is_not(start_edge_run, model, text):
    """A Windows pipe is cp1252, and a random model says characters that it lacks."""
    process = start_edge_run("generate", "-m", model, *FLAGS, PROMPT, PYTHONIOENCODING="cp1252")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert out.decode("utf-8").replace("\r\n", "\n") == text + "\n"


def test_text_streams_and_a_closed_pipe_ends_quietly(start_edge_run, long_model):
    """As in `edge-run generate … | head -1`, long before the answer is complete."""
    process = start_edge_run("generate", "-m", long_model, "-n", 90_000, "--ignore-eos", PROMPT)
    assert process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == b""


def test_the_readmes_first_command_runs(edge_run):
    """No model is named: the embedded pair speaks, and its draft drafts."""
    block = re.search(r"<!-- first -->\s*```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    name, *args = shlex.split(block[1].split("&&")[1])
    assert name == "edge-run"
    done = edge_run(*args, "-n", "40", "--num-draft-tokens", "3")
    assert done.code == 0
    assert len(done.out.split()) > 5
    assert "accepted drafts" in done.err


def test_the_embedded_target_without_its_draft(edge_run):
    done = edge_run("generate", "Once upon a time", "-d", "none", "-n", "8", "--json")
    assert done.json["metrics"]["proposed_tokens"] == 0
