"""The baselines: a random draft keeps the target's distribution, and knows nothing."""

from fractions import Fraction

import numpy as np

from edge_runtime.bench.variants import RandomDraft, make_variants
from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.decoding.speculative import verify
from tests.runtime.fakes import exact_distribution, make_engine, make_llm, random_table, run

WEIGHTS = (1, 4, 2, 1)
"""Eighths; against a uniform draft the acceptance is 1/2, 1, 1, 1/2, and one token replaces what is rejected."""


def test_random_draft_is_lossless_when_sampling():
    """With another distribution than the one it draws from, what is emitted would not be the target's."""

    def experiment(random):
        sampler = Sampler(GenerationConfig(temperature=1.0), [0], random)
        proposal = RandomDraft(4).propose(1, sampler)
        rows = np.log(np.array([WEIGHTS, WEIGHTS], np.float32))
        return tuple(verify(rows, proposal, sampler).token_ids[:1])

    wanted = {(token_id,): Fraction(weight, 8) for token_id, weight in enumerate(WEIGHTS)}
    assert exact_distribution(experiment, 8) == wanted


def test_random_draft_equals_greedy():
    target = make_engine(random_table(24, 1)).target
    plain = run(Engine(target), [1, 2, 3], num_draft_tokens=0)
    assert run(Engine(target, RandomDraft(24)), [1, 2, 3], num_draft_tokens=4, seed=1) == plain


def test_every_drafter_has_every_length(tmp_path):
    table = random_table(24, 1)
    variants = make_variants(make_llm(tmp_path, make_engine(table, table)), [1, 5])
    assert [(v.drafter, v.num_draft_tokens) for v in variants] == [
        ("plain", 0),
        ("draft", 1),
        ("draft", 5),
        ("draft", "auto"),
        ("lookup", 1),
        ("lookup", 5),
        ("random", 1),
        ("random", 5),
    ]
    assert {id(v.llm.target) for v in variants} == {id(variants[0].llm.target)}


def test_without_a_draft_the_baselines_are_left(tmp_path):
    variants = make_variants(make_llm(tmp_path, make_engine(random_table(24, 1))), [2])
    assert [v.drafter for v in variants] == ["plain", "lookup", "random"]
