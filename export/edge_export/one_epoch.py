"""One Epoch Is All You Need: how large a model for how much text, and proof that no text was seen twice.

Source: Komatsuzaki 2019 (arXiv 1906.06669). Train for one pass over fresh text, without dropout, and move model size P
and processed tokens T, at equal cost P * T, to the ratio T / P near five that was best in its experiments. The ratio
is a parameter here: later fits put it at 8 to 20 for small budgets (Hoffmann et al. 2022) and near 30 (Besiroglu et
al. 2024), and whether P counts embeddings, which decides for small models, is not known of the paper.

    adjust(P0, T0):  r0 = T0 / P0;  P' = P0 sqrt(r0 / r);  T' = T0 sqrt(r / r0)

The ledger keeps a hash of every window that was trained on, in order. It is part of a checkpoint: a run that was
killed continues where the ledger ends, and a window that comes a second time is refused.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError, ModelFormatError

PAPER_RATIO = 5.0
"""Processed tokens for each parameter: the paper's optimum."""
FLOPS_PER_TOKEN = 6.0
"""Training cost of one token for each parameter: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)."""
CHINCHILLA = {"floor": 1.69, "size": 406.4, "size_power": 0.34, "data": 410.7, "data_power": 0.28}
"""Loss of a fully decayed single pass over web text (Hoffmann et al. 2022, equation 10), in nats a token."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A model size and the tokens it is trained on, once.

    Attributes:
        parameters: P.
        tokens: T, each seen once.
    """

    parameters: float
    tokens: float

    @property
    def ratio(self) -> float:
        """T / P."""
        return self.tokens / self.parameters

    @property
    def flops(self) -> float:
        """Training cost in floating-point operations."""
        return FLOPS_PER_TOKEN * self.parameters * self.tokens

    @property
    def loss(self) -> float:
        """Predicted loss in nats a token, by the Chinchilla fit: read differences, not values, on other text."""
        fit = CHINCHILLA
        size = fit["size"] * math.pow(self.parameters, -fit["size_power"])
        return fit["floor"] + size + fit["data"] * math.pow(self.tokens, -fit["data_power"])


def adjust(start: Budget, ratio: float = PAPER_RATIO) -> Budget:
    """Return the budget of the same cost whose T / P is `ratio`."""
    scale = math.sqrt(start.ratio / ratio)
    return Budget(parameters=start.parameters * scale, tokens=start.tokens / scale)


def complete(
    *,
    parameters: float | None = None,
    tokens: float | None = None,
    flops: float | None = None,
    ratio: float = PAPER_RATIO,
) -> Budget:
    """Return the budget that the rule gives for one known quantity, or the one that two of them fix.

    Raises:
        ConfigError: None was given, all three were, or one is not positive.
    """
    given = {"parameters": parameters, "tokens": tokens, "flops": flops, "ratio": ratio}
    for name, value in given.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name} is {value:g}, expected a positive number")
    if parameters and tokens and flops:
        raise ConfigError("parameters, tokens and flops were all given", "leave one out: two of them fix the third")
    if flops:
        parameters = parameters or (
            flops / FLOPS_PER_TOKEN / tokens if tokens else math.sqrt(flops / FLOPS_PER_TOKEN / ratio)
        )
        tokens = tokens or flops / FLOPS_PER_TOKEN / parameters
    if not parameters and not tokens:
        raise ConfigError("none of parameters, tokens and flops is given", "give one of the three")
    parameters = parameters or (tokens or 0) / ratio
    return Budget(parameters=parameters, tokens=tokens or parameters * ratio)


def tokens_to_reach(loss: float, parameters: float) -> float | None:
    """Return the tokens after which a model of this size is predicted to have `loss`; None if it never does."""
    left = loss - CHINCHILLA["floor"] - CHINCHILLA["size"] / parameters ** CHINCHILLA["size_power"]
    return (CHINCHILLA["data"] / left) ** (1 / CHINCHILLA["data_power"]) if left > 0 else None


def predicted_speedup(start: Budget, ratio: float = PAPER_RATIO) -> float:
    """Return by what factor the adjusted size is predicted to reach the start's loss at less cost; 0 if it never does.

    The paper found 1 to 2.7.
    """
    parameters = adjust(start, ratio).parameters
    tokens = tokens_to_reach(start.loss, parameters)
    return start.flops / Budget(parameters=parameters, tokens=tokens).flops if tokens else 0.0


def window_hash(window: NDArray[np.integer]) -> int:
    """Return a 64-bit hash of one window's token ids."""
    digest = hashlib.blake2b(np.ascontiguousarray(window, np.uint32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Ledger:
    """The hashes of all windows trained on, in order; kept in memory, saved with each checkpoint.

    Args:
        path: File of little-endian 64-bit hashes; read if it exists.
        passes: How often a window may come: 1, but where several passes are what is studied.

    Raises:
        ModelFormatError: The file is damaged: not whole hashes, or one of them too often.
    """

    def __init__(self, path: Path, passes: int = 1) -> None:
        self.path, self._passes = path, passes
        self._hashes: list[int] = []
        if path.is_file():
            if path.stat().st_size % 8:
                raise ModelFormatError(f"`{path}` is damaged: it ends in the middle of a hash", "start the stage again")
            self._hashes = np.fromfile(path, "<u8").tolist()
        self._seen = Counter(self._hashes)
        if self._is_over(self._seen):
            raise ModelFormatError(
                f"`{path}` records a window of text {'twice' if passes == 1 else f'more than {passes} times'}",
                "start the stage again",
            )

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, window: NDArray[np.integer]) -> bool:
        return window_hash(window) in self._seen

    def record(self, windows: Iterable[NDArray[np.integer]]) -> None:
        """Take the windows of one training step.

        Raises:
            ConfigError: One of them was trained on before; none is taken then.
        """
        new = [window_hash(window) for window in windows]
        counts = Counter(new)
        if self._is_over({window: self._seen[window] + count for window, count in counts.items()}):
            again = "a second time" if self._passes == 1 else f"more than {self._passes} times"
            raise ConfigError(f"a window of text would be trained on {again}", "give text that was not trained on yet")
        self._hashes += new
        self._seen.update(counts)

    def _is_over(self, counts: Mapping[int, int]) -> bool:
        return max(counts.values(), default=0) > self._passes

    def save(self) -> None:
        """Write the file, whole or not at all."""
        temporary = self.path.with_name(self.path.name + ".tmp")
        np.array(self._hashes, "<u8").tofile(temporary)
        os.replace(temporary, self.path)
