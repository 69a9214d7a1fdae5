"""Each metric is what its formula says, and they agree with each other."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import types
from ctypes import wintypes

import pytest

from edge_runtime import metrics as metrics_module
from edge_runtime.metrics import Metrics, mbsu, peak_rss_bytes
from tests.runtime.fakes import blended_table, make_engine, random_table, run

TARGET = random_table(24, 1)
DRAFT = blended_table(TARGET, random_table(24, 2), 0.4)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("num_draft_tokens", [0, 1, 3, 8, "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_counts_of_a_request_agree(temperature, num_draft_tokens, lookup):
    """Each forward emits its accepted tokens and one of the target's own; the prompt's forward emits the first."""
    made = Metrics()
    options = {"num_draft_tokens": num_draft_tokens, "temperature": temperature, "seed": 1, "lookup": lookup}
    tokens = run(make_engine(TARGET, DRAFT), [1, 2, 3], metrics=made, max_new_tokens=120, **options)
    assert made.new_tokens == len(tokens) == 120
    assert made.new_tokens == 1 + made.target_forwards + made.accepted_tokens
    assert sum(made.proposed_by_position) == made.proposed_tokens
    assert sum(made.accepted_by_position) == made.accepted_tokens
    assert made.proposed_tokens == 0 or made.acceptance_rate == made.accepted_tokens / made.proposed_tokens
    assert made.block_efficiency == pytest.approx(1 + made.accepted_tokens / made.target_forwards)


def test_positions_of_a_block_are_accepted_in_order():
    """Token i counts as kept only if those before it were; a later one is never kept more often."""
    made = Metrics()
    run(make_engine(TARGET, DRAFT), [1, 2, 3], metrics=made, max_new_tokens=200, num_draft_tokens=5)
    assert made.accepted_by_position == sorted(made.accepted_by_position, reverse=True)
    assert len(made.proposed_by_position) == 5
    assert made.proposed_by_position[0] <= made.target_forwards


def test_known_blocks_give_known_numbers():
    made = Metrics(new_tokens=10)
    for proposed, accepted in ((4, 4), (4, 1), (2, 0), (0, 0)):
        made.count_block(proposed, accepted)
    assert (made.target_forwards, made.proposed_tokens, made.accepted_tokens) == (4, 10, 5)
    assert made.proposed_by_position == [3, 3, 2, 2]
    assert made.accepted_by_position == [2, 1, 1, 1]
    assert made.acceptance_rate == 0.5
    assert made.block_efficiency == 9 / 4


def test_times_use_the_tokens_after_the_first():
    made = Metrics(new_tokens=11, decode_s=0.5, draft_s=0.1)
    assert made.tpot_ms == pytest.approx(50)
    assert made.tokens_per_second == pytest.approx(20)
    assert made.draft_share == pytest.approx(0.2)


@pytest.mark.parametrize("new_tokens", [0, 1])
def test_nothing_measured_is_zero_and_not_an_error(new_tokens):
    report = Metrics(new_tokens=new_tokens).as_dict()
    assert {report[name] for name in ("tpot_ms", "tokens_per_second", "acceptance_rate", "block_efficiency")} == {0.0}


def test_times_of_a_request_are_ordered():
    made = Metrics()
    run(make_engine(TARGET, DRAFT), [1, 2, 3], metrics=made, num_draft_tokens=3)
    assert made.ttft_s > 0
    assert 0 < made.draft_s < made.decode_s


def test_mbsu_of_the_papers_example():
    """K 3, acceptance 0.562 and 50M for 3.8B parameters, and not the formula with a leading c, which gives 0.03."""
    block_efficiency, relative_size = 1 + 3 * 0.562, 50 / 3821
    assert block_efficiency == pytest.approx(2.686)
    assert mbsu(block_efficiency, 3, relative_size) == pytest.approx(2.58, abs=0.005)


def test_mbsu_of_a_useless_draft_is_a_loss():
    assert mbsu(1.0, 3, 50 / 3821) == pytest.approx(1 / (3 * 50 / 3821 + 1))
    assert mbsu(1.0, 3, 50 / 3821) < 1
    assert mbsu(1.0, 3, 0.0) == 1


def test_report_is_json():
    import json

    assert json.loads(json.dumps(Metrics().as_dict()))["new_tokens"] == 0


def test_peak_rss_is_that_of_this_process():
    """Linux counts in KiB, macOS in bytes."""
    assert 20 << 20 < peak_rss_bytes() < 200 << 30


def test_peak_rss_on_windows_asks_psapi(monkeypatch):
    """Windows has no `resource` module: the call is checked against a stand-in of its two libraries."""
    asked = []

    def fill(process, counters, size):
        asked.append((process, size))
        counters._obj.PeakWorkingSetSize = 123 << 20
        return 1

    class Function:
        def __init__(self, call):
            self.call = call

        def __call__(self, *arguments):
            return self.call(*arguments)

    kernel32 = types.SimpleNamespace(GetCurrentProcess=Function(lambda: 42))
    psapi = types.SimpleNamespace(GetProcessMemoryInfo=Function(fill))
    monkeypatch.setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel32, psapi=psapi), raising=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert metrics_module.peak_rss_bytes() == 123 << 20
    # PROCESS_MEMORY_COUNTERS: two DWORDs and eight SIZE_Ts.
    assert asked == [(42, 2 * ctypes.sizeof(wintypes.DWORD) + 8 * ctypes.sizeof(ctypes.c_size_t))]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a new program from nothing")
def test_peak_rss_is_not_the_parents():
    """getrusage gave a small child of a large process the large one's peak: 10.9 GB for a process of 1.3 GB."""
    ballast = bytearray(600 << 20)
    ballast[:: 4 << 10] = b"\1" * len(ballast[:: 4 << 10])
    source = "from edge_runtime.metrics import peak_rss_bytes; print(peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout)
    assert child < 300 << 20
    assert peak_rss_bytes() > len(ballast)
