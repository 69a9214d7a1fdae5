"""One pass over windows of tokens: the training loop that every stage and every trained feature uses.

AdamW, a short warm-up and a cosine to zero at the end of the budget, dropout 0 (One Epoch, arXiv 1906.06669: under a
single pass regularisation only slows training down). The ledger of seen windows is part of each checkpoint, and a
checkpoint is whole or not there, so a run that is killed at any moment continues with the same windows in the same
order. transformers holds the model, accelerate spreads the batch over processes: the same command under
`accelerate launch` trains on many GPUs, under `torchrun` on many processes of processors.

What the papers leave open (optimiser, learning rate, batch, schedule) is this project's choice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_export.corpus import Windows
from edge_export.one_epoch import Ledger
from edge_export.quiet import quiet
from edge_runtime import strict_json
from edge_runtime.errors import ConfigError, ModelFormatError

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator, PartialState

Loss = Callable[[Any, "torch.Tensor"], "torch.Tensor"]
"""(model, token ids (B, T)) to the mean loss of a batch, a scalar."""

OPTIMIZERS = ("muon", "adamw")
CHECKPOINT, LEDGER, LOG, STATE = "checkpoint", "ledger.u64", "log.jsonl", "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a pass is run.

    Attributes:
        batch_size: Windows of one update, over all processes.
        micro_batch_size: Windows a process computes at once; their gradients are added up. None for all of its share.
            Small ones stay in a processor's cache: 1 808 against 1 464 tokens/s for 2 against 8 windows of 1 024
            tokens, the update left out (9 M parameters, 2 cores, AVX2).
        optimizer: `muon` (edge_export.muon) or `adamw`.
        learning_rate: Peak learning rate.
        warmup: Share of the updates in which the rate rises.
        weight_decay: On matrices; norms and biases have none.
        clip: Largest norm of the gradient.
        checkpoint_s: Seconds between checkpoints.
        precision: `bf16` or `no` (f32), accelerate's names.
        passes: How often a window may come; above 1 only to study what more passes do.
        seed: Random seed of dropout, where a model has any.
    """

    batch_size: int = 8
    micro_batch_size: int | None = None
    optimizer: str = "muon"
    learning_rate: float = 4e-3
    warmup: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0
    checkpoint_s: float = 300.0
    precision: str = "bf16"
    passes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, expected at least 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"micro_batch_size is {self.micro_batch_size}, expected at least 1")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"optimizer is {self.optimizer!r}, expected {' or '.join(OPTIMIZERS)}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}, expected a positive number")


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
        step: Updates done.
        num_steps: Updates wanted.
        loss: Mean loss of the last batch before its update, in nats a token.
        tokens_per_second: Since this process began.
    """

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float


def next_token_loss(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of every next token of (B, T) windows."""
    import torch

    from edge_export.output_loss import mean_loss

    counts = torch.ones_like(token_ids, dtype=torch.bool)
    counts[:, -1] = False
    labels = token_ids[:, 1:].flatten()

    def loss_of_rows(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, labels[rows], reduction="none")

    return mean_loss(model, token_ids, counts, loss_of_rows)


def train(
    model: Any,
    windows: Windows,
    out: Path,
    config: TrainConfig,
    *,
    loss: Loss = next_token_loss,
    on_step: Callable[[Progress], None] | None = None,
) -> Any:
    """Train `model` on each window once and return it; continue where `out` has a checkpoint.

    Args:
        model: A transformers causal language model, changed in place.
        windows: (N, T) distinct windows in training order; an incomplete last batch is left out.
        out: Folder of checkpoint, ledger and log; made if absent.
        config: How.
        loss: What is minimised.
        on_step: Called after each update, on the main process.

    Raises:
        ConfigError: There are fewer windows than a batch, or a window comes twice.
        ModelFormatError: The checkpoint belongs to other windows.
    """
    if len(windows) < config.batch_size:
        raise ConfigError(
            f"the text has {len(windows)} windows, but a batch needs {config.batch_size}",
            "give more text, or --batch-size 1",
        )
    run = _Run(model, windows, out, config, loss)
    run.resume()
    run.to_the_end(on_step)
    return run.model


def best_precision() -> str:
    """Return bf16 where the hardware has it, else f32."""
    from edge_export.muon import has_fast_bf16

    return "bf16" if has_fast_bf16(processes().device.type) else "no"


