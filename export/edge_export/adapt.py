"""A trained model goes on learning under a change: one pass over a text, which goes on after a kill.

    OUT.training/    windows of the text, recipe.json, and the checkpoint with its ledger of seen windows
    OUT/             the model as an ordinary Hugging Face folder, whole, once the training is done

What is changed, and what is learned, is an `Adaptation`: `cats.finetune` skips neurons, `hybrid.finetune` attention.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_export import corpus, torch_source
from edge_export.corpus import Windows
from edge_export.families import check_family
from edge_export.fastdraft.data import OnProgress
from edge_export.quiet import quiet
from edge_export.record import check_same, plain, write_json
from edge_export.sources import Source, load_config, open_source
from edge_export.staging import staged
from edge_export.tokenizer_files import save_tokenizer
from edge_export.tokenizer_ids import library_tokenizer
from edge_export.train import CHECKPOINT, Progress, TrainConfig, best_precision, next_token_loss, processes, train
from edge_runtime.errors import ConfigError
from edge_runtime.outputs import check_apart, check_output, check_work_folder, claimed, empty

if TYPE_CHECKING:
    import torch

RECIPE = "recipe.json"
HINT = "give the same options to resume it, or remove the folder"
HELD_OUT_WINDOWS = 32
"""Most windows on which perplexity is measured before and after."""
WARMUP = 0.1
"""Share of the updates in which the rate rises."""


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe:
    """What is trained on what.

    Attributes:
        source: A Hugging Face folder or hub id.
        text: Files and folders.
        window: Tokens trained on at once; None for the model's context, at most 1024.
        max_tokens: Most tokens in all; None for all there are.
        batch_size: Windows of one update.
        micro_batch_size: Windows computed at once; None for all.
        learning_rate: Peak learning rate.
        precision: `auto`, `bf16` or `no` (f32).
        seed: Random seed of the order of windows.
    """

    source: str
    text: tuple[Path, ...]
    window: int | None = None
    max_tokens: float | None = None
    batch_size: int = 8
    micro_batch_size: int | None = 1
    learning_rate: float = 1e-4
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("there is no text to train on", "give --text FILE…")
        for name in ("window", "max_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}, expected a positive number")
        if self.precision not in ("auto", "bf16", "no"):
            raise ConfigError(f"precision is {self.precision!r}, expected auto, bf16 or no")


class Adaptation(Protocol):
    """A change of a model, and what it learns under it."""

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome, for the record and to tell another training's folder."""

    def check_early(self, config: dict[str, Any]) -> None:
        """Refuse what the content of a config.json shows that the model cannot have, before torch is imported."""

    def check(self, config: Any, window: int | None) -> None:
        """Refuse what a model of this transformers config, trained on windows of this length, cannot have."""

    def begin(self, model: Any, windows: Windows, work: Path) -> Any:
        """Put the change into effect; return the model to be trained."""

    def loss(self, model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Return what is minimised, see `train.Loss`."""

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained model as a Hugging Face folder, without its tokenizer."""


@dataclass(frozen=True)
class Adapted:
    """What came out, as perplexities of held-out windows.

    Attributes:
        output: Folder of the trained model.
        original: Perplexity of the source as it is.
        before: Perplexity under the change, untrained.
        after: Perplexity under the change, trained.
        tokens: Number of tokens trained on.
    """

    output: Path
    original: float
    before: float
    after: float
    tokens: int


def adapt(
    recipe: AdaptRecipe, adaptation: Adaptation, output: Path, on_progress: OnProgress = lambda *_: None
) -> Adapted | None:
    """Train; run again with the same recipe, it goes on where it was.

    Returns:
        What came out; None in all processes but the first.

    Raises:
        ConfigError: The output exists, or there is too little text.
        ModelFormatError: The folder of the training belongs to another one.
        ExportError: The source cannot be read, or the disk is full.
    """
    place = check_output(output)
    work = place.with_name(place.name + ".training")
    for written in (place, work):
        check_apart(written, source=recipe.source, text=recipe.text)
    corpus.text_files(recipe.text)  # one that is missing is told before the model is read
    check_work_folder(work, RECIPE)
    origin = open_source(recipe.source)
    check_family(origin)
    adaptation.check_early(origin.config)
    is_main = processes().is_main_process
    with claimed(work) if is_main else contextlib.nullcontext():
        return _adapt(recipe, adaptation, origin, output, work, on_progress)


def _adapt(
    recipe: AdaptRecipe, adaptation: Adaptation, origin: Source, output: Path, work: Path, on_progress: OnProgress
) -> Adapted | None:
    """Train in the folder `work`, which is this process's own."""
    from accelerate.utils import set_seed

    is_main = processes().is_main_process
    adaptation.check(load_config(origin), recipe.window)
    if is_main:
        if not any((work / name).is_dir() for name in (CHECKPOINT, CHECKPOINT + ".last")):
            empty(work)  # nothing was learned there
        check_same({**plain(recipe), **adaptation.settings()}, work / RECIPE, HINT)
    processes().wait_for_everyone()
    on_progress("read", 0, 1, "")
    with quiet():
        torch_source.check_supported(origin)
        model = torch_source.load(origin, "fp32")
    windows, held_out = _windows(recipe, origin, model.config, work, is_main, on_progress)
    original = perplexity(model, held_out)
    set_seed(recipe.seed)  # of adapters and new weights: a training that begins again begins alike
    changed = adaptation.begin(model, windows, work)
    before = perplexity(changed, held_out)
    config = TrainConfig(
        batch_size=recipe.batch_size,
        micro_batch_size=recipe.micro_batch_size,
        optimizer="adamw",
        learning_rate=recipe.learning_rate,
        weight_decay=0.01,
        precision=best_precision() if recipe.precision == "auto" else recipe.precision,
        warmup=WARMUP,
        checkpoint_s=120,
    )
    trained = train(changed, windows, work, config, loss=adaptation.loss, on_step=_shower(on_progress))
    if not is_main:
        return None
    made = Adapted(output, original, before, perplexity(trained, held_out), windows.size)
    with staged(output, overwrite=False) as folder:
        with quiet():
            adaptation.save(trained, folder)
        save_tokenizer(origin.of_tokenizer, folder)
        write_json(folder / "training.json", {"recipe": plain(recipe), **adaptation.settings(), **plain(made)})
    empty(work)
    return made


def perplexity(model: Any, windows: Windows) -> float:
    """Return exp of the mean loss of every next token of windows."""
    import torch

    model.eval()
    with torch.no_grad():
        losses = [float(next_token_loss(model, torch.from_numpy(row[None].astype(np.int64)))) for row in windows]
    return math.exp(sum(losses) / len(losses))


def _windows(
    recipe: AdaptRecipe, origin: Source, config: Any, work: Path, is_main: bool, on_progress: OnProgress
) -> tuple[Windows, Windows]:
    """Return the windows to train on, shuffled, and those held out."""
    length = recipe.window or min(1024, getattr(config, "max_position_embeddings", None) or 1024)
    end = config.eos_token_id
    end_of_text = end[0] if isinstance(end, list) else end or 0

    def made() -> Windows:
        files = corpus.text_files(recipe.text)
        folder = work / "tokenizer"
        folder.mkdir(exist_ok=True)
        save_tokenizer(origin.of_tokenizer, folder)
        tokens = corpus.tokenize(
            files, library_tokenizer(folder), end_of_text, lambda n, of: on_progress("read text", n, of, "")
        )
        return corpus.cut(tokens, length)

    trained, held_out = corpus.split(corpus.load_or_make(work / "windows.npy", made, is_main=is_main))
    most = None if recipe.max_tokens is None else max(recipe.batch_size, int(recipe.max_tokens // length))
    whole = len(trained[:most]) // recipe.batch_size * recipe.batch_size
    return corpus.shuffled(trained, recipe.seed)[: whole or len(trained)], held_out[:HELD_OUT_WINDOWS]


def _shower(on_progress: OnProgress) -> Callable[[Progress], None]:
    def show(progress: Progress) -> None:
        figure = f"loss {progress.loss:.3f}, {progress.tokens_per_second:,.0f} tokens/s"
        on_progress("train", progress.step, progress.num_steps, figure)

    return show
