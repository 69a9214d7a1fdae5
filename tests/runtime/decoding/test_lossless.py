"""Speculative sampling emits what plain sampling would: distributions of whole requests, counted and compared.

The exact proofs for single blocks are in `test_speculative.py`; here the engine runs, with its caches, its history and
its own random generator. Expected counts are exact: they come from the tables of the fake models, not from sampling.

There are two couplings of draft and target: the maximal one without a seed, and that by shared noise with one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count as counter
from itertools import islice
from random import Random
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
from scipy.stats import chisquare

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding import sampling, speculative
from edge_runtime.decoding.engine import Engine
from edge_runtime.decoding.sampling import Categorical, Sampler, filtered_distribution
from edge_runtime.metrics import Metrics
from tests.runtime.fakes import blended_table, generate, make_engine, random_table, run

V = 16
TARGET = random_table(V, 1, spread=1.5)
DRAFT = blended_table(TARGET, random_table(V, 2, spread=1.5), 0.5)
PROMPT = [3, 1]
LENGTH = 3
"""Tokens of an answer: the first comes from the prompt's forward, the others from drafted blocks."""
SIGNIFICANCE = 0.01
"""p-value under which a distribution counts as wrong. Seeds are fixed, so a pass is a pass for good."""
MIN_EXPECTED = 5
"""Rarer prefixes are pooled: the chi-square distribution is an approximation for large counts."""

Prefixes = dict[tuple[int, ...], float]


def plain_distribution(length: int = LENGTH, target: np.ndarray = TARGET, **options: Any) -> Prefixes:
    """Return the exact probability of every answer of `length` tokens under plain sampling."""
    config = GenerationConfig(**options)
    wanted: Prefixes = {(): 1.0}
    for _ in range(length):
        grown: Prefixes = {}
        for prefix, chance in wanted.items():
            ids = [*PROMPT, *prefix]
            sampler = Sampler(config, PROMPT, np.random.default_rng(0))
            for token_id in prefix:
                sampler.push(token_id)
            next_token = sampler.distribution(target[ids[-2], ids[-1]])
            for token_id in range(V):
                if probability := next_token.probability(token_id):
                    grown[(*prefix, token_id)] = chance * probability
        wanted = grown
    return wanted


Coupling = Literal["maximal", "seeded"]


@contextmanager
def fixed_sources() -> Iterator[None]:
    """Let each request without a seed draw from the next of a fixed row of sources."""
    sources = (Random(f"seed {number}") for number in counter())
    with mock.patch.object(sampling, "Random", lambda seed: next(sources)):
        yield


def drawn(
    engine: Engine,
    count: int,
    metrics: Metrics | None = None,
    prompt: list[int] = PROMPT,
    coupling: Coupling = "maximal",
    **options: Any,
) -> Counter[tuple[int, ...]]:
    """Return how often each answer of LENGTH tokens came; the request would go on, so blocks are not cut short."""
    counted: Counter[tuple[int, ...]] = Counter()
    with fixed_sources():
        for number in range(count):
            seed = number if coupling == "seeded" else None
            config = GenerationConfig(**options, seed=seed, max_new_tokens=LENGTH + 8)
            stream = generate(engine, prompt, config, (), metrics)
            counted[tuple(token.token_id for token in islice(stream, LENGTH))] += 1
    return counted


@pytest.fixture
def each_row_once(monkeypatch):
    """Filter each row of the tables once: without penalties its distribution depends on nothing else."""
    made: dict[tuple[bytes, float, float], Categorical] = {}

    def remembered(logits: np.ndarray, config: GenerationConfig) -> Categorical:
        key = logits.tobytes(), config.temperature, config.top_p
        if key not in made:
            made[key] = filtered_distribution(logits, config)
        return made[key]

    monkeypatch.setattr(sampling, "filtered_distribution", remembered)


