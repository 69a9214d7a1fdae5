"""Filters and penalties against transformers' processors, which most users have compared with for years."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.sampling import Categorical, PointMass, Sampler, filtered_distribution, top_logprobs
from edge_runtime.errors import LogitsError

V = 50
TOLERANCE = 1e-5
"""transformers computes in float32; ours are float64 after the temperature."""
REGIMES = ("normal", "ties", "wide", "flat", "forbidden")


def make_logits(regime: str, seed: int = 0) -> np.ndarray:
    """Return (V,) logits of one kind of difficulty."""
    values = np.random.default_rng(seed).standard_normal(V).astype(np.float32)
    if regime == "ties":
        return np.round(values)
    if regime == "wide":
        return values * np.float32(1e4)
    if regime == "flat":
        return np.full(V, -3.0, np.float32)
    if regime == "forbidden":
        values[::3] = -np.inf
    return values * 3


def probabilities(logits: np.ndarray, **options) -> np.ndarray:
    """Return (V,) probabilities under our options."""
    made = filtered_distribution(logits, GenerationConfig(**{"temperature": 1.0, **options}))
    return np.array([made.probability(i) for i in range(V)])


def oracle(logits: np.ndarray, *warpers) -> np.ndarray:
    """Return (V,) probabilities after transformers' warpers."""
    import torch

    scores = torch.from_numpy(logits.copy())[None]
    for warper in warpers:
        scores = warper(torch.zeros((1, 0), dtype=torch.long), scores)
    return scores.softmax(-1)[0].numpy()


@pytest.fixture(scope="module")
def hf():
    """transformers' logits processors."""
    from edge_export.quiet import quiet

    with quiet():
        from transformers.generation import logits_process
    return logits_process


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
def test_temperature_equals_transformers(hf, regime, temperature):
    logits = make_logits(regime)
    wanted = oracle(logits, hf.TemperatureLogitsWarper(temperature))
    np.testing.assert_allclose(probabilities(logits, temperature=temperature), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("regime", ["normal", "wide", "forbidden"])
@pytest.mark.parametrize("top_k", [1, 2, 7, V, V + 1])
def test_top_k_equals_transformers(hf, regime, top_k):
    logits = make_logits(regime)
    wanted = oracle(logits, hf.TopKLogitsWarper(top_k))
    np.testing.assert_allclose(probabilities(logits, top_k=top_k), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_top_k_keeps_exactly_k_among_ties(top_k):
    """transformers keeps every token that ties with the k-th; k is what was asked for, so ours keeps k."""
    for regime in ("ties", "flat"):
        logits = make_logits(regime)
        kept = np.flatnonzero(probabilities(logits, top_k=top_k))
        np.testing.assert_array_equal(np.sort(logits[kept]), np.sort(logits)[-top_k:])


@pytest.mark.parametrize("regime", ["normal", "wide", "forbidden"])
@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(hf, regime, top_p):
    for seed in range(20):
        logits = make_logits(regime, seed)
        wanted = oracle(logits, hf.TopPLogitsWarper(top_p))
        np.testing.assert_allclose(probabilities(logits, top_p=top_p), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_is_the_smallest_set_that_reaches_the_mass(top_p):
    """With ties any of the equal tokens may stay, but not one more than needed."""
    for regime in REGIMES:
        full = probabilities(make_logits(regime))
        kept = full[probabilities(make_logits(regime), top_p=top_p) > 0]
        assert kept.sum() >= top_p - 1e-12
        assert kept.sum() - kept.min() < top_p
        assert kept.min() >= np.sort(full)[::-1][len(kept) - 1]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.3, 1.0])
def test_min_p_equals_transformers(hf, regime, min_p):
    logits = make_logits(regime)
    wanted = oracle(logits, hf.MinPLogitsWarper(min_p))
    np.testing.assert_allclose(probabilities(logits, min_p=min_p), wanted, atol=TOLERANCE)


LARGE = 5000
"""Tokens: enough for the selection by runs, with a last run that is not full."""
SHAPES = {
    "normal": lambda logits: logits,
    "peaked": lambda logits: logits * 20,
    "flat": lambda logits: logits * 0,
    "ties": np.round,
    "sorted": np.sort,
    "forbidden": lambda logits: np.where(np.arange(LARGE) % 100 < 97, np.float32(-np.inf), logits),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 50}, {"top_k": 4999}, {"top_p": 0.3}, {"top_p": 0.9}, {"top_p": 0.999999}],
    ids=str,
)
def test_filters_of_a_large_vocabulary_keep_what_sorting_would(shape, options):
    """Nothing is sorted in full: the shortcuts must find the same tokens."""
    logits = SHAPES[shape](np.random.default_rng(3).standard_normal(LARGE).astype(np.float32))
    made = filtered_distribution(logits, GenerationConfig(temperature=1.0, **options))
    full = np.sort(np.exp(logits.astype(np.float64)))[::-1]
    size = options.get("top_k") or int(np.searchsorted(np.cumsum(full), options["top_p"] * full.sum())) + 1
    kept = np.array([made.probability(i) for i in range(LARGE)])
    wanted = np.sort(full[:size] / full[:size].sum())[::-1]
    # float32 decides the last token of a nucleus, and takes what is below 1e-38 for nothing.
    assert abs(np.count_nonzero(kept > 1e-30) - np.count_nonzero(wanted > 1e-30)) <= 1
    np.testing.assert_allclose(np.sort(kept)[::-1][:size], wanted, atol=TOLERANCE)


