"""Whose tokens go into the next step: everybody's, a long prompt in chunks, and nobody waits for who does not read."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding import scheduler as scheduling
from edge_runtime.decoding.engine import PROMPT_TOKENS_BESIDE_ANSWERS, Engine
from edge_runtime.decoding.request import Request, Token
from edge_runtime.decoding.scheduler import Scheduler
from tests.runtime.fakes import TokenList, blended_table, make_engine, random_table, run

V = 24
TARGET = random_table(V, 1)
DRAFT = blended_table(TARGET, random_table(V, 2), 0.4)


class PausedReader(TokenList):
    """Wants as many tokens as a test says."""

    wanted = fails_at = 1 << 30

    def take(self, token: Token) -> bool:
        """Keep it, or fail."""
        if len(self) >= self.fails_at:
            raise ZeroDivisionError
        return super().take(token)

    @property
    def wants_more(self) -> bool:
        return len(self) < self.wanted


class Stepped(Scheduler):
    """A scheduler that a test steps: no thread of its own."""

    def go_on(self) -> None:
        """Wait for the test."""

    def step(self, count: int = 1) -> bool:
        """Take steps; return whether there was something to do in the last one."""
        return [self._step() for _ in range(count)][-1]

    def finish(self) -> None:
        """Step until nothing is left."""
        while self._step():
            pass


def request(engine: Engine, prompt: list[int], stop: tuple[int, ...] = (), **options: Any) -> Request:
    config = GenerationConfig(**{"max_new_tokens": 40, "num_draft_tokens": 0, **options})
    return Request(prompt, config, engine.target.context_length, PausedReader(), stop)


def ids(made: Request) -> list[int]:
    """Return what a request has emitted."""
    return [token.token_id for token in made.reader]


def alone(prompt: list[int], **options: Any) -> list[int]:
    return run(make_engine(TARGET), prompt, num_draft_tokens=0, **options)


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, length).tolist()


def submitted(engine: Engine, count: int, **options: Any) -> tuple[Stepped, list[Request]]:
    scheduler = Stepped(engine)
    requests = [request(engine, text(number, 5), **options) for number in range(count)]
    scheduler.submit(requests)
    return scheduler, requests


def test_live_requests_share_every_forward():
    engine = make_engine(TARGET)
    scheduler, requests = submitted(engine, 8, max_new_tokens=10)
    scheduler.finish()
    assert (engine.target.num_forwards, engine.target.most_spans) == (10, 8)
    assert [ids(made) for made in requests] == [alone(text(n, 5), max_new_tokens=10) for n in range(8)]


def test_no_more_take_part_than_the_model_takes_and_the_first_come_first():
    engine = make_engine(TARGET, max_sequences=3)
    scheduler, requests = submitted(engine, 8, max_new_tokens=6)
    ended: list[int] = []
    while scheduler.step():
        ended += [n for n, made in enumerate(requests) if made.finish_reason and n not in ended]
    assert engine.target.most_spans == 3
    assert ended == list(range(8))


def test_a_request_that_comes_in_the_middle_takes_part_at_once():
    engine = make_engine(TARGET)
    scheduler, (first,) = submitted(engine, 1)
    scheduler.step(10)
    second = request(engine, text(9, 4))
    scheduler.submit([second])
    scheduler.step(1)
    assert (len(ids(first)), len(ids(second))) == (11, 1)
    scheduler.finish()
    assert ids(second) == alone(text(9, 4))


def test_a_long_prompt_is_read_beside_answers_that_lose_no_step():
    engine = make_engine(TARGET, context_length=4096)
    scheduler, answers = submitted(engine, 3, max_new_tokens=100)
    scheduler.step(5)
    newcomer = request(engine, text(7, 1000), max_new_tokens=3)
    scheduler.submit([newcomer])
    steps = -(-1000 // PROMPT_TOKENS_BESIDE_ANSWERS)
    scheduler.step(steps)
    assert [len(ids(made)) for made in answers] == [5 + steps] * 3
    assert len(ids(newcomer)) == 1
    scheduler.finish()
    assert ids(newcomer) == run(make_engine(TARGET, context_length=4096), text(7, 1000), max_new_tokens=3)


def test_a_prompt_alone_is_read_in_the_largest_chunks():
    engine = make_engine(TARGET, chunk_size=500, context_length=4096)
    scheduler = Stepped(engine)
    scheduler.submit([request(engine, text(7, 1000), max_new_tokens=1)])
    scheduler.finish()
    assert engine.target.num_forwards == 2


def test_a_short_prompt_does_not_wait_for_a_long_one():
    """They are read in turn: an answer begins after a chunk of each that came before, whatever their length."""
    engine = make_engine(TARGET, chunk_size=10, context_length=4096)
    scheduler = Stepped(engine)
    long, other = request(engine, text(1, 1000)), request(engine, text(2, 900))
    short = request(engine, text(3, 8))
    scheduler.submit([long, other])
    scheduler.step(2)
    scheduler.submit([short])
    scheduler.step(3)
    assert (len(ids(long)), len(ids(other)), len(ids(short))) == (0, 0, 1)


def test_a_reader_that_does_not_read_is_left_out_until_it_does():
    engine = make_engine(TARGET)
    scheduler, (paused, other) = submitted(engine, 2)
    paused.reader.wanted = 3
    scheduler.finish()
    assert (len(ids(paused)), len(ids(other))) == (3, 40)
    paused.reader.wanted = 100
    scheduler.finish()
    assert ids(paused) == alone(text(0, 5))


@pytest.mark.parametrize("max_sequences", [1, 2])
def test_who_does_not_read_gives_its_place_to_who_does(max_sequences):
    """And goes on from what is held of it, once it reads again."""
    engine = make_engine(TARGET, DRAFT, max_sequences=max_sequences)
    scheduler, requests = submitted(engine, 5, num_draft_tokens=2)
    for made in requests[:4]:
        made.reader.wanted = 6
    scheduler.finish()
    assert ids(requests[4]) == alone(text(4, 5))
    assert all(6 <= len(ids(made)) <= 8 for made in requests[:4])
    assert len(engine.target.open_sequences) <= max_sequences
    for made in requests:
        made.reader.wanted = 100
    before = engine.target.num_forwards
    scheduler.finish()
    assert [ids(made) for made in requests] == [alone(text(n, 5)) for n in range(5)]
    assert engine.target.num_forwards - before < 4 * 40
    assert not engine.target.open_sequences
    assert not engine.drafter.model.open_sequences


def test_a_cancelled_request_takes_part_in_no_further_step():
    engine = make_engine(TARGET)
    scheduler, requests = submitted(engine, 3)
    scheduler.step(4)
    requests[1].is_cancelled = True
    scheduler.step(1)
    assert requests[1].finish_reason == "cancelled"
    assert [len(ids(made)) for made in requests] == [5, 4, 5]
    assert len(engine.target.open_sequences) == 2


def test_one_that_waits_can_be_cancelled():
    engine = make_engine(TARGET, max_sequences=1)
    scheduler, (first, second) = submitted(engine, 2)
    scheduler.step(2)
    second.is_cancelled = True
    scheduler.step(1)
    assert (first.finish_reason, second.finish_reason) == (None, "cancelled")


def test_requests_that_begin_alike_read_it_once():
    engine = make_engine(TARGET, chunk_size=50, context_length=4096)
    scheduler, shared = Stepped(engine), text(1, 400)
    requests = [request(engine, [*shared, n, n], max_new_tokens=2) for n in range(5)]
    scheduler.submit(requests)
    read: list[int] = []
    engine.target.on_forward = lambda token_ids: read.append(len(token_ids))
    scheduler.finish()
    assert sum(read) <= 400 + 5 * (2 + 2 + scheduling.SHARED_TOKENS)
    assert [made.metrics.reused_tokens >= 400 - scheduling.SHARED_TOKENS for made in requests[1:]] == [True] * 4
    fresh = make_engine(TARGET, context_length=4096)
    assert [ids(made) for made in requests] == [run(fresh, [*shared, n, n], max_new_tokens=2) for n in range(5)]


def test_as_many_run_as_there_is_memory_for(monkeypatch):
    """One always does."""
    engine = make_engine(TARGET)
    engine.target.token_kv_bytes = 10
    monkeypatch.setattr(scheduling, "MOST_KV_BYTES", 10 * 2 * 45)
    scheduler, _ = submitted(engine, 6)
    scheduler.finish()
    assert engine.target.most_spans == 2
    monkeypatch.setattr(scheduling, "MOST_KV_BYTES", 1)
    scheduler, requests = submitted(engine, 3)
    scheduler.finish()
    assert all(made.finish_reason == "length" for made in requests)


def test_a_reader_that_fails_ends_its_own_request():
    engine = make_engine(TARGET)
    scheduler, (failing, other) = submitted(engine, 2)
    failing.reader.fails_at = 0
    scheduler.finish()
    assert (failing.finish_reason, other.finish_reason) == ("error", "length")
    assert isinstance(failing.error, ZeroDivisionError)


def mixed_options(chance: random.Random) -> dict[str, Any]:
    """Return the options of one request of a mix."""
    options: dict[str, Any] = {
        "max_new_tokens": chance.randint(1, 60),
        "num_draft_tokens": chance.choice([0, 0, 1, 3, 8, "auto"]),
        "lookup": chance.random() < 0.4,
        "logprobs": chance.choice([None, None, 2]),
    }
    if chance.random() < 0.5:
        options |= {"temperature": chance.choice([0.5, 1.0]), "seed": chance.randint(0, 99)}
        options |= {"top_k": chance.choice([0, 5]), "top_p": chance.choice([1.0, 0.9])}
    if chance.random() < 0.3:
        options |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {5: 2.0, 9: float("-inf")}}
    return options


@pytest.mark.parametrize("seed", range(50))
def test_each_request_of_a_mix_gets_what_it_gets_alone(seed):
    """Whatever others do: come later, are cancelled, do not read, fail."""
    chance = random.Random(seed)
    engine = make_engine(TARGET, DRAFT, chunk_size=chance.choice([3, 16, 512]), max_sequences=chance.choice([1, 3, 16]))
    scheduler, requests, wanted = Stepped(engine), [], []
    for _ in range(chance.randint(2, 12)):
        prompt = text(chance.randint(0, 5), chance.randint(1, 40))
        options, stop = mixed_options(chance), (chance.randrange(V),) if chance.random() < 0.3 else ()
        made = request(engine, prompt, stop, **options)
        kind = chance.choice(["whole", "whole", "whole", "cancelled", "failing", "slow"])
        plainly = {**options, "num_draft_tokens": 0, "lookup": False}
        wanted.append((kind, run(make_engine(TARGET), prompt, stop, **plainly)))
        if kind == "failing":
            made.reader.fails_at = chance.randint(0, 10)
        requests.append(made)
        scheduler.submit([made])
        for _ in range(chance.randint(0, 8)):
            scheduler.step()
            for some, (kind, _) in zip(requests, wanted, strict=True):
                if kind == "slow":
                    some.reader.wanted = chance.randint(0, 40)
                if kind == "cancelled" and chance.random() < 0.1:
                    some.is_cancelled = True
    for made in requests:
        made.reader.wanted = 1 << 30
    scheduler.finish()
    for made, (kind, answer) in zip(requests, wanted, strict=True):
        if kind in ("whole", "slow"):
            assert ids(made) == answer
            assert made.finish_reason in ("stop", "length")
        else:
            assert answer[: len(ids(made))] == ids(made)
        assert made.finish_reason
    assert not engine.target.open_sequences
    assert not engine.drafter.model.open_sequences
