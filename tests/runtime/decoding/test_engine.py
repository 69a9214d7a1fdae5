"""The decode loop over fake models: whatever is drafted, the tokens are those of plain decoding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.errors import ConfigError, ContextOverflowError, LogitsError
from edge_runtime.metrics import Metrics
from tests.runtime.fakes import blended_table, generate, make_engine, random_table, run, start

V = 24
TARGET = random_table(V, 1)
DRAFTS = {
    "random": random_table(V, 2),
    "target itself": TARGET,
    "half right": blended_table(TARGET, random_table(V, 2), 0.4),
    "shuffled vocabulary": TARGET[..., np.random.default_rng(3).permutation(V)],
    "constant": np.zeros_like(TARGET),
    "narrower": TARGET[: V - 3, : V - 3, : V - 3],
    "wider": np.pad(TARGET, ((0, 5), (0, 5), (0, 5)), constant_values=9.0),
}
PROMPT = [3, 1, 4, 1, 5]
LOOPING = [2, 7, 1, 8] * 6
PENALTIES = {
    "none": {},
    "repetition": {"repetition_penalty": 1.3},
    "presence and frequency": {"presence_penalty": 0.6, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {5: 2.0, 9: float("-inf"), 11: -4.0}},
    "all": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {5: 2.0}},
}
LENGTHS = [1, 3, 5, 8, "auto"]


def plain(prompt=PROMPT, stop=(), **options) -> list[int]:
    """Return what the target says on its own."""
    return run(make_engine(TARGET), prompt, stop, num_draft_tokens=0, **options)


@pytest.mark.parametrize("num_draft_tokens", LENGTHS)
@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_speculative_equals_greedy(draft, num_draft_tokens):
    """Lengths of the answer around block ends, where an off-by-one shows."""
    for length in (1, 2, 3, 9, 10, 60):
        engine = make_engine(TARGET, DRAFTS[draft])
        options = {"max_new_tokens": length, "num_draft_tokens": num_draft_tokens}
        assert run(engine, PROMPT, **options) == plain(max_new_tokens=length)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("num_draft_tokens", [1, 4, "auto"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_penalties_and_bias_do_not_break_equality(penalty, num_draft_tokens, lookup):
    """A draft token counts for those drafted after it, and no longer once it is rejected."""
    for draft in ("half right", "random", "target itself"):
        engine = make_engine(TARGET, DRAFTS[draft])
        options = PENALTIES[penalty] | {"num_draft_tokens": num_draft_tokens, "lookup": lookup}
        assert run(engine, LOOPING, max_new_tokens=60, **options) == plain(
            LOOPING, max_new_tokens=60, **PENALTIES[penalty]
        )


@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5, 8, "auto"])
@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_prompt_lookup_equals_greedy(draft, num_draft_tokens):
    """Alone and before a draft model, in an answer that loops and so is copied most of the time."""
    engine = make_engine(TARGET, None if draft is None else DRAFTS[draft])
    metrics = Metrics()
    options = {"max_new_tokens": 200, "num_draft_tokens": num_draft_tokens, "lookup": True}
    assert run(engine, LOOPING, metrics=metrics, **options) == plain(LOOPING, max_new_tokens=200)
    assert num_draft_tokens == "auto" or metrics.accepted_tokens > 0


def test_every_stop_token_ends_at_the_same_place():
    """openvino.genai's stateful path looks only at a block's last token: a stop token before it leaves a tail."""
    text = plain(max_new_tokens=60)
    assert len(set(text)) > 5
    for stop in set(text):
        wanted = text[: text.index(stop)]
        for num_draft_tokens in (0, 1, 3, 8):
            for draft in ("target itself", "half right"):
                engine = make_engine(TARGET, DRAFTS[draft])
                options = {"max_new_tokens": 60, "num_draft_tokens": num_draft_tokens}
                assert run(engine, PROMPT, [stop, V + 7], **options) == wanted


def test_stop_token_as_first_token_gives_an_empty_answer():
    engine = make_engine(TARGET, TARGET)
    metrics = Metrics()
    assert run(engine, PROMPT, plain(max_new_tokens=1), metrics) == []
    assert (metrics.new_tokens, metrics.target_forwards) == (0, 0)


@pytest.mark.parametrize("draft", ["target itself", "half right", "random"])
def test_abandoned_request_leaves_nothing_to_repair(draft):
    """After any number of tokens, on one engine: both caches must forget what the next request does not share."""
    engine = make_engine(TARGET, DRAFTS[draft])
    wanted = {tuple(prompt): plain(prompt) for prompt in (PROMPT, PROMPT[:3], [*PROMPT, 2, 2, 9])}
    config = GenerationConfig(max_new_tokens=40, num_draft_tokens=4)
    for taken in range(1, 20):
        for prompt in wanted:
            stream = generate(engine, prompt, config)
            assert [next(stream).token_id for _ in range(taken)] == wanted[prompt][:taken]
            stream.close()
    for prompt, text in wanted.items():
        assert run(engine, prompt, num_draft_tokens=4) == text


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 500])
def test_prefill_chunks_do_not_change_the_answer(chunk_size):
    prompt = np.random.default_rng(4).integers(0, V, 50).tolist()
    engine = make_engine(TARGET, DRAFTS["half right"], chunk_size=chunk_size)
    assert run(engine, prompt, num_draft_tokens=3) == plain(prompt)


def test_prefill_reports_its_progress_and_can_be_cancelled():
    """A cancel takes effect after a step, and the next request goes on from there."""
    engine = make_engine(TARGET, chunk_size=10)
    prompt = np.random.default_rng(4).integers(0, V, 35).tolist()
    request, reader = start(engine, prompt, GenerationConfig())
    for _ in range(2):
        engine.step([request])
    engine.finish(request, "cancelled")
    assert reader.progress == [(0, 35), (10, 35)]
    metrics = Metrics()
    assert run(engine, prompt, metrics=metrics) == plain(prompt)
    assert metrics.reused_tokens == 20


def test_chat_turns_reuse_what_they_share():
    """The answer's last token was never fed, so it is the first to be computed."""
    engine = make_engine(TARGET, DRAFTS["half right"])
    first = run(engine, PROMPT, num_draft_tokens=4)
    turn = [*PROMPT, *first, 6, 6]
    metrics = Metrics()
    assert run(engine, turn, metrics=metrics, num_draft_tokens=4) == plain(turn)
    assert metrics.reused_tokens == len(PROMPT) + len(first) - 1
    assert metrics.prompt_tokens == len(turn)
    edited = [*turn[:8], 0, *turn[9:]]
    assert edited != turn
    metrics = Metrics()
    assert run(engine, edited, metrics=metrics, num_draft_tokens=4) == plain(edited)
    assert metrics.reused_tokens == 8


