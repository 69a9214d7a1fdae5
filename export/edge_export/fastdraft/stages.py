"""FastDraft's three stages, one after another, each a single pass that goes on after a kill.

    OUT/                    the draft: config.json, model.safetensors, the target's tokenizer, training.json
    OUT/openvino/           the same as int8 IR, for the runtime
    OUT/stages/<stage>/     checkpoint with its ledger of seen windows, log.jsonl, and model/ once the stage is done
    OUT/stages/             windows of text; answers.jsonl, what the target wrote; target/, if it had to be exported

The last stage's model is the draft.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_export import corpus
from edge_export.corpus import Windows
from edge_export.fastdraft.answer_windows import answer_windows
from edge_export.fastdraft.answers import AnswerConfig, write_answers
from edge_export.fastdraft.auto_shape import auto_shape
from edge_export.fastdraft.data import OnProgress, TrainingText
from edge_export.fastdraft.losses import alignment_loss
from edge_export.fastdraft.recipe import OWN_PROMPTS, STAGES, TEXT_PROMPTS, DraftRecipe
from edge_export.fastdraft.shape import draft_config
from edge_export.fastdraft.target import Target, open_target
from edge_export.quiet import quiet
from edge_export.record import check_same, plain, write_json
from edge_export.staging import disk_full_is_said
from edge_export.train import LOG, Loss, Progress, TrainConfig, best_precision, next_token_loss, processes, train
from edge_runtime import strict_json
from edge_runtime.devices import check_device
from edge_runtime.errors import ConfigError
from edge_runtime.outputs import check_apart, check_output, claimed

WORK, RECIPE = "stages", "recipe.json"
MAY_CHANGE = ("stages", "device", "start")
"""Options that may differ between the runs of one training."""
HINT = "give the same options to resume it, or another output folder"


def train_draft(recipe: DraftRecipe, out: Path, on_progress: OnProgress = lambda *_: None) -> Path | None:
    """Make a draft; run again with the same recipe, it goes on where it was.

    Args:
        recipe: What and how.
        out: The draft's folder.
        on_progress: Called as the work goes on, in the first process only.

    Returns:
        The draft's folder; None in all processes but the first, which writes it.

    Raises:
        ConfigError: An option cannot be used with this target, or there is too little text.
        ModelFormatError: `out` holds a training with another recipe.
        ModelPairError: The draft to start from has another vocabulary.
        ExportError: The disk is full; what was saved before is whole.
    """
    given = None if recipe.prompts in (OWN_PROMPTS, TEXT_PROMPTS) else recipe.prompts
    check_apart(
        out, target=recipe.target, draft_to_start_from=recipe.start, text=recipe.text, code=recipe.code, prompts=given
    )
    place = _check_folder(out)
    is_main = processes().is_main_process
    with disk_full_is_said(out), claimed(place / WORK) if is_main else contextlib.nullcontext():
        return _Training(recipe, out, on_progress).run()


def _check_folder(out: Path) -> Path:
    """Return the folder of a draft, links followed; refuse one that holds something else than a draft of ours."""
    if out.is_dir() and any(path.name != WORK for path in out.iterdir()):
        if not (out / WORK / RECIPE).is_file():
            raise ConfigError(
                f"output `{out}` holds files that `edge-run train draft` did not write", "give another folder"
            )
        return out.resolve()
    return out.resolve() if (out / WORK).is_dir() else check_output(out)


class _Training:
    """One recipe at work in one folder."""

    def __init__(self, recipe: DraftRecipe, out: Path, on_progress: OnProgress) -> None:
        self._recipe, self._out, self._work = recipe, out, out / WORK
        self._processes = processes()
        self._is_main = self._processes.is_main_process
        self._on_progress: OnProgress = on_progress if self._is_main else lambda *_: None

    def run(self) -> Path | None:
        if self._is_main:
            self._work.mkdir(parents=True, exist_ok=True)
            told = {name: value for name, value in plain(self._recipe).items() if name not in MAY_CHANGE}
            check_same(told, self._work / RECIPE, HINT)
        self._target = self._open_target()
        self._text = TrainingText(
            self._recipe, self._target, self._work, is_main=self._is_main, on_progress=self._on_progress
        )
        for stage in STAGES:
            if stage in self._recipe.stages and (stage != "continue" or self._recipe.code):
                self._run_stage(stage)
        if not self._is_main:
            return None
        self._finish()
        return self._out

    def _open_target(self) -> Target:
        recipe = self._recipe
        if "align" in recipe.stages:
            check_device(recipe.device)  # before hours of training lead up to the answers
        self._on_progress("target", 0, 1, "")

        def export(done: Path) -> None:
            open_target(recipe.target, self._work)
            done.touch()

        corpus.made_once(self._work / "target.done", export, is_main=self._is_main)
        target = open_target(recipe.target, self._work)
        context = target.manifest.context_length
        if recipe.window and context and recipe.window > context:
            raise ConfigError(f"window is {recipe.window}, expected at most the target's context of {context} tokens")
        if recipe.chat and not target.has_chat_template:
            raise ConfigError("the target has no chat template", "leave out --chat to send the prompts as plain text")
        return target

    def _run_stage(self, stage: str) -> None:
        folder = self._work / stage
        if (folder / "model").is_dir():
            return
        windows, loss = self._align_data() if stage == "align" else (self._text.windows(stage), next_token_loss)
        start = self._start_of(stage)
        config = self._train_config(is_alignment=stage == "align" and start is not None)
        model = train(self._start_model(start), windows, folder, config, loss=loss, on_step=self._shower(stage))
        if self._is_main:
            with quiet():
                model.save_pretrained(folder / "model.new")
            os.replace(folder / "model.new", folder / "model")
        self._processes.wait_for_everyone()  # the next stage asks whether this one's model is there

    def _shower(self, stage: str) -> Callable[[Progress], None]:
        def show(progress: Progress) -> None:
            figure = f"loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s"
            self._on_progress(stage, progress.step, progress.num_steps, figure)

        return show

    def _train_config(self, is_alignment: bool) -> TrainConfig:
        recipe = self._recipe
        return TrainConfig(
            batch_size=recipe.batch_size,
            micro_batch_size=recipe.micro_batch_size,
            learning_rate=recipe.align_learning_rate if is_alignment else recipe.learning_rate,
            precision=best_precision() if recipe.precision == "auto" else recipe.precision,
            checkpoint_s=120,
        )

    def _start_of(self, stage: str) -> Path | None:
        """Return the model that a stage starts from; None for random weights."""
        earlier = [self._work / name / "model" for name in STAGES[: STAGES.index(stage)]]
        done = [model for model in earlier if model.is_dir()]
        return done[-1] if done else self._recipe.start

    def _start_model(self, start: Path | None) -> Any:
        with quiet():
            import torch
            from transformers import AutoModelForCausalLM

            torch.manual_seed(self._recipe.seed)
            if start is None:
                return AutoModelForCausalLM.from_config(self._shape())
            model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, local_files_only=True)
        self._target.check_draft(model.config, start)
        return model

    def _shape(self) -> Any:
        recipe, target = self._recipe, self._target
        fixed: dict[str, Any] = {
            "vocab_size": target.vocab_size,
            "context_length": target.manifest.context_length or self._text.window,
            "special_tokens": target.special_tokens,
        }

        def choose(path: Path) -> None:
            shape = auto_shape(target, recipe.latency_share, recipe.num_layers, **fixed)
            path.write_text(strict_json.dumps(dataclasses.asdict(shape), indent=2) + "\n", encoding="utf-8")

        if recipe.size is not None:
            return draft_config(num_parameters=recipe.size, num_layers=recipe.num_layers, **fixed)
        path = corpus.made_once(self._work / "shape.json", choose, is_main=self._is_main)
        chosen = json.loads(path.read_text(encoding="utf-8"))
        return draft_config(num_parameters=chosen["num_parameters"], num_layers=chosen["num_layers"], **fixed)

    def _align_data(self) -> tuple[Windows, Loss]:
        recipe, answers = self._recipe, self._work / "answers.jsonl"
        done = self._work / "answers.done"
        corpus.made_once(done, lambda new: self._write_answers(answers, new), is_main=self._is_main)
        windows, teacher = answer_windows(answers, self._text.window, self._target.end_of_text, recipe.top_kept)
        return corpus.shuffled(windows, recipe.seed), alignment_loss(recipe.loss, windows, teacher)

    def _write_answers(self, answers: Path, done: Path) -> None:
        recipe, prompts = self._recipe, list(self._text.prompts())
        has_no_end = recipe.num_answers is None and recipe.prompts in (TEXT_PROMPTS, OWN_PROMPTS)
        is_chat = recipe.prompts != TEXT_PROMPTS and self._target.has_chat_template
        config = AnswerConfig(
            model=self._target.folder,
            device=recipe.device,
            max_new_tokens=recipe.max_new_tokens,
            max_tokens=recipe.answer_tokens if has_no_end else None,
            chat=is_chat if recipe.chat is None else recipe.chat,
            top=recipe.top_kept,
        )
        start: tuple[float, int] | None = None  # of this process, after its first answer

        def on_answer(count: int, num_tokens: int) -> None:
            nonlocal start
            now = time.monotonic()
            start = start or (now, num_tokens)
            speed = (num_tokens - start[1]) / max(now - start[0], 1e-9)
            done, wanted = (num_tokens, int(config.max_tokens)) if config.max_tokens else (count, len(prompts))
            self._on_progress("answers", done, wanted, f"{speed:,.0f} tokens/s")

        write_answers(prompts, config, answers, on_answer)
        done.touch()

    def _finish(self) -> None:
        """Put the last stage's model, the tokenizer, the IR and the record of the training into place."""
        from edge_export.convert import export_model

        done = [self._work / stage for stage in STAGES if (self._work / stage / "model").is_dir()]
        if not done:
            raise ConfigError(
                "no stage was run, so there is no draft", "choose --stages for which text or prompts are given"
            )
        self._on_progress("export", 0, 1, "")
        draft = self._work / "finished" / self._out.resolve().name
        draft.mkdir(parents=True, exist_ok=True)
        for path in (done[-1] / "model").iterdir():
            shutil.copyfile(path, draft / path.name)
        self._target.copy_tokenizer(draft)
        export_model(draft, self._out / "openvino", weights="int8", overwrite=True)
        for path in draft.iterdir():
            os.replace(path, self._out / path.name)
        shutil.rmtree(draft.parent)
        record = {"recipe": plain(self._recipe), "stages": {folder.name: _summary(folder) for folder in done}}
        write_json(self._out / "training.json", record)
        self._on_progress("export", 1, 1, "")


def _summary(stage: Path) -> dict[str, Any]:
    """Return a finished stage's updates and its mean loss over the last of them; None where one was not finite."""
    lines = (stage / LOG).read_text(encoding="utf-8").splitlines()
    by_step = {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}  # a kill makes a step come again
    losses = list(by_step.values())[-20:]
    return {"updates": max(by_step), "loss": None if None in losses else round(sum(losses) / len(losses), 4)}
