"""What cannot be exported is refused in one line that says why and what to do."""

import json
import os
import shutil

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from edge_export import sources
from edge_export.convert import export_model
from edge_export.sources import open_source
from edge_runtime.errors import DownloadError, EdgeError, ExportError


@pytest.fixture
def folder(tiny_hf, tmp_path):
    """A copy of the Llama that may be spoilt."""
    shutil.copytree(tiny_hf("llama"), tmp_path / "hf")
    return tmp_path / "hf"


def _set(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def _without(name):
    return lambda folder: (folder / name).unlink()


def _truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _drop_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _reshape_a_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _add_a_bias(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class _Code:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def _pickle_code(folder):
    import torch

    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Code()}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("config.json"), r"holds no config\.json"),
        (_without("model.safetensors"), "holds no weights"),
        (_without("tokenizer.json"), "holds no tokenizer"),
        (_truncate, r"model\.safetensors` is cut short: 247,472 bytes, its table says 494,944"),
        (_reshape_a_tensor, r"1 tensors .* another shape .* lm_head\.weight: \(100, 64\), expected \(384, 64\)"),
        (_pickle_code, "pickled Python objects other than tensors"),
        (_drop_a_tensor, r"lack 1 tensors, such as model\.layers\.1\.mlp\.down_proj\.weight"),
        (_add_a_bias, r"1 tensors .* no place in the llama .* such as model\.layers\.0\.self_attn\.q_proj\.bias"),
        (lambda folder: _set(folder, num_hidden_layers=1), r"tensors .* no place .* such as model\.layers\.1\."),
        (lambda folder: (folder / "config.json").write_text("{"), "is not readable JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda folder: _set(folder, model_type=None), "names no model_type"),
        (lambda folder: _set(folder, model_type="nonesuch"), "`nonesuch` is not supported, expected llama, mistral"),
        (lambda folder: _set(folder, model_type="bert"), "`bert` is not supported"),
        (lambda folder: _set(folder, model_type="t5", is_encoder_decoder=True), "`t5` is an encoder-decoder model"),
        (lambda folder: _set(folder, model_type="gemma3", vision_config={}), "`gemma3` takes images or sound"),
    ],
)
def test_spoilt_source_is_one_line_and_leaves_nothing(folder, tmp_path, spoil, message):
    spoil(folder)
    with pytest.raises(EdgeError, match=message) as caught:
        export_model(folder, tmp_path / "ir")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not os.path.exists("was-run")


def test_weights_that_no_layer_asks_for_are_left_out(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert export_model(folder, tmp_path / "ir", weights="fp32").verification.top1_agreement == 1


def test_path_that_does_not_exist_is_no_hub_id(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="does not exist"):
        open_source("./nowhere")


def test_finished_folder_is_not_exported_again(tiny_ir):
    with pytest.raises(ExportError, match="is an OpenVINO model folder already"):
        open_source(tiny_ir("llama"))


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.tar").write_bytes(b"tar")
    with pytest.raises(ExportError, match=r"is a \.tar file, expected a model folder or a \.onnx file"):
        open_source(tmp_path / "model.tar")


def test_several_onnx_files_are_not_guessed_between(folder):
    (folder / "model.safetensors").unlink()
    for name in ("decoder.onnx", "embedding.onnx"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ExportError, match=r"several ONNX files: decoder\.onnx, embedding\.onnx"):
        open_source(folder)


def test_bytes_of_onnx_count_the_weights_beside_it(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.onnx").write_bytes(b"12345")
    (folder / "model.onnx_data").write_bytes(b"1234567890")
    assert open_source(folder).weight_bytes == 15


def test_hub_id_fetches_safetensors_and_only_the_top_folder(tiny_hf, monkeypatch):
    calls = []

    def snapshot_download(hub_id, *, allow_patterns, ignore_patterns):
        calls.append((hub_id, allow_patterns, ignore_patterns))
        return str(tiny_hf("llama"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_source("someone/some-model")
    assert (source.name, source.folder) == ("someone/some-model", tiny_hf("llama"))
    assert len(calls) == 1
    assert "*.safetensors" in calls[0][1]
    assert "pytorch_model*.bin" not in calls[0][1]
    assert calls[0][2] == ["*/*"]


def test_hub_without_safetensors_falls_back_to_pickled_weights(folder, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, **kw: calls.append(kw["allow_patterns"]) or str(folder)
    )
    assert open_source("someone/some-model").weight_bytes > 0
    assert "pytorch_model*.bin" in calls[1]


class _Response:
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 403


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("no network"), "the model hub cannot be reached"),
        (ConnectionError("no route"), "the model hub cannot be reached"),
        (httpx.ReadTimeout("slow"), "the model hub cannot be reached"),
        (
            errors.RepositoryNotFoundError("404", response=_Response()),
            "no folder named `someone/some-model`, and the model hub has no such model",
        ),
        (errors.GatedRepoError("403", response=_Response()), "requires its licence to be accepted"),
    ],
)
def test_hub_failure_says_what_to_do(monkeypatch, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=message):
        open_source("someone/some-model")


def test_sixteen_bit_is_read_from_either_spelling(tmp_path):
    for config, expected in [({"dtype": "bfloat16"}, True), ({"torch_dtype": "float16"}, True), ({}, False)]:
        source = sources.Source(name="", folder=tmp_path, onnx=None, config=config)
        assert source.is_sixteen_bit is expected