def test_same_prompt_again_computes_only_its_last_token():
    engine = make_engine(TARGET)
    run(engine, PROMPT)
    before, metrics = engine.target.num_forwards, Metrics()
    run(engine, PROMPT, metrics=metrics, max_new_tokens=1)
    assert metrics.reused_tokens == len(PROMPT) - 1
    assert engine.target.num_forwards == before + 1


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 5, 8, "auto"])
@pytest.mark.parametrize("draft", ["target itself", "random"])
def test_context_end_is_reached_and_not_overrun(draft, num_draft_tokens):
    """The fake fails when a forward goes beyond the context; every token that fits must come."""
    for context_length in range(6, 40):
        engine = make_engine(TARGET, DRAFTS[draft], context_length=context_length, draft_context_length=context_length)
        made = run(engine, PROMPT, max_new_tokens=100, num_draft_tokens=num_draft_tokens)
        assert made == plain(max_new_tokens=100)[: context_length - len(PROMPT)]


def test_shorter_draft_context_stops_drafting_only():
    """Beyond the draft's context the target goes on alone."""
    for context_length in range(2, 30):
        engine = make_engine(TARGET, TARGET, draft_context_length=context_length)
        assert run(engine, PROMPT, num_draft_tokens=4) == plain()


def test_one_token_is_not_drafted_for():
    """With max_new_tokens=1 the draft has nothing to do, not even to read the prompt."""
    engine = make_engine(TARGET, TARGET)
    metrics = Metrics()
    assert run(engine, PROMPT, metrics=metrics, max_new_tokens=1, num_draft_tokens=8) == plain(max_new_tokens=1)
    assert (metrics.target_forwards, metrics.proposed_tokens) == (0, 0)
    assert engine.drafter.model.num_forwards == 0


