"""`edge-run bench cats`: the report, what it counts, and its checks before anything is measured."""

import json

import pytest

from tests.tiny_models import SENTENCES, make_hf_model

pytestmark = pytest.mark.kernels

SMALL = ("--hidden", 256, "--ffn", 512, "--rounds", 1)
META = 3
"""Bytes of scale and zero point of a group."""


@pytest.fixture
def bench(edge_run):
    """Return a function that measures a small MLP."""
    return lambda *flags: edge_run("bench", "cats", *SMALL, *flags)


def test_json_has_a_row_for_each_cell(bench):
    done = bench("--json", "--rows", 1, "--rows", 9, "--sparsity", 0.5)
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)["rows"]
    cells = [(row["impl"], row["weights"], row["rows"], row["sparsity"]) for row in rows]
    kinds = [("openvino", 0.0), ("dense", 0.0), ("cats", 0.5)]
    assert cells == [(i, w, n, s) for w in ("int8", "int4") for n in (1, 9) for i, s in kinds]
    for row in rows:
        assert 0 < row["ms_p10"] <= row["ms"] <= row["ms_p90"]
        assert row["roofline_ms"] > 0


@pytest.mark.parametrize(("weights", "row_bytes", "groups"), [("int8", 256, 1), ("int4", 128, 2)])
def test_bytes_are_those_of_the_rows_that_were_read(bench, weights, row_bytes, groups):
    """A kernel that skips nothing would be told by its bytes, not only by its time."""
    rows = json.loads(bench("--json", "--weights", weights, "--rows", 1, "--sparsity", 0.9).out)["rows"]
    read = {row["impl"]: row["bytes_touched"] for row in rows}
    down = 3 * 256 * 512 // 128 if weights == "int4" else 0
    row = row_bytes + META * groups
    assert read["dense"] == 512 * (2 * row + row_bytes) + (down or META * 256)
    live = (read["cats"] - 512 * row - down) / (row + row_bytes)
    assert live == int(live)
    assert 0.02 < live / 512 < 0.25


def test_table_and_plot(bench, tmp_path):
    done = bench("--rows", 1, "--plot", tmp_path / "cats.png")
    assert done.code == 0
    assert "of roofline" in done.out
    assert (tmp_path / "cats.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--hidden", 100), "hidden is 100, expected a multiple of 128"),
        (("--weights", "int3"), "weights is 'int3', expected one of int8, int4, bf16"),
        (("--sparsity", 1.5), "sparsity is (1.5,), expected fractions from 0 to below 1"),
        (("--rows", 0), "expected numbers of at least 1"),
        (("--plot", "cats.txt"), "expected a name that ends in"),
    ],
)
def test_bad_options_are_one_line(bench, flags, says):
    done = bench(*flags)
    assert done.code != 0
    assert says in done.err
    assert "Traceback" not in done.err


@pytest.fixture(scope="module")
def sparse_model(tmp_path_factory):
    """A tiny model that was exported to skip half of its neurons, and a text."""
    from edge_export.convert import export_model

    folder = tmp_path_factory.mktemp("sparse")
    text = folder / "text.txt"
    text.write_text(" ".join(SENTENCES) * 40, encoding="utf-8")
    source = make_hf_model("llama", folder / "hf", hidden_size=128, intermediate_size=512)
    export_model(source, folder / "ir", weights="int8", cats=0.5, calibration_text=text)
    return folder / "ir", text


def test_a_whole_model_is_measured_on_real_text(edge_run, sparse_model, tmp_path):
    """Skipping changes the perplexity, OpenVINO's ops do not; more tokens of a step read more, at most everything."""
    folder, text = sparse_model
    done = edge_run("bench", "cats", "--model", folder, "--text", text, "--text-tokens", 600, "--json")
    assert done.code == 0
    rows = done.json["rows"]
    cats, dense, stock = (row["perplexity"] for row in rows[:3])
    assert [row["impl"] for row in rows[:3]] == ["cats", "dense", "openvino"]
    assert cats != dense == pytest.approx(stock, rel=0.02)
    read = [row["mlp_read"] for row in rows[3:] if row["impl"] == "cats"]
    assert len(read) == 8
    assert 1 / 3 < read[0] < 0.85
    assert read[0] < read[3] <= read[7] <= 1
    assert {row["mlp_read"] for row in rows[3:] if row["impl"] != "cats"} == {1.0}


def test_the_dense_model_is_what_a_dense_export_is(sparse_model, tmp_path):
    """Weights that lie to be skipped are read slower: beside them skipping would look better than it is."""
    from edge_runtime.bench.cats_model import without_thresholds
    from edge_runtime.models.loading import read_model
    from edge_runtime.models.passes.fused_mlp import fused_mlps
    from ov_kernels.mlp_blob import layout_of

    dense, _ = read_model(without_thresholds(sparse_model[0], tmp_path / "dense"))
    assert {layout_of(node.input_value(1).get_node().data) for node in fused_mlps(dense)} == {"tiles"}


def test_a_model_that_skips_nothing_is_refused(edge_run, model, sparse_model):
    done = edge_run("bench", "cats", "--model", model, "--text", sparse_model[1])
    assert done.code == 2
    assert "skips no neurons" in done.err


@pytest.mark.parametrize(
    ("flags", "says"), [((), "without --text"), (("--text", "nowhere.txt"), "expected a file to measure --model on")]
)
def test_a_model_needs_a_text(edge_run, sparse_model, flags, says):
    done = edge_run("bench", "cats", "--model", sparse_model[0], *flags)
    assert done.code == 2
    assert says in done.err
