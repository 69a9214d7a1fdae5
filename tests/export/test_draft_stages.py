"""`train_draft` on tiny models: three stages, their ledgers, kills, other recipes, foreign vocabularies."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors

from edge_export.fastdraft import stages
from edge_export.fastdraft.answers import AnswerConfig, user_prefix, write_answers
from edge_export.fastdraft.data import read_prompts
from edge_export.fastdraft.recipe import STAGES, DraftRecipe
from edge_export.fastdraft.stages import train_draft
from edge_export.one_epoch import Ledger
from edge_export.train import CHECKPOINT, LEDGER
from edge_runtime.api import EdgeLLM
from edge_runtime.errors import ConfigError, DeviceError, ExportError, ModelFormatError, ModelPairError
from tests.tiny_models import SENTENCES, make_hf_model

ROOT = Path(__file__).resolve().parents[2]
WORDS = " ".join(SENTENCES).split()


class Killed(BaseException):
    pass


def write_text(path, seed, num_words=6000):
    random = np.random.default_rng(seed)
    path.write_text(" ".join(random.choice(WORDS, num_words)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return {"text": (write_text(folder / "a.txt", 1),), "code": (write_text(folder / "b.py", 2, 2000),)}


@pytest.fixture
def recipe(tiny_ir, texts):
    return DraftRecipe(
        target=str(tiny_ir("llama")),
        **texts,
        size=60e3,
        num_layers=1,
        window=64,
        num_answers=24,
        max_new_tokens=32,
        batch_size=2,
        precision="no",
    )


def ledgers(out):
    return {s: Ledger(out / "stages" / s / CHECKPOINT / LEDGER) for s in STAGES}


def test_three_stages_make_a_draft_that_drafts(recipe, tiny_ir, tmp_path):
    out = train_draft(recipe, tmp_path / "draft")
    seen = [set(np.fromfile(ledger.path, "<u8").tolist()) for ledger in ledgers(out).values()]
    assert all(seen)
    assert not seen[0] & seen[1], "text of the stage pretrain came again in the stage continue"
    llm = EdgeLLM.load(tiny_ir("llama"), draft=out / "openvino", precision="f32")
    plain = llm.generate("Once upon", max_new_tokens=24, num_draft_tokens=0)
    drafted = llm.generate("Once upon", max_new_tokens=24, num_draft_tokens=3)
    assert drafted.metrics.proposed_tokens > 0
    assert drafted.token_ids == plain.token_ids
    assert (out / "tokenizer.json").read_bytes() == (tiny_ir("llama") / "tokenizer.json").read_bytes()
    assert set(json.loads((out / "training.json").read_text())["stages"]) == set(STAGES)


@pytest.mark.parametrize(("stage", "at"), [("continue", 3), ("answers", 5), ("align", 2)])
def test_a_kill_in_any_stage_changes_nothing(recipe, tmp_path, stage, at, monkeypatch):
    monkeypatch.setattr(stages, "TrainConfig", every_step_is_saved)

    def kill(name, done, wanted, figure):
        if (name, done) == (stage, at):
            raise Killed

    with pytest.raises(Killed):
        train_draft(recipe, tmp_path / "killed", kill)
    train_draft(recipe, tmp_path / "killed")
    train_draft(recipe, tmp_path / "whole")
    for name in STAGES:
        one, other = (ledgers(tmp_path / run)[name].path.read_bytes() for run in ("killed", "whole"))
        assert one == other
    assert read_loss(tmp_path / "killed") == pytest.approx(read_loss(tmp_path / "whole"), rel=1e-3)


def every_step_is_saved(**options):
    from edge_export.train import TrainConfig

    return TrainConfig(**{**options, "checkpoint_s": 0.0})


def read_loss(out):
    return json.loads((out / "training.json").read_text())["stages"]["align"]["loss"]


@pytest.mark.slow
def test_two_processes_train_one_draft(recipe, texts, tmp_path):
    """accelerate took each for a run of its own, and both wrote the same files."""
    options = "--size 60k --layers 1 --window 64 --num-answers 24 --max-new-tokens 32 --batch-size 2 --precision no"
    paths = ("--target", recipe.target, "--text", *texts["text"], "--code", *texts["code"], "-o", tmp_path / "two")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "edge_runtime")
    command = [sys.executable, *launcher, "train", "draft", *paths, *options.split()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("draft: ") == 1
    train_draft(recipe, tmp_path / "one")
    for name in STAGES:
        one, two = (ledgers(tmp_path / run)[name].path.read_bytes() for run in ("one", "two"))
        assert one == two
    assert read_loss(tmp_path / "two") == pytest.approx(read_loss(tmp_path / "one"), rel=1e-2)


def test_stages_run_alone_and_start_from_what_is_there(recipe, tmp_path):
    out = train_draft(dataclasses.replace(recipe, stages=("pretrain",)), tmp_path / "draft")
    assert not (out / "stages" / "align").exists()
    train_draft(dataclasses.replace(recipe, stages=("align",)), out)
    assert set(json.loads((out / "training.json").read_text())["stages"]) == {"pretrain", "align"}


@pytest.mark.parametrize("loss", ["kl", "ce+tvd", "lk"])
def test_distillation_from_prompts_of_its_own(recipe, tmp_path, loss):
    wanted = dataclasses.replace(
        recipe, stages=("align",), text=(), code=(), prompts="self", chat=False, loss=loss, top=4
    )
    out = train_draft(wanted, tmp_path / "draft")
    line = json.loads((out / "stages" / "answers.jsonl").read_text().splitlines()[0])
    assert len(line["top"]) == len(line["answer_ids"])


def test_magpie_opens_the_users_turn(recipe, tiny_ir, tmp_path):
    llm = EdgeLLM.load(tiny_ir("llama"))
    assert llm.tokenizer.token(user_prefix(llm)[-1]) == "<|user|>"
    wanted = dataclasses.replace(recipe, stages=("align",), text=(), code=(), prompts="self", num_answers=8)
    out = train_draft(dataclasses.replace(wanted, window=32), tmp_path / "draft")
    lines = [json.loads(line) for line in (out / "stages" / "answers.jsonl").read_text().splitlines()]
    opening, longest = user_prefix(llm), llm.context_length * 3 // 4
    # Longer ones lose their beginning.
    whole = [line["prompt_ids"] for line in lines if len(line["prompt_ids"]) < longest]
    assert whole
    assert all(ids[: len(opening)] == opening for ids in whole)


def test_another_recipe_does_not_go_on(recipe, tmp_path):
    out = train_draft(dataclasses.replace(recipe, stages=("pretrain",)), tmp_path / "draft")
    with pytest.raises(ModelFormatError, match="seed was 0, not 1"):
        train_draft(dataclasses.replace(recipe, seed=1), out)


def test_a_full_disk_is_one_line(recipe, tmp_path, monkeypatch):
    """What safetensors raises is no OSError, and was an internal error."""

    def full(*args, **options):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(stages, "train", full)
    with pytest.raises(ExportError, match="disk is full"):
        train_draft(recipe, tmp_path / "draft")


def test_a_start_with_another_vocabulary_is_refused(recipe, tmp_path):
    other = make_hf_model("llama", tmp_path / "other", vocab_size=400)
    with pytest.raises(ModelPairError, match="vocabulary of 400, but the target's has 384"):
        train_draft(dataclasses.replace(recipe, start=other), tmp_path / "draft")


@pytest.mark.parametrize("output", ["hf", ".", "hf/draft", "notes"])
def test_nothing_that_is_read_or_not_ours_is_written_over(recipe, tmp_path, output):
    """With the target as its output, the command replaced the target's weights and ended with 0."""
    target = tmp_path / "hf"
    target.mkdir()
    (target / "model.safetensors").write_text("precious")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.json").write_text("precious")
    with pytest.raises(ConfigError, match=r"the target|did not write"):
        train_draft(dataclasses.replace(recipe, target=str(target)), tmp_path / output)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == [
        str(Path("hf", "model.safetensors")),
        str(Path("notes", "config.json")),
    ]