def test_filters_compose_in_transformers_order(hf):
    """Top-p after top-k sees the renormalised distribution."""
    for seed in range(30):
        logits = make_logits("normal", seed)
        options = {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05}
        warpers = (
            hf.TemperatureLogitsWarper(1.7),
            hf.TopKLogitsWarper(12),
            hf.TopPLogitsWarper(0.8),
            hf.MinPLogitsWarper(0.05),
        )
        np.testing.assert_allclose(probabilities(logits, **options), oracle(logits, *warpers), atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e30])
def test_extreme_temperatures_give_a_distribution(temperature):
    """Dividing before the maximum is subtracted overflows to inf - inf = NaN."""
    made = probabilities(make_logits("normal"), temperature=temperature)
    assert made.sum() == pytest.approx(1)
    assert made.max() == pytest.approx(1 if temperature < 1 else 1 / V)


def test_forbidden_tokens_stay_forbidden_at_any_temperature():
    logits = make_logits("forbidden")
    for temperature in (1e-3, 1.0, 1e6):
        assert probabilities(logits, temperature=temperature)[::3].max() == 0


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty_equals_transformers(hf, penalty):
    """It sees the prompt and the answer; positive logits are divided, negative ones multiplied."""
    import torch

    prompt, answer = [3, 4, 4, 17], [9, 4, 9]
    for regime in ("normal", "ties", "forbidden"):
        logits = make_logits(regime)
        sampler = sampler_after(prompt, answer, temperature=1.0, repetition_penalty=penalty)
        processor = hf.RepetitionPenaltyLogitsProcessor(penalty)
        scores = processor(torch.tensor([prompt + answer]), torch.from_numpy(logits.copy())[None])
        wanted = scores.softmax(-1)[0].numpy()
        made = [sampler.distribution(logits).probability(i) for i in range(V)]
        np.testing.assert_allclose(made, wanted, atol=TOLERANCE)


def sampler_after(prompt: list[int], answer: list[int], **options) -> Sampler:
    """Return a sampler that has emitted `answer`."""
    sampler = Sampler(GenerationConfig(**options), prompt, np.random.default_rng(0))
    for token_id in answer:
        sampler.push(token_id)
    return sampler


def test_presence_and_frequency_penalties_count_the_answer_only():
    """logit - presence [count > 0] - frequency count, OpenAI's formula; the prompt does not count."""
    logits = make_logits("normal")
    sampler = sampler_after([1, 1, 2], [5, 6, 5, 5], temperature=1.0, presence_penalty=0.7, frequency_penalty=0.4)
    wanted = logits.astype(np.float64)
    wanted[5] -= 0.7 + 3 * 0.4
    wanted[6] -= 0.7 + 0.4
    made = sampler.distribution(logits)
    wanted = np.exp(wanted) / np.exp(wanted).sum()
    np.testing.assert_allclose([made.probability(i) for i in range(V)], wanted, atol=TOLERANCE)