def p_value(counted: Counter[tuple[int, ...]], wanted: Prefixes) -> float:
    """Return the chi-square p-value; 0 where something impossible came."""
    if set(counted) - set(wanted):
        return 0.0
    total = counted.total()
    expected = np.array([total * chance for chance in wanted.values()])
    observed = np.array([counted[prefix] for prefix in wanted], float)
    rare = expected < MIN_EXPECTED
    if rare.any():
        expected = np.append(expected[~rare], expected[rare].sum())
        observed = np.append(observed[~rare], observed[rare].sum())
    return float(chisquare(observed, expected * total / expected.sum()).pvalue)


def prefixes(counted: dict[tuple[int, ...], Any], length: int) -> Counter[tuple[int, ...]]:
    """Return the counts, or probabilities, of the first `length` tokens."""
    shorter: Counter[tuple[int, ...]] = Counter()
    for prefix, count in counted.items():
        shorter[prefix[:length]] += count
    return shorter


def smallest_p(counted: Counter[tuple[int, ...]], wanted: Prefixes) -> float:
    """Return the smallest p-value of the first one, two and three tokens, jointly."""
    return min(p_value(prefixes(counted, n), dict(prefixes(wanted, n))) for n in range(1, LENGTH + 1))


def assert_same_distribution(engine: Engine, wanted: Prefixes, count: int, **options: Any) -> None:
    """Draw and compare the first one, two and three tokens, jointly."""
    assert smallest_p(drawn(engine, count, **options), wanted) > SIGNIFICANCE


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 3, 4])
def test_speculative_sampling_has_the_targets_distribution(temperature, num_draft_tokens, each_row_once):
    """200 000 samples in all. openvino.genai's second token is off by a total variation of 0.4 to 0.9, if it comes."""
    options = {"temperature": temperature, "top_p": 0.9}
    metrics = Metrics()
    engine, wanted = make_engine(TARGET, DRAFT), plain_distribution(**options)
    assert_same_distribution(engine, wanted, 25_000, metrics=metrics, num_draft_tokens=num_draft_tokens, **options)
    assert all(0.02 < kept / metrics.target_forwards < 0.9 for kept in metrics.accepted_by_position)


HOSTILE = {
    "unrelated": random_table(V, 3, spread=1.5),
    "target itself": TARGET,
    "certain of one token": np.where(np.arange(V) == 5, np.float32(20), np.zeros_like(TARGET)),
    "misses the likeliest token": np.where(TARGET.max(-1, keepdims=True) == TARGET, np.float32(-30), TARGET),
    "disjoint": np.where(np.arange(V) % 2, np.float32(-30), TARGET),
    "narrower": DRAFT[:-2, :-2, :-2],
    "wider": np.pad(DRAFT, ((0, 3), (0, 3), (0, 3)), constant_values=5.0),
}


@pytest.mark.parametrize("draft", HOSTILE)
def test_any_draft_is_lossless(draft, each_row_once):
    """What the draft is like decides the speed only. The even tokens have no mass for a `disjoint` target."""
    target = np.where(np.arange(V) % 2, TARGET, np.float32(-np.inf)) if draft == "disjoint" else TARGET
    metrics = Metrics()
    engine, options = make_engine(target, HOSTILE[draft]), {"temperature": 1.0, "top_p": 0.95}
    wanted = plain_distribution(target=target, **options)
    assert_same_distribution(engine, wanted, 5000, metrics=metrics, num_draft_tokens=2, **options)
    rate, extreme = metrics.acceptance_rate, {"target itself": 1.0, "disjoint": 0.0}
    assert rate == extreme[draft] if draft in extreme else 0 < rate < 1


FILTERS = {
    "pure": {"temperature": 1.0},
    "top-k": {"temperature": 0.8, "top_k": 4},
    "min-p": {"temperature": 1.3, "min_p": 0.1},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0, 5: float("-inf")}},
    "repetition penalty": {"temperature": 0.8, "repetition_penalty": 1.8},
    "presence and frequency": {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.8},
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_every_filter_and_penalty_is_lossless(options):
    """Penalties make the target's distribution depend on the whole answer, drafted tokens included."""
    engine, wanted = make_engine(TARGET, DRAFT), plain_distribution(**options)
    assert_same_distribution(engine, wanted, 4000, num_draft_tokens=3, **options)