def processes() -> PartialState:
    """Return the processes that train together, each of which asks for them before anything else of accelerate.

    accelerate takes part of its own in a run on processors only when told that it is one: `torchrun`'s processes would
    all train alone, and write into the same folder.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Return the rate of update `step`: a linear rise, then a cosine that ends at zero."""
    rising = max(1, int(num_steps * config.warmup))
    if step < rising:
        return config.learning_rate * (step + 1) / rising
    done = (step - rising) / max(1, num_steps - rising)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class _Run:
    """One pass: model, optimiser, ledger and position."""

    def __init__(self, model: Any, windows: Windows, out: Path, config: TrainConfig, loss: Loss) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import set_seed

        processes()
        # accelerate keeps the first precision of a process; a later training may ask for another.
        AcceleratorState._reset_state()
        self._accelerator: Accelerator = Accelerator(mixed_precision=config.precision)
        share, rest = divmod(config.batch_size, self._accelerator.num_processes)
        if rest:
            raise ConfigError(
                f"batch_size is {config.batch_size}, "
                f"expected a multiple of the {self._accelerator.num_processes} processes"
            )
        set_seed(config.seed)
        self._share = share
        self._windows, self._out, self._config, self._loss = windows, out, config, loss
        self._num_steps = len(windows) // config.batch_size
        self._step = 0
        out.mkdir(parents=True, exist_ok=True)
        if self._accelerator.is_main_process:
            _recover(out / CHECKPOINT)
        self._accelerator.wait_for_everyone()
        self._ledger = Ledger(out / CHECKPOINT / LEDGER, config.passes)
        self.model, self._optimizer = self._accelerator.prepare(model, _optimizer(model, config))

    def resume(self) -> None:
        """Load the last checkpoint, if there is one."""
        folder = self._out / CHECKPOINT
        if not folder.is_dir():
            return
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        self._step = int(state["step"])
        seen = self._windows[: self._step * self._config.batch_size]
        if len(self._ledger) != len(seen) or state["num_steps"] != self._num_steps or seen[-1] not in self._ledger:
            raise ModelFormatError(
                f"the checkpoint in `{folder}` was made with other text or options",
                "give the same text and options again, or another output folder",
            )
        self._accelerator.load_state(str(folder / "state"))

    def to_the_end(self, on_step: Callable[[Progress], None] | None) -> None:
        """Make the remaining updates, with a checkpoint now and then and one at the end."""
        begin = saved = time.monotonic()
        first = self._step
        self.model.train()
        while self._step < self._num_steps:
            loss = self._update()
            now = time.monotonic()
            tokens = (self._step - first) * self._config.batch_size * self._windows.shape[1]
            progress = Progress(self._step, self._num_steps, loss, tokens / (now - begin))
            if self._accelerator.is_main_process:
                self._log(progress)
                if on_step:
                    on_step(progress)
            if now - saved > self._config.checkpoint_s or self._step == self._num_steps:
                self._save()
                saved = now
        self.model = self._accelerator.unwrap_model(self.model).eval()

    def _update(self) -> float:
        import torch

        config, first = self._config, self._step * self._config.batch_size
        batch = self._windows[first : first + config.batch_size]
        self._ledger.record(batch)
        mine = batch[self._accelerator.process_index * self._share :][: self._share]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._step, self._num_steps, config)
        token_ids = torch.from_numpy(mine.astype(np.int64)).to(self._accelerator.device)
        loss = self._gradients(token_ids)
        self._accelerator.clip_grad_norm_(self.model.parameters(), config.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        return float(self._accelerator.reduce(loss, "mean"))

    def _gradients(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Add up the gradients of (B, T) windows, a micro-batch at a time; return their mean loss."""
        import torch

        parts = token_ids.split(self._config.micro_batch_size or len(token_ids))
        total = torch.zeros((), device=token_ids.device)
        for index, part in enumerate(parts):
            is_last = index == len(parts) - 1
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self.model):
                with self._accelerator.autocast():
                    loss = self._loss(self.model, part) * (len(part) / len(token_ids))
                self._accelerator.backward(loss)
            total += loss.detach()
        return total

    def _log(self, progress: Progress) -> None:
        with (self._out / LOG).open("a", encoding="utf-8") as log:
            log.write(strict_json.dumps(asdict(progress)) + "\n")

    def _save(self) -> None:
        """Write a checkpoint beside the last one and put it in its place."""
        new = self._out / (CHECKPOINT + ".new")
        if self._accelerator.is_main_process:
            shutil.rmtree(new, ignore_errors=True)
        self._accelerator.wait_for_everyone()
        with quiet():  # it says that tied weights are stored once
            self._accelerator.save_state(str(new / "state"))
        if self._accelerator.is_main_process:
            self._ledger.path = new / LEDGER
            self._ledger.save()
            (new / STATE).write_text(
                strict_json.dumps({"step": self._step, "num_steps": self._num_steps}), encoding="utf-8"
            )
            replace_folder(new, self._out / CHECKPOINT)
        self._accelerator.wait_for_everyone()


def replace_folder(new: Path, old: Path) -> None:
    """Put the folder `new` in the place of `old`: at any moment one of them is whole, under `old` or `old`.last."""
    last = old.with_name(old.name + ".last")
    shutil.rmtree(last, ignore_errors=True)
    if old.exists():
        os.replace(old, last)
    os.replace(new, old)
    shutil.rmtree(last, ignore_errors=True)


def _recover(folder: Path) -> None:
    """Finish a `replace_folder` that was interrupted between its two renames."""
    last = folder.with_name(folder.name + ".last")
    if not folder.exists() and last.exists():
        os.replace(last, folder)


def _optimizer(model: Any, config: TrainConfig) -> Any:
    """Return the optimiser: matrices of the layers apart from embeddings, output layer and vectors."""
    import torch

    from edge_export.muon import Muon

    ends = {id(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer}
    matrices = [p for p in model.parameters() if p.dim() == 2 and id(p) not in ends]
    tables = [p for p in model.parameters() if p.dim() >= 2 and (p.dim() > 2 or id(p) in ends)]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "is_matrix": True},
        {"params": tables, "weight_decay": config.weight_decay, "is_matrix": False},
        {"params": vectors, "weight_decay": 0.0, "is_matrix": False},
    ]
    if config.optimizer == "muon":
        return Muon(groups, config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))