def test_perfect_draft_is_accepted_entirely():
    metrics = Metrics()
    run(make_engine(TARGET, TARGET), PROMPT, metrics=metrics, max_new_tokens=46, num_draft_tokens=4)
    assert metrics.acceptance_rate == 1.0
    assert metrics.block_efficiency == 5.0
    assert (metrics.new_tokens, metrics.target_forwards) == (46, 9)


def test_no_draft_costs_nothing():
    """Plain decoding is one target forward a token, with the draft not touched."""
    engine = make_engine(TARGET, TARGET)
    run(engine, PROMPT, num_draft_tokens=0, max_new_tokens=20, lookup=True)
    assert engine.target.num_forwards == 20
    assert engine.drafter.model.num_forwards == 0


def test_drafted_tokens_are_marked():
    """Interfaces colour them."""
    config = GenerationConfig(max_new_tokens=11, num_draft_tokens=4)
    marks = [token.is_drafted for token in generate(make_engine(TARGET, TARGET), PROMPT, config)]
    assert marks == [False, *([True] * 4 + [False]) * 2]


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_logprobs_belong_to_their_token(num_draft_tokens):
    """Under speculation the rows of a whole block are read; the fake's rows become NaN at its next forward."""
    from scipy.special import log_softmax

    engine = make_engine(TARGET, DRAFTS["half right"])
    config = GenerationConfig(max_new_tokens=30, num_draft_tokens=num_draft_tokens, logprobs=3, repetition_penalty=1.3)
    ids = [*PROMPT]
    for token in generate(engine, PROMPT, config):
        row = log_softmax(TARGET[ids[-2], ids[-1]].astype(np.float64))
        assert token.logprob == pytest.approx(row[token.token_id])
        assert [value for _, value in token.top_logprobs] == pytest.approx(np.sort(row)[::-1][:3])
        ids.append(token.token_id)


def test_prompt_is_refused_where_no_answer_fits():
    engine = make_engine(TARGET, context_length=10)
    with pytest.raises(ConfigError, match="prompt is empty"):
        run(engine, [])
    with pytest.raises(ContextOverflowError, match="the prompt has 10 tokens, but the model's context holds 10"):
        run(engine, [1] * 10)
    assert len(run(engine, [1] * 9, max_new_tokens=5)) == 1


def test_failing_forward_leaves_the_engine_usable():
    """A device error in the middle of a request must not leave tokens counted that were never computed."""
    engine = make_engine(TARGET, DRAFTS["half right"])
    for failing_at in range(1, 12):
        calls = iter(range(1, 1000))

        def fail(token_ids: list[int], calls=calls, failing_at=failing_at) -> None:
            if next(calls) == failing_at:
                raise RuntimeError("device lost")

        engine.target.on_forward = fail
        with pytest.raises(RuntimeError, match="device lost"):
            run(engine, [*PROMPT, failing_at], num_draft_tokens=2)
        engine.target.on_forward = lambda token_ids: None
        assert run(engine, PROMPT, num_draft_tokens=2) == plain()


