"""Step counts from a request's counters, and the prediction made of step costs."""

from random import Random

import pytest

from edge_runtime.bench.steps import FixedText, median_step, predicted_speedup, run_step, step_counts
from edge_runtime.bench.variants import RandomDraft
from edge_runtime.config import GenerationConfig
from edge_runtime.decoding.drafters.lookup import PromptLookup
from edge_runtime.decoding.sampling import Sampler
from edge_runtime.metrics import Metrics
from edge_runtime.models.base import catch_up
from tests.runtime.fakes import make_engine, random_table, run

TARGET = random_table(24, 1)
COSTS = {0: 10.0, 3: 14.0}


def counted(*blocks: tuple[int, int]) -> Metrics:
    metrics = Metrics()
    for proposed, accepted in blocks:
        metrics.count_block(proposed, accepted)
    return metrics


def test_steps_are_counted_by_drafted_tokens():
    requests = [counted((3, 3), (3, 0), (0, 0), (1, 1)), counted((5, 2)), Metrics()]
    assert step_counts(requests) == {3: 2, 0: 1, 1: 1, 5: 1}


def test_steps_of_a_request_are_its_forwards():
    metrics = Metrics()
    run(make_engine(TARGET, TARGET), [1, 2], metrics=metrics, max_new_tokens=12, num_draft_tokens=3)
    assert step_counts([metrics]) == {3: 2, 2: 1}  # 1 + 4 + 4 + 3: the last block is cut to what is left


def test_steps_of_one_length_give_the_published_formula():
    """BE * t(1) / (d + t(K + 1))."""
    assert predicted_speedup(25, {3: 10}, COSTS) == pytest.approx(2.5 * 10 / 14)


def test_plain_steps_predict_one():
    assert predicted_speedup(7, {0: 7}, COSTS) == 1


def test_missing_cost_predicts_nothing():
    assert predicted_speedup(5, {2: 5}, COSTS) is None
    assert predicted_speedup(5, {3: 5}, {3: 14.0}) is None
    assert predicted_speedup(0, {}, COSTS) is None


@pytest.mark.parametrize("drafter", [None, RandomDraft(24), PromptLookup()])
def test_step_can_be_repeated(drafter):
    """Each one starts from the same text; where lookup finds nothing, as many tokens are verified all the same."""
    target = make_engine(TARGET).target
    ids, length = [1, 2, 3, 4], 3 if drafter else 0
    widths = []
    target.on_forward = lambda token_ids: widths.append(len(token_ids))
    sequence, draft = target.sequence(), drafter and drafter.open(FixedText(ids))
    catch_up(target, sequence, ids)
    sampler = Sampler(GenerationConfig(), ids, Random(0))
    steps = [run_step(target, sequence, draft, ids, length, sampler) for _ in range(4)]
    assert widths == [4, *[1 + length] * 4]
    assert sequence.token_ids[:4] == ids
    assert median_step(steps).target_s > 0
