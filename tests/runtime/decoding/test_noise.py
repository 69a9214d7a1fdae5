"""The random numbers of a seed are fixed for good, uniform, and independent across seeds, positions and tokens."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from edge_runtime.decoding.noise import CHUNK, UNIT, Noise, mixed

SIGNIFICANCE = 0.01
"""p-value under which numbers count as not random. Seeds are fixed, so a pass is a pass for good."""


def test_generator_is_splitmix64():
    """The first outputs of its seed 0, as published with java.util.SplittableRandom's C version, to 53 bits."""
    start = np.uint64(0x9E3779B97F4A7C15)
    wanted = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(np.arange(3, dtype=np.uint64), start).tolist() == [bits >> 11 | 1 for bits in wanted]


def test_numbers_never_change():
    """A seed is written down to see the same answer again, on another machine and with another version of numpy."""
    made = Noise(7).uniforms(12, np.array([0, 1, 49_151]))
    assert made.tolist() == [0.7417724206688138, 0.1619806059117629, 0.3689926741862689]


def test_number_of_a_token_depends_on_no_other_token():
    """A draft's row may be narrower or wider than the target's, and the filters keep different tokens of both."""
    whole = Noise(3).uniforms(5, np.arange(3 * CHUNK + 7))
    for ids in (np.arange(10), np.array([2, 3, CHUNK - 1, CHUNK, 2 * CHUNK + 1]), np.arange(CHUNK + 1)):
        np.testing.assert_array_equal(Noise(3).uniforms(5, ids), whole[ids])


def test_numbers_lie_between_zero_and_one():
    """The logarithm of 0 is infinite: a token without mass could win."""
    least, most = (mixed(np.zeros(1, np.uint64), np.uint64(start))[0] for start in (0, 0xCF9A04AFFA6BADC0))
    assert (int(least), int(most)) == (1, 2**53 - 1)
    assert 0 < least * UNIT < most * UNIT < 1


@pytest.mark.parametrize("along", ["seeds", "positions", "tokens"])
def test_numbers_are_uniform_along_neighbours(along):
    made = numbers(along, 20_000)
    assert kstest(made, "uniform").pvalue > SIGNIFICANCE


@pytest.mark.parametrize("along", ["seeds", "positions", "tokens"])
def test_neighbours_are_independent(along):
    """A generator that a number seeds directly gives neighbouring seeds answers that are not quite independent."""
    made = (numbers(along, 20_000) * 16).astype(int)
    for lag in (1, 2, 7):
        pairs = np.bincount(made[:-lag] * 16 + made[lag:], minlength=256)
        assert chisquare(pairs).pvalue > SIGNIFICANCE


def numbers(along: str, count: int) -> np.ndarray:
    """Return the numbers of `count` neighbouring seeds, positions or tokens."""
    if along == "tokens":
        return Noise(1).uniforms(1, np.arange(count))
    ids, noise = np.array([17]), Noise(5)
    if along == "positions":
        return np.concatenate([noise.uniforms(position, ids) for position in range(count)])
    return np.concatenate([Noise(seed).uniforms(9, ids) for seed in range(count)])


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1e-3, 1, 0, 1e-2], [5, 5, 0, 0]], ids=str)
def test_winners_have_the_weights_frequencies(weights):
    """Also where most of the weight is one token's, and never where there is none."""
    noise, ids = Noise(2), np.array([3, 4, 900, 40_000])
    drawn = [noise.winner(position, ids, np.array(weights, np.float32)) for position in range(20_000)]
    counted = np.array([drawn.count(token_id) for token_id in ids])
    expected = 20_000 * np.array(weights) / sum(weights)
    assert not counted[expected == 0].any()
    assert chisquare(counted[expected > 0], expected[expected > 0]).pvalue > SIGNIFICANCE


def test_winner_is_that_of_all_scores():
    """Logarithms are taken of few tokens only: the shortcut must find the same winner."""
    random = np.random.default_rng(0)
    for position in range(300):
        weights = np.exp(random.uniform(0.1, 20) * random.standard_normal(400)).astype(np.float32)
        weights /= weights.max()
        noise = Noise(6)
        scores = weights / -np.log1p(-noise.uniforms(position, np.arange(400)))
        assert noise.winner(position, None, weights) == scores.argmax()


def test_tokens_without_weight_never_win():
    """Whatever their numbers are, also beside a weight at the end of float32."""
    weights = np.zeros(1000, np.float32)
    weights[[17, 400]] = 1.0, 1e-45
    assert {Noise(seed).winner(0, None, weights) for seed in range(500)} == {17}


@pytest.mark.parametrize("seed", [0, 2**64, 10**5000, np.int64(3)], ids=["0", "2**64", "10**5000", "numpy"])
def test_every_seed_has_numbers_of_its_own(seed):
    assert Noise(seed).uniforms(0, np.array([0])) != Noise(int(seed) + 1).uniforms(0, np.array([0]))
