"""Recovery: a model learns to say what it said before, with half of its neurons dead.

Thresholds are found once, before training, and stay (CATS, arXiv 2404.08763, as its authors' code does). LoRA on
q_proj, v_proj, gate_proj, up_proj and down_proj, r 64, alpha 16, dropout 0.1, weight decay 0.01: the authors' code; a
summary of the paper names query, key, gate and down instead. What is minimised is this project's choice: the divergence
from the dense model's own distribution at every token, which needs no better text than any; `ce` is the text itself.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_export.cats import MlpFormat
from edge_export.cats.calibrate import find_thresholds, masked
from edge_export.corpus import Windows
from edge_export.train import next_token_loss
from edge_runtime.errors import ConfigError, ExportError

if TYPE_CHECKING:
    import torch

LOSSES = ("kl", "ce")
TARGETS = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
THRESHOLDS_NAME = "cats_thresholds.npz"
CALIBRATION_TOKENS = 65_536


@dataclass
class CatsAdaptation:
    """Skipping neurons, learned to live with; see `adapt.Adaptation`.

    Attributes:
        cats: Share of the neurons to skip.
        method: `cats` or `chess`.
        rank: Rank of the LoRA adapters.
        alpha: Scale of the adapters, times their rank.
        dropout: Dropout on the adapters' inputs.
        loss_name: One of LOSSES.
    """

    cats: float
    method: str = "cats"
    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    loss_name: str = "kl"
    thresholds: tuple[NDArray[np.float32], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        MlpFormat(cats=self.cats, cats_method=self.method)
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}, expected at least 1")
        if self.loss_name not in LOSSES:
            raise ConfigError(f"loss is {self.loss_name!r}, expected {' or '.join(LOSSES)}")
        self._masks = contextlib.ExitStack()

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome."""
        names = ("cats", "method", "rank", "alpha", "dropout", "loss_name")
        return {name: getattr(self, name) for name in names}

    def check_early(self, config: dict[str, Any]) -> None:
        """Do nothing, as `check`."""

    def check(self, config: Any, window: int | None) -> None:
        """Do nothing: any gated MLP will do, which the loaded model shows."""

    def begin(self, model: Any, windows: Windows, work: Path) -> Any:
        """Find the thresholds, or read those found before an interruption; put adapters in and let neurons die."""
        from peft import LoraConfig, get_peft_model

        path = work / THRESHOLDS_NAME
        if not path.is_file():
            some = windows[: max(1, CALIBRATION_TOKENS // windows.shape[1])].tolist()
            found = find_thresholds(model, some, MlpFormat(cats=self.cats, cats_method=self.method))
            save_thresholds(work, self.cats, self.method, found)
        self.thresholds = read_thresholds(work)[2]
        names = [name for name in TARGETS if any(module.endswith(name) for module, _ in model.named_modules())]
        if not names:
            raise ExportError(f"the model has none of {', '.join(TARGETS)}, which train cats adapts")
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=names, task_type="CAUSAL_LM"
        )
        changed = get_peft_model(model, config)
        self._masks.enter_context(masked(changed, self.thresholds))
        return changed

    def loss(self, model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the divergence from the dense model, nats a token, or the next token's loss."""
        if self.loss_name == "ce":
            return next_token_loss(model, token_ids)
        import torch

        plain = getattr(model, "module", model)
        self._masks.close()
        with torch.no_grad(), plain.disable_adapter():
            wanted = model(input_ids=token_ids, use_cache=False).logits.float().log_softmax(-1)
        self._masks.enter_context(masked(plain, self.thresholds))
        got = model(input_ids=token_ids, use_cache=False).logits.float().log_softmax(-1)
        return torch.nn.functional.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean()

    def save(self, model: Any, folder: Path) -> None:
        """Fold the adapters into the weights; write the model and its thresholds."""
        self._masks.close()
        model.merge_and_unload().save_pretrained(folder)
        save_thresholds(folder, self.cats, self.method, self.thresholds)


def save_thresholds(folder: Path, cats: float, method: str, thresholds: tuple[NDArray[np.float32], ...]) -> None:
    """Write the thresholds that a model was trained with beside it."""
    layers = {f"layer{number}": values for number, values in enumerate(thresholds)}
    with (folder / THRESHOLDS_NAME).open("wb") as file:
        np.savez(file, cats=np.float64(cats), method=np.array(method), **layers)  # type: ignore[arg-type]


def read_thresholds(folder: Path) -> tuple[float, str, tuple[NDArray[np.float32], ...]]:
    """Return the share, the method and the thresholds that a model was trained with.

    Raises:
        ExportError: The file is damaged.
    """
    path = folder / THRESHOLDS_NAME
    try:
        with np.load(path, allow_pickle=False) as content:
            layers = tuple(content[f"layer{number}"].astype(np.float32) for number in range(len(content.files) - 2))
            return float(content["cats"]), str(content["method"]), layers
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"`{path}` cannot be read: {error}", "train the model again") from error
