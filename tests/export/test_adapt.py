"""`edge-run train cats` and `train hybrid`: what is learned, what is kept, what is refused, and that it is exported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_export.adapt import AdaptRecipe, adapt
from edge_export.cats.finetune import THRESHOLDS_NAME, CatsAdaptation, read_thresholds
from edge_export.hybrid.finetune import HybridAdaptation, longer_base
from edge_runtime.cli.app import run
from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.manifest import MlpFacts, load_manifest
from edge_runtime.models.attention import AttentionPattern
from edge_runtime.models.loading import read_model
from edge_runtime.models.passes.fused_mlp import fused_mlps
from tests.export.helpers import encode, runtime_logits, torch_logits, write_shuffled
from tests.tiny_models import SENTENCES, make_hf_model

HYBRID = "longgen:window=16,sink=16,block=16"


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt") / "hf"
    return make_hf_model("llama", folder, hidden_size=128, intermediate_size=256, num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_shuffled(tmp_path_factory.mktemp("adapt") / "text.txt", 60)


def recipe(hf, text, **options) -> AdaptRecipe:
    small = {"window": 32, "max_tokens": 4096, "batch_size": 4, "micro_batch_size": 4, "precision": "no"}
    return AdaptRecipe(source=str(hf), text=(text,), **{**small, "learning_rate": 2e-3, **options})


@pytest.fixture(scope="module")
def cats(hf, text, tmp_path_factory):
    """A model that has learned to do without half of its neurons."""
    folder = tmp_path_factory.mktemp("cats") / "out"
    return adapt(recipe(hf, text), CatsAdaptation(cats=0.5, rank=16), folder), folder


def test_training_brings_the_dense_models_words_back(cats):
    """KL to the dense model: a random model's perplexity may rise, but what it says gets nearer to what it said."""
    made, folder = cats
    log = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert made.before != made.original
    assert abs(np.log(made.after) - np.log(made.original)) < abs(np.log(made.before) - np.log(made.original))
    assert (log["cats"], log["method"], log["loss_name"]) == (0.5, "cats", "kl")
    assert not folder.with_name("out.training").exists()


@pytest.mark.parametrize("method", ["cats", "chess"])
def test_thresholds_stay_as_they_were_found(cats, hf, text, tmp_path, method):
    """On the dense model: whatever is learned, and how fast, they are the same."""
    shape = (1,) if method == "cats" else (256,)
    found = []
    for rate in (1e-4, 1e-2):
        adaptation = CatsAdaptation(cats=0.5, method=method, rank=4)
        adapt(recipe(hf, text, learning_rate=rate), adaptation, tmp_path / str(rate))
        share, kept, thresholds = read_thresholds(tmp_path / str(rate))
        assert (share, kept, [layer.shape for layer in thresholds]) == (0.5, method, [shape] * 3)
        found.append(thresholds)
    weights = [(tmp_path / str(rate) / "model.safetensors").read_bytes() for rate in (1e-4, 1e-2)]
    assert weights[0] != weights[1]
    assert all(np.array_equal(one, other) for one, other in zip(*found, strict=True))
    if method == "cats":
        assert all(np.array_equal(*pair) for pair in zip(found[0], read_thresholds(cats[1])[2], strict=True))


@pytest.mark.kernels
def test_export_uses_the_thresholds_that_training_had(cats, tmp_path):
    """Without a text: none is needed, and another would find others."""
    from edge_export.convert import export_model

    made = export_model(cats[1], tmp_path / "ir", weights="int8")
    assert load_manifest(tmp_path / "ir").mlp == MlpFacts(kind="fused", activation_sparsity=0.5, method="cats")
    found = [node.input_value(2).get_node().get_data() for node in fused_mlps(read_model(tmp_path / "ir")[0])]
    for got, wanted in zip(found, read_thresholds(cats[1])[2], strict=True):
        assert np.array_equal(got, wanted)
    assert made.sparsity is not None
    assert made.verification.error < 0.15


def test_a_hybrid_learns_and_is_exported(hf, text, tmp_path, tmp_path_factory):
    """A longer context, a longer base of RoPE, and a pattern that the folder, the IR and the runtime agree on."""
    from edge_export.convert import export_model

    folder = tmp_path / "out"
    made = adapt(
        recipe(hf, text, window=128, batch_size=2, micro_batch_size=1), HybridAdaptation(HYBRID, context=1024), folder
    )
    assert made.after < made.before
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["max_position_embeddings"] == 1024
    assert config["rope_parameters"]["rope_theta"] == pytest.approx(longer_base(10_000, 2, 32))
    pattern = AttentionPattern.from_json(config["edge_attention"])
    assert [pattern.of_layer(i).is_full for i in range(3)] == [False, True, False]
    export_model(folder, tmp_path / "ir", weights="fp32")
    manifest = load_manifest(tmp_path / "ir")
    assert (manifest.attention, manifest.context_length) == (pattern, 1024)
    ids = encode(tmp_path / "ir", " ".join(SENTENCES))[:120]
    from tests.runtime.models.test_block_sparse import masked_logits

    wanted = masked_logits(folder, pattern, ids)
    got = runtime_logits(tmp_path / "ir", ids)
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()
    assert np.abs(torch_logits(folder, ids) - wanted)[-1].max() > 1e-2 * np.abs(wanted).max()


