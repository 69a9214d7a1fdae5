"""`edge-run bench attention`: the report, what it promises of bytes, and its checks before anything is measured."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.kernels

SMALL = ("--heads", 4, "--kv-heads", 2, "--head-size", 16, "--chunk", 64, "--rounds", 1)
SIZES = ("--context", 512, "--stride", 2, "--window", 64, "--kept", 128)


@pytest.fixture
def bench(edge_run):
    """Return a function that measures a small layer."""
    return lambda *flags: edge_run("bench", "attention", *SMALL, *SIZES, *flags)


def test_json_has_a_row_for_each_cell(bench):
    done = bench("--json")
    assert (done.code, done.err) == (0, "")
    rows = done.json["rows"]
    kinds = [("edge", "full", 0), ("edge", "longgen", 0), ("edge", "s2", 2), ("genai", "full", 0)]
    cells = [(row["phase"], row["impl"], row["pattern"], row["stride"]) for row in rows]
    assert cells == [(phase, *kind) for phase in ("prefill", "decode") for kind in kinds]
    for row in rows:
        assert (row["scope"], row["context"]) == ("layer", 512)
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["ratio"] > 0
    found = {row["pattern"]: row["formula_ratio"] for row in rows if row["phase"] == "decode" and row["impl"] == "edge"}
    assert found == {"full": 1.0, "longgen": 4.0, "s2": pytest.approx(512 / (64 + 448 / 2), rel=0.15)}


def test_bytes_are_those_of_the_blocks_held(bench):
    """64 tokens, keys and values of 16 bytes, and two scales of 4 bytes: 2560 bytes a block of a KV head."""
    rows = [row for row in bench("--json").json["rows"] if row["phase"] == "decode" and row["impl"] == "edge"]
    blocks = {row["pattern"]: row["kv_bytes"] / 2560 for row in rows}
    assert blocks["full"] == 2 * 8
    assert 2 * 2 <= blocks["longgen"] <= 2 * 2 + 6
    assert blocks["longgen"] < blocks["s2"] < blocks["full"]


def test_a_model_is_measured_with_every_pattern(bench, model):
    rows = bench("--json", "--model", model).json["rows"]
    assert {row["scope"] for row in rows} == {"layer", "model"}
    of_model = [row for row in rows if row["scope"] == "model" and row["phase"] == "decode"]
    assert [row["impl"] for row in of_model] == ["edge"] * 3 + ["genai"]
    full, longgen, strided, _ = of_model
    assert full["kv_bytes"] == longgen["kv_bytes"]  # of two layers both are full
    assert full["kv_bytes"] > strided["kv_bytes"]
    assert 1 < strided["formula_ratio"] < 512 / (64 + 448 / 2)  # weights are read all the same


def test_table_plot_and_leaving_the_peer_out(bench, tmp_path):
    done = bench("--longest-peer", 100, "--plot", tmp_path / "attention.png")
    assert done.code == 0
    assert "one layer, decode, 512 tokens" in done.out
    assert "genai  full" not in done.out
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--kv-heads", 3), "4 heads cannot share 3 KV heads evenly"),
        (("--head-size", 20), "head_size is 20, expected a multiple of 16"),
        (("--context", 100), "expected each to be at least two chunks of 64 tokens"),
        (("--stride", 0), "strides are [2, 0], expected numbers of at least 1"),
        (("--rounds", 0), "rounds is 0"),
        (("--plot", "figure.txt"), "expected a name that ends in"),
    ],
)
def test_wrong_options_are_named_before_the_work(bench, flags, told):
    done = bench(*flags)
    assert done.code != 0
    assert told in done.err
    assert done.out == ""
