"""Gated MLPs as one op of ours, dense or with neurons that are skipped where their gate is small.

`rewrite` replaces the MLPs of a compressed graph by the op CatsMlp. `calibrate` finds, on a text, below which gate
activation a neuron is skipped: CATS, one threshold for each layer (Lee et al. 2024, arXiv 2404.08763), or CHESS, one
for each neuron (He et al. 2024, arXiv 2409.01366). Not here: the op itself (ov_kernels) and fine-tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.errors import ConfigError
from edge_runtime.manifest import MlpFacts

MLP_KINDS = ("stock", "fused")
CATS_METHODS = ("cats", "chess")
HELD_BACK = 0.2
"""Share of the calibration text on which realised sparsity is measured."""
MIN_WINDOWS = round(1 / HELD_BACK)
GROUP = 128
"""Size of a quantisation group of int4 weights in the op."""


@dataclass(frozen=True, kw_only=True)
class MlpFormat:
    """How gated MLPs are to be stored.

    Attributes:
        mlp: `stock` for OpenVINO's own ops, `fused` for CatsMlp.
        cats: Share of the neurons to skip, between 0 and 1, which implies `fused`; None for none.
        cats_method: `cats` or `chess`.
    """

    mlp: str = "stock"
    cats: float | None = None
    cats_method: str = "cats"

    def __post_init__(self) -> None:
        if self.mlp not in MLP_KINDS:
            raise ConfigError(f"mlp is {self.mlp!r}, expected {' or '.join(MLP_KINDS)}")
        if self.cats is not None and not 0 < self.cats < 1:
            raise ConfigError(f"cats is {self.cats:g}, expected a fraction between 0 and 1", "for example --cats 0.5")
        if self.cats_method not in CATS_METHODS:
            raise ConfigError(f"cats_method is {self.cats_method!r}, expected {' or '.join(CATS_METHODS)}")

    @property
    def is_fused(self) -> bool:
        """Whether the graph gets the op."""
        return self.mlp == "fused" or self.cats is not None

    @property
    def facts(self) -> MlpFacts | None:
        """What the manifest says of it."""
        if not self.is_fused:
            return None
        method = None if self.cats is None else self.cats_method
        return MlpFacts(kind="fused", activation_sparsity=self.cats, method=method)

    def check_weights(self, weights: str) -> None:
        """Raise ConfigError where the op does not hold such weights."""
        if self.is_fused and weights not in ("bf16", "int8", "int4"):
            raise ConfigError(f"weights is {weights}, but fused MLPs need bf16, int8 or int4", "use --weights int8")

    def check_calibration(self, text: str | Path | None) -> None:
        """Raise ConfigError where thresholds are to be found and there is no text."""
        if self.cats is not None and text is None:
            raise ConfigError(
                "cats needs a calibration text to find its thresholds on, and none is given",
                "add --calibration-text FILE, a text like what the model will read",
            )

    def check_text(self, windows: Sequence[Sequence[int]]) -> None:
        """Raise ConfigError where a calibration text has too few windows of tokens to hold some of them back."""
        if self.cats is not None and len(windows) < MIN_WINDOWS:
            raise ConfigError(
                f"the calibration text has less than {MIN_WINDOWS * len(windows[0])} tokens, which cats needs",
                "give a longer text",
            )