def test_training_removes_nothing_of_the_users(hf, text, tmp_path):
    """OUT.training was emptied where it held no checkpoint, whoever had made it."""
    work = tmp_path / "out.training"
    work.mkdir()
    (work / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="did not create it"):
        adapt(recipe(hf, text), CatsAdaptation(cats=0.5, rank=4), tmp_path / "out")
    assert (work / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("output", ["hf", "", "hf/out"])
def test_source_and_text_are_never_written_over(tmp_path, output):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "text.txt").write_text("precious")
    given = AdaptRecipe(source="owner/name", text=(tmp_path / "hf",))
    with pytest.raises(ConfigError, match=r"the text|not empty"):
        adapt(given, CatsAdaptation(cats=0.5), tmp_path / output)


def test_from_scratch_begins_with_other_weights(hf, text, tmp_path):
    made = adapt(
        recipe(hf, text), HybridAdaptation("s2:window=16,stride=2,block=16", is_from_scratch=True), tmp_path / "o"
    )
    assert made.after < made.before != made.original


def test_an_untrained_conversion_says_what_it_is(edge_run, hf, tmp_path):
    code, _, err = edge_run(hf, "-o", tmp_path / "ir", "--weights", "fp32", "--attention", HYBRID)
    assert code == 0
    assert "exported without fine-tuning" in err
    assert load_manifest(tmp_path / "ir").attention is not None


def test_an_interrupted_training_goes_on(hf, text, tmp_path):
    """The same windows in the same order, with the same thresholds: to the same weights as in one go."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"max_tokens": 2048}
    adapt(recipe(hf, text, **options), CatsAdaptation(cats=0.5, rank=4, dropout=0.0), whole)

    class StoppedError(Exception):
        pass

    def stop(stage, done, *_):
        if stage == "train" and done == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        adapt(recipe(hf, text, **options), CatsAdaptation(cats=0.5, rank=4, dropout=0.0), parts, stop)
    assert not parts.exists()
    assert (tmp_path / "parts.training" / THRESHOLDS_NAME).is_file()
    adapt(recipe(hf, text, **options), CatsAdaptation(cats=0.5, rank=4, dropout=0.0), parts)
    assert (parts / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_another_recipe_does_not_go_on_with_it(hf, text, tmp_path):
    (tmp_path / "out.training" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out.training" / "recipe.json").write_text('{"cats": 0.7}', encoding="utf-8")
    with pytest.raises(ModelFormatError, match="holds a training whose"):
        adapt(recipe(hf, text), CatsAdaptation(cats=0.5), tmp_path / "out")


def test_a_training_that_learned_nothing_is_begun_anew(hf, text, tmp_path):
    """A first try with too long a window left its options behind, and the right ones were then refused."""
    with pytest.raises(ConfigError, match="a window needs 100000"):
        adapt(recipe(hf, text, window=100_000), CatsAdaptation(cats=0.5, rank=4), tmp_path / "out")
    assert adapt(recipe(hf, text), CatsAdaptation(cats=0.5, rank=4), tmp_path / "out") is not None


def test_a_model_that_slides_already_takes_no_other_pattern(edge_run, tiny_hf, text, tmp_path):
    pattern = "window:window=16,sink=16,block=16"
    code, _, err = edge_run(tiny_hf("mistral"), "-o", tmp_path / "ir", "--attention", pattern)
    assert code != 0
    assert "the model already has an attention pattern" in err
    with pytest.raises(ConfigError, match="the model already has an attention pattern"):
        adapt(recipe(tiny_hf("mistral"), text), HybridAdaptation(pattern), tmp_path / "out")
    assert not (tmp_path / "out.training").exists()


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("cats", "--cats", "1.5"), "cats is 1.5, expected a fraction between 0 and 1"),
        (("cats", "--loss", "mse"), "loss is 'mse', expected kl or ce"),
        (("cats", "--rank", "0"), "rank is 0"),
        (("hybrid", "--attention", "longen"), "did you mean `longgen`"),
        (("hybrid", "--attention", "longgen:full=9"), "9 full layers, expected 0 to 3"),
        (("hybrid", "--window", "0"), "window is 0, expected a positive number"),
        (("hybrid", "--context", "64", "--window", "128"), "window is 128 tokens, expected at most the context of 64"),
    ],
)
def test_wrong_options_are_named(capfd, hf, text, tmp_path, args, told):
    code = run(["train", args[0], str(hf), "-o", str(tmp_path / "out"), "--text", str(text), *args[1:]])
    assert code != 0
    assert told in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_that_is_not_there_is_told_before_the_model_is_read(hf, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_export.torch_source.load", lambda *_: pytest.fail("the model was read"))
    with pytest.raises(ConfigError, match=r"nowhere\.txt` does not exist"):
        adapt(recipe(hf, tmp_path / "nowhere.txt"), CatsAdaptation(cats=0.5), tmp_path / "out")


def test_missing_text_is_named(hf, tmp_path):
    with pytest.raises(ConfigError, match="there is no text"):
        recipe(hf, tmp_path).__class__(source=str(hf), text=())