def table_with_bad_row(after: list[int], value: float = np.nan) -> np.ndarray:
    """Return the target's table with one row that gives no token: that after the last two of `after`."""
    table = TARGET.copy()
    table[after[-2], after[-1]] = value
    return table


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("draft", [None, "target itself", "half right", "random"])
def test_tokens_before_bad_logits_come_and_none_after(draft, value):
    """Whatever is drafted; a block that meets the bad row in its middle ends before it."""
    for options in ({}, {"temperature": 1.0, "seed": 3}, {"logprobs": 2}, {"lookup": True}):
        text = plain(max_new_tokens=60, **options)
        pairs = list(pairwise(text))
        at = next(i for i in range(7, 60) if pairs.index(pairs[i]) == i)
        table = table_with_bad_row(text[: at + 2], value)
        for num_draft_tokens in (1, 3, 8, "auto") if draft else (0,):
            engine = make_engine(table, None if draft is None else DRAFTS[draft])
            config = GenerationConfig(max_new_tokens=60, num_draft_tokens=num_draft_tokens, **options)
            stream = generate(engine, PROMPT, config)
            made = [next(stream).token_id for _ in range(at + 2)]
            assert made == text[: at + 2]
            with pytest.raises(LogitsError, match="the model's largest logit is"):
                next(stream)


@pytest.mark.parametrize("num_draft_tokens", [0, 4])
def test_request_after_bad_logits_reads_its_prompt_again(num_draft_tokens):
    """Keys and values of tokens that it shares may be NaN."""
    text = plain(max_new_tokens=20)
    engine = make_engine(table_with_bad_row(text[:9]), DRAFTS["half right"])
    with pytest.raises(LogitsError):
        run(engine, PROMPT, num_draft_tokens=num_draft_tokens)
    metrics = Metrics()
    assert run(engine, [*PROMPT, text[0]], metrics=metrics, max_new_tokens=5) == text[1:6]
    assert metrics.reused_tokens == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "seed": 1}])
def test_forbidding_every_token_is_an_error_before_the_first(options):
    """Sampling emitted the id after the last one, and greedy decoding a forbidden one."""
    engine = make_engine(TARGET, DRAFTS["half right"])
    with pytest.raises(LogitsError, match="the options forbid every token"):
        run(engine, PROMPT, logit_bias=dict.fromkeys(range(V), float("-inf")), **options)
    assert run(engine, PROMPT) == plain()


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("num_draft_tokens", [1, 4, "auto"])
def test_bad_logits_of_a_draft_cost_speed_only(num_draft_tokens, lookup, caplog):
    """The answer is the target's, and the next request drafts again, on caches that hold no NaN."""
    draft = DRAFTS["half right"].copy()
    text = plain()
    draft[text[5], text[6]] = np.nan
    engine = make_engine(TARGET, draft)
    options = {"num_draft_tokens": num_draft_tokens, "lookup": lookup}
    assert run(engine, PROMPT, max_new_tokens=60, **options) == plain(max_new_tokens=60)
    if num_draft_tokens != "auto":
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "the draft model is not used for the rest of this answer" in caplog.text
        metrics = Metrics()
        run(engine, [7, 7, 2], metrics=metrics, **options)
        assert metrics.proposed_tokens > 0
    for seed in range(10):
        request = {"temperature": 1.0, "seed": seed}
        assert run(engine, PROMPT, **request, **options) == plain(**request)


def test_draft_whose_vocabulary_is_forbidden_proposes_nothing():
    """A narrower draft has none of the tokens that the options leave to the target."""
    engine = make_engine(TARGET, DRAFTS["narrower"])
    options = {"logit_bias": dict.fromkeys(range(V - 3), float("-inf")), "temperature": 1.0, "seed": 2}
    assert run(engine, PROMPT, num_draft_tokens=4, **options) == plain(**options)


class NoRepeats:
    """A processor of a test: forbids tokens that came twice."""

    def process(self, logits, counts) -> None:
        ids, times = counts.generated(len(logits))
        logits[ids[times > 1]] = -np.inf


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_a_processor_of_ones_own_is_obeyed_by_target_and_draft_alike(num_draft_tokens, options):
    made = {}
    for length in (0, num_draft_tokens):
        engine = make_engine(TARGET, DRAFTS["half right"])
        config = GenerationConfig(max_new_tokens=30, num_draft_tokens=length, **options)
        request, reader = start(engine, PROMPT, config)
        request.sampler.processors.append(NoRepeats())
        while request.finish_reason is None:
            engine.step([request])
        made[length] = [token.token_id for token in reader]
    assert made[0] == made[num_draft_tokens]
    assert max(made[0].count(token_id) for token_id in made[0]) == 2