def test_chat_without_a_template_is_refused(recipe, tiny_ir, tmp_path):
    target = shutil.copytree(tiny_ir("llama"), tmp_path / "target")
    (target / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="no chat template"):
        train_draft(dataclasses.replace(recipe, target=str(target), chat=True), tmp_path / "draft")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ("pretain",)}, "stage is 'pretain'"),
        ({"text": ()}, "needs a text, and none"),
        ({"window": 100_000}, "window is 100000"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"size": 100.0}, "too few for a vocabulary"),
    ],
)
def test_bad_options_are_one_line(recipe, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        train_draft(dataclasses.replace(recipe, **options), tmp_path / "draft")


def test_a_device_that_is_not_there_is_said_before_anything_is_trained(recipe, tmp_path):
    with pytest.raises(DeviceError, match="FPGA"):
        train_draft(dataclasses.replace(recipe, device="FPGA"), tmp_path / "draft")
    assert not (tmp_path / "draft" / "stages" / "pretrain").exists()


def test_an_npu_writes_answers_too(tiny_ir, tmp_path, monkeypatch):
    """It was refused, since a batch had to be one forward; now one answer follows the other."""
    monkeypatch.setenv("EDGE_NPUW_DEVICES", "CPU")
    config = AnswerConfig(model=tiny_ir("llama"), device="NPU", max_new_tokens=4)
    write_answers(["a", "b"], config, tmp_path / "answers")
    assert [json.loads(line)["index"] for line in (tmp_path / "answers").read_text().splitlines()] == [0, 1]


def test_what_goes_wrong_in_a_writing_process_is_said_as_it_is(tiny_ir, tmp_path):
    """It was a BrokenProcessPool, after the process's own traceback."""
    config = AnswerConfig(model=tiny_ir("llama"), device="FPGA", workers=2)
    with pytest.raises(DeviceError, match="FPGA"):
        write_answers(["a"] * 40, config, tmp_path / "answers.jsonl")


@pytest.mark.parametrize(("content", "message"), [("", "hold no text"), ("too short", "a window needs 64")])
def test_too_little_text_is_refused(recipe, tmp_path, content, message):
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        train_draft(dataclasses.replace(recipe, text=(path,), code=()), tmp_path / "draft")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "\n", "holds no prompt"),
        ("a.jsonl", '{"text": 1}', r"line 1 of .* is not a prompt"),
        ("a.jsonl", "x", r"line 1 of .* is not JSON"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / name)
