"""`edge-run devices`."""

import openvino

from edge_runtime import __version__


def test_json_says_what_openvino_picks(edge_run):
    done = edge_run("devices", "--json")
    assert (done.code, done.err) == (0, "")
    (cpu,) = [device for device in done.json["devices"] if device["device"] == "CPU"]
    assert cpu["name"] == openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    assert cpu["precision"] in ("f32", "bf16", "f16")
    assert cpu["num_threads"] >= 1
    assert done.json["versions"]["edge-run"] == __version__
    assert done.json["versions"]["openvino"] in openvino.__version__


def test_text_says_the_same(edge_run):
    report = edge_run("devices", "--json").json
    done = edge_run("devices")
    assert (done.code, done.err) == (0, "")
    for device in report["devices"]:
        assert device["name"] in done.out
    assert f"edge-run {__version__}" in done.out


def test_kernels_that_cannot_be_loaded_are_no_failure(edge_run, monkeypatch):
    monkeypatch.setenv("EDGE_KERNELS_LIBRARY", "nowhere.so")
    assert edge_run("devices", "--json").json["kernels"]["is_loaded"] is False
    done = edge_run("devices")
    assert (done.code, done.err) == (0, "")
    assert "nowhere.so" in done.out