@pytest.mark.parametrize("name", ["pure", "top-k", "presence and frequency"])
def test_seeded_sampling_is_lossless(name):
    """Over all seeds, through drafted blocks: neighbouring seeds and positions must be independent of each other."""
    engine, wanted = make_engine(TARGET, DRAFT), plain_distribution(**FILTERS[name])
    assert_same_distribution(engine, wanted, 2000, coupling="seeded", num_draft_tokens=3, **FILTERS[name])


@pytest.mark.parametrize("with_draft", [False, True])
def test_prompt_lookup_is_lossless(with_draft, each_row_once):
    """Copied tokens were not drawn, and are accepted with the target's own probability."""
    engine = make_engine(TARGET, DRAFT if with_draft else None)
    metrics = Metrics()
    options = {"temperature": 1.0, "top_p": 0.95}
    likely = max((chance, answer) for answer, chance in plain_distribution(**options).items())[1]
    prompt = [*PROMPT, *likely, *PROMPT]
    copying = {"prompt": prompt, "num_draft_tokens": 3, "lookup": True, **options}
    assert_same_distribution(engine, plain_distribution(**options), 5000, metrics=metrics, **copying)
    assert metrics.accepted_tokens > 500


def test_length_chosen_by_cost_is_lossless(each_row_once):
    """`auto` looks at the past only, so its choice cannot favour a token."""
    options = {"temperature": 1.0, "top_p": 0.9}
    assert_same_distribution(make_engine(TARGET, DRAFT), plain_distribution(**options), 5000, **options)


@pytest.mark.parametrize("coupling", ["maximal", "seeded"])
def test_acceptance_is_what_the_coupling_promises(coupling, each_row_once):
    """Leviathan et al. 2023, theorem 3.5: the sum of min(p, q). Of two races with the same noise, token i wins both

    with probability 1 / sum over j of max(p_j / p_i, q_j / q_i): nowhere below (1 - d) / (1 + d) for a distance of d.
    """
    options = {"temperature": 1.0, "top_p": 0.9}
    sampler = Sampler(GenerationConfig(**options), PROMPT, np.random.default_rng(0))
    wanted, least = 0.0, 0.0
    for (first,), chance in plain_distribution(1, **options).items():
        made = [sampler.distribution(table[PROMPT[-1], first]) for table in (TARGET, DRAFT)]
        p, q = (np.array([each.probability(i) for i in range(V)]) for each in made)
        shared = np.minimum(p, q).sum()
        both = sum(1 / np.maximum(p / p[i], q / q[i]).sum() for i in range(V) if p[i] and q[i])
        wanted += chance * (both if coupling == "seeded" else shared)
        least += chance * shared / (2 - shared)
    engine, kept, count = make_engine(TARGET, DRAFT), 0, 5000
    with fixed_sources():
        for number in range(count):
            seed = number if coupling == "seeded" else None
            config = GenerationConfig(**options, seed=seed, num_draft_tokens=1)
            stream = generate(engine, PROMPT, config)
            next(stream)
            kept += next(stream).is_drafted
    assert abs(kept / count - wanted) < 3 * np.sqrt(wanted * (1 - wanted) / count)
    assert wanted > least


WRONG_RULES = {
    "inverted ratio": ("accepts", lambda x, p, q, random: random.random() * p.probability(x) < q.probability(x)),
    "always": ("accepts", lambda x, p, q, random: True),
    "half": ("accepts", lambda x, p, q, random: p.probability(x) * 2 >= q.probability(x)),
}