def test_popped_tokens_leave_no_trace():
    """Tokens of a draft count while it is drafted, and not afterwards."""
    options = {"temperature": 1.0, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5}
    sampler = sampler_after([1, 2], [5, 6, 5, 30], **options)
    for token_id in (30, 5):
        sampler.pop(token_id)
    logits = make_logits("normal")
    plain = sampler_after([1, 2], [5, 6], **options)
    assert [sampler.distribution(logits).probability(i) for i in range(V)] == [
        plain.distribution(logits).probability(i) for i in range(V)
    ]


def test_logit_bias_is_added_and_minus_infinity_forbids():
    logits = make_logits("normal")
    best = int(logits.argmax())
    assert Sampler(GenerationConfig(logit_bias={best: float("-inf")}), [0], None).distribution(logits).token_id != best
    sampler = sampler_after([0], [], temperature=1.0, logit_bias={best: float("-inf"), 7: 2.5, 8: -1.0})
    wanted = logits.astype(np.float64)
    wanted[best] = -np.inf
    wanted[7] += 2.5
    wanted[8] -= 1
    made = sampler.distribution(logits)
    wanted = np.exp(wanted) / np.exp(wanted).sum()
    np.testing.assert_allclose([made.probability(i) for i in range(V)], wanted, atol=TOLERANCE)


def test_logits_are_not_modified():
    """They are a view of the device's output, which verification and log-probabilities read again."""
    logits = make_logits("normal")
    before = logits.copy()
    options = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 2.0, "logit_bias": {3: 1.0}}
    sampler_after([1], [2], **options).distribution(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("width", [V - 20, V, V + 20])
def test_penalties_fit_a_draft_of_another_width(width):
    """A padded draft's row may be narrower than an id that the target emitted."""
    logits = np.zeros(width, np.float32)
    options = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {V - 1: 9.0}}
    sampler = sampler_after([0, V - 1], [V - 1, 4], temperature=1.0, **options)
    made = sampler.distribution(logits)
    assert made.probability(4) == pytest.approx(made.probability(5) * np.exp(-2))


def test_greedy_is_the_most_likely_token_and_the_first_among_ties():
    logits = np.array([0, 3, 1, 3], np.float32)
    assert Sampler(GenerationConfig(), [0], None).distribution(logits).token_id == 1


def test_sample_never_picks_a_token_without_mass():
    """The largest number below 1 must not round into an empty tail, nor 0 into an empty head."""

    class Fixed:
        def __init__(self, value: float) -> None:
            self.value = value

        def random(self) -> float:
            return self.value

    weights = np.array([0, 0.1, 0, 0.2, 0.7, 0, 0])
    for scale in (1.0, 1e-300, 3.0):
        assert Categorical(None, weights * scale).sample(Fixed(0.0)) == 1
        assert Categorical(None, weights * scale).sample(Fixed(np.nextafter(1, 0))) == 4
    assert Categorical(np.array([3, 9]), np.array([0.0, 1.0])).sample(Fixed(0.0)) == 9


def test_sample_follows_the_probabilities():
    from scipy.stats import chisquare

    random = np.random.default_rng(5)
    made = Categorical(np.array([2, 3, 8, 40]), np.array([1.0, 2, 3, 4]))
    drawn = np.bincount([made.sample(random) for _ in range(20_000)], minlength=41)[[2, 3, 8, 40]]
    assert chisquare(drawn, 20_000 * np.array([1, 2, 3, 4]) / 10).pvalue > 0.01


def test_residual_pairs_tokens_by_id_not_by_place():
    """Target and draft keep different tokens after their filters."""
    p = Categorical(np.array([2, 5, 9]), np.array([0.5, 0.3, 0.2]))
    q = Categorical(np.array([1, 5, 9]), np.array([0.5, 0.1, 0.4]))
    left = p.residual(q)
    assert [left.probability(i) for i in (1, 2, 5, 9)] == pytest.approx([0, 0.5 / 0.7, 0.2 / 0.7, 0])
    left = p.residual(PointMass(5))
    assert [left.probability(i) for i in (2, 5, 9)] == pytest.approx([0.5 / 0.7, 0, 0.2 / 0.7])
    assert p.residual(PointMass(4)).probability(5) == pytest.approx(0.3)


def test_residual_of_equal_distributions_is_the_distribution():
    """Nothing is left; only rounding can bring us there, and the target's own distribution is the right answer."""
    p = Categorical(None, np.array([0.5, 0.5]))
    assert p.residual(p).probability(0) == 0.5


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("count", [0, 1, 5, V + 10])
def test_logprobs_equal_log_softmax(regime, count):
    """They are of the model's own distribution, whatever the options are."""
    from scipy.special import log_softmax

    logits = make_logits(regime)
    wanted = log_softmax(logits.astype(np.float64))
    own, top = top_logprobs(logits, 4, count)
    assert own == pytest.approx(wanted[4])
    possible = np.sort(wanted[np.isfinite(wanted)])[::-1]
    assert [value for _, value in top] == pytest.approx(possible[:count])
    assert all(wanted[token_id] == pytest.approx(value) for token_id, value in top)
    assert len({token_id for token_id, _ in top}) == min(count, len(possible))


BAD_ROWS = {
    "NaN": ([1.0, np.nan, 2.0], {}, "the model's largest logit is nan"),
    "NaN after the best": ([5.0, 1.0, np.nan], {}, "the model's largest logit is nan"),
    "all NaN": ([np.nan] * 3, {}, "the model's largest logit is nan"),
    "+inf": ([1.0, np.inf, 2.0], {}, "the model's largest logit is inf"),
    "+inf, forbidden": ([1.0, np.inf, 2.0], {"logit_bias": {1: -np.inf}}, "the model's largest logit is inf"),
    "all -inf": ([-np.inf] * 3, {}, "the model's largest logit is -inf"),
    "all forbidden": ([1.0, 2.0, 3.0], {"logit_bias": dict.fromkeys(range(3), -np.inf)}, "the options forbid every"),
    "the rest forbidden": ([-np.inf, 2.0, -np.inf], {"logit_bias": {1: -np.inf}}, "the options forbid every"),
    "overflow": ([1.0, 2.0, 3.0], {"logit_bias": {1: 1e30}, "repetition_penalty": 1e-30}, "logit_bias and penalties"),
}
WAYS = {
    "greedy": {},
    "all tokens": {"temperature": 1.0},
    "top-k": {"temperature": 1.0, "top_k": 2},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "seeded": {"temperature": 1.0, "seed": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", BAD_ROWS)
def test_no_token_is_drawn_from_bad_logits(row, way):
    """Greedy decoding emitted a forbidden id, sampling an id beyond the vocabulary, top-k raised an IndexError."""
    logits, options, message = BAD_ROWS[row]
    sampler = sampler_after([1], [], **WAYS[way], **options)
    with pytest.raises(LogitsError, match=message) as caught:
        sampler.distribution(np.array(logits, np.float32))
    assert caught.value.hint


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1e-30}, {"temperature": 1e30}, {"top_k": V + 5}, {"top_p": 1e-300}, {"min_p": 1.0},
     {"repetition_penalty": 1e30}, {"repetition_penalty": 1e-30}, {"presence_penalty": 1e30, "frequency_penalty": 1e30},
     {"presence_penalty": -1e30, "frequency_penalty": -1e30}, {"logit_bias": {1: 1e30, 2: -1e30}}],
    ids=str,
)  # fmt: skip
def test_forbidden_tokens_are_never_drawn(way, options):
    """Whatever the other options are, at their ends too: by the model's own -inf, by logit_bias, and after a draft."""
    logits = make_logits("forbidden")
    bias = {**dict.fromkeys(range(1, V - 4, 3), -np.inf), **options.get("logit_bias", {1: -np.inf})}
    forbidden = {*range(0, V, 3), *(i for i, value in bias.items() if value == -np.inf)}
    request = WAYS[way] | options | {"logit_bias": bias}
    sampler = Sampler(GenerationConfig(**request), [1, 2], np.random.default_rng(0))
    for token_id in [2, 5, 5, *[2] * 300]:
        sampler.push(token_id)
    other = filtered_distribution(np.zeros(V, np.float32), GenerationConfig(temperature=1.0))
    for _ in range(40):
        made = sampler.distribution(logits)
        drawn = [made.sample(sampler.random), made.residual(other).sample(sampler.random)]
        assert not forbidden & set(drawn)
        sampler.push(drawn[0])


def test_logprobs_name_no_impossible_token():
    """JSON has no -inf, and a token that cannot occur is not among the most likely ones."""
    own, top = top_logprobs(np.array([-np.inf, 1, -np.inf, 1], np.float32), 1, 4)
    assert own == pytest.approx(np.log(0.5))
    assert top == [(1, pytest.approx(np.log(0.5))), (3, pytest.approx(np.log(0.5)))]