@pytest.mark.parametrize("rule", WRONG_RULES)
def test_a_wrong_rule_would_be_noticed(rule, monkeypatch, each_row_once):
    """The comparison has the power to tell: openvino.genai's inverted ratio among them."""
    monkeypatch.setattr(speculative, *WRONG_RULES[rule])
    counted = drawn(make_engine(TARGET, DRAFT), 4000, num_draft_tokens=2, temperature=1.0, top_p=0.9)
    wanted = plain_distribution(temperature=1.0, top_p=0.9)
    assert p_value(prefixes(counted, 1), dict(prefixes(wanted, 1))) > SIGNIFICANCE
    assert p_value(prefixes(counted, 2), dict(prefixes(wanted, 2))) < 1e-9


def test_resampling_from_the_target_after_a_rejection_would_be_noticed(monkeypatch, each_row_once):
    """Without the residual, tokens that the draft likes come too often."""
    monkeypatch.setattr(Categorical, "residual", lambda self, other: self)
    counted = drawn(make_engine(TARGET, DRAFT), 4000, num_draft_tokens=2, temperature=1.0, top_p=0.9)
    wanted = plain_distribution(temperature=1.0, top_p=0.9)
    assert p_value(prefixes(counted, 2), dict(prefixes(wanted, 2))) < 1e-9


DRAFTERS = {
    "half right": (DRAFT, {}),
    "unrelated": (HOSTILE["unrelated"], {}),
    "narrower": (HOSTILE["narrower"], {}),
    "wider": (HOSTILE["wider"], {}),
    "lookup": (None, {"lookup": True}),
    "lookup and draft": (DRAFT, {"lookup": True}),
}


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_seeded_text_is_the_same_whatever_is_drafted(drafter, options):
    """Pacing looks at the clock: where drafting consumed random numbers, six runs of one seed gave four answers."""
    draft, drafting = DRAFTERS[drafter]
    engine, plain = make_engine(TARGET, draft), make_engine(TARGET)
    prompt = [*PROMPT, 7, 2, *PROMPT, 7]
    for seed in range(4):
        wanted = run(plain, prompt, seed=seed, num_draft_tokens=0, **options)
        for num_draft_tokens in (1, 3, 8, "auto"):
            request = {"seed": seed, "num_draft_tokens": num_draft_tokens, **drafting, **options}
            assert run(engine, prompt, **request) == wanted


def test_seeded_text_is_the_same_where_streams_take_turns():
    """A request that goes on after another used the models reads its sequence again, at the same positions."""
    engine = make_engine(TARGET, DRAFT)
    configs = [GenerationConfig(temperature=1.0, seed=s, num_draft_tokens=3, max_new_tokens=30) for s in (1, 2)]
    wanted = [[token.token_id for token in generate(engine, PROMPT, config)] for config in configs]
    streams = [generate(engine, PROMPT, config) for config in configs]
    made = [(first.token_id, second.token_id) for first, second in zip(*streams, strict=True)]
    assert [list(ids) for ids in zip(*made, strict=True)] == wanted


def test_position_counts_from_the_start_of_the_sequence():
    """A continued answer goes on as if it had not been interrupted, and a chat's turns do not share their noise."""
    whole = run(make_engine(TARGET, DRAFT), PROMPT, seed=4, temperature=1.0)
    for taken in (1, 7, 20):
        rest = run(make_engine(TARGET, DRAFT), [*PROMPT, *whole[:taken]], seed=4, temperature=1.0)
        assert rest[: 40 - taken] == whole[taken:]


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_same_seed_same_answer(num_draft_tokens):
    """Also on an engine that has answered other requests before."""
    engine, other = make_engine(TARGET, DRAFT), make_engine(TARGET, DRAFT)
    options = {"temperature": 1.0, "num_draft_tokens": num_draft_tokens}
    for seed in range(20):
        assert run(engine, PROMPT, seed=seed, **options) == run(other, PROMPT, seed=seed, **options)
        run(other, [1, 2, 3], seed=seed + 1, **options)


def test_other_seeds_and_no_seed_give_other_answers():
    engine = make_engine(TARGET, DRAFT)
    answers = [tuple(run(engine, PROMPT, seed=seed, temperature=1.0)) for seed in (*range(20), *[None] * 20)]
    assert len(set(answers)) == 40
