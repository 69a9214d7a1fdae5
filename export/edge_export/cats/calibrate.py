"""Below which gate activation a neuron is skipped, from what the float model computes on a text.

With a = f(x Wgate), u = x Wup and a share k of neurons to skip, for each layer, over all its neurons and the tokens of
the text:

- CATS (Lee et al. 2024, arXiv 2404.08763): one t = min{t' : P(|a| <= t') >= k}.
- CHESS (He et al. 2024, arXiv 2409.01366): t_i = sqrt(T / E[u_i²]) for neuron i, where T is the same quantile of
  a_i² E[u_i²]: what leaving out a neuron is expected to cost, not how small its gate is, decides.

A neuron is dead where |a| <= t, as in the op. Attention, gate and the model's weights stay as they are. What share is
dead on other text depends on that text: the last fifth of it is held back, and the model with its thresholds in place
is run on that. Quantised weights shift the activations a little; this is measured without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_export.cats import HELD_BACK, MlpFormat
from edge_export.torch_source import reference_logits
from edge_export.verify import Verification, compare
from edge_runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

Observer = Callable[[int, "torch.Tensor"], "torch.Tensor | None"]
"""Takes a layer's number and what one of its modules returned; returns what to put in its place, or None."""


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What a text says about the gated MLPs, in the model's order, and what skipping their neurons does.

    Attributes:
        thresholds: (1,) for each layer with CATS, (F,) with CHESS.
        realised: Share of each layer's neurons that are dead on the text held back, or on the prompts to verify with
            where the model was trained with its thresholds and no text is given.
        effect: How the source with dead neurons compares with the source, weights as they are.
    """

    thresholds: tuple[NDArray[np.float32], ...]
    realised: tuple[float, ...]
    effect: Verification


class Quantiles:
    """The distribution of many magnitudes in 2 MB: how many there are for each sign-less pattern of float bits.

    Patterns of floats above 0 are in the order of the floats. A bin is one of their first 18 bits after the sign: its
    width is a thousandth of its place, and a smooth distribution has less than 0.05 % of its values in it.
    """

    SHIFT, NUM_BINS = 13, 1 << 18

    def __init__(self) -> None:
        self.counts = np.zeros(self.NUM_BINS, np.int64)

    def add(self, values: torch.Tensor) -> None:
        """Count |values|, of any shape."""
        import torch

        bits = values.detach().float().abs().contiguous().view(torch.int32)
        self.counts += torch.bincount(bits.flatten() >> self.SHIFT, minlength=self.NUM_BINS).numpy()

    def quantile(self, share: float) -> float:
        """Return the least t at the end of a bin for which at least `share` of the magnitudes are <= t."""
        counted = np.cumsum(self.counts)
        found = int(np.searchsorted(counted, share * counted[-1]))
        last = np.array((found + 1 << self.SHIFT) - 1, np.int32)
        return float(last.view(np.float32))


def sparsify(
    model: torch.nn.Module,
    windows: Sequence[Sequence[int]],
    form: MlpFormat,
    token_ids: NDArray[np.int64],
    dense: NDArray[np.float32],
    given: Sequence[NDArray[np.float32]] | None = None,
) -> tuple[Sparsity, NDArray[np.float32]]:
    """Find the thresholds of a model and what it says with them.

    An export is held to the logits returned here: from the dense source it differs on purpose, by as much as was asked
    for, which no bound on rounding could tell from a fault.

    Args:
        model: A causal language model of transformers, in any precision; computed in f32.
        windows: Token ids of equal windows of text, in its order; the last fifth is held back.
        form: Which method, and which share of the neurons it is to skip.
        token_ids: (B, T) of the prompts to verify with.
        dense: (B, T, V) logits of the model as it is.
        given: Thresholds that it was trained with; None to find them.

    Returns:
        The thresholds, and the (B, T, V) logits with dead neurons.

    Raises:
        ConfigError: The text is too short to hold some of it back.
        ExportError: The model's MLPs are none that are known.
    """
    held_back: Sequence[Sequence[int]] = windows or token_ids.tolist()
    if given is None:
        form.check_text(windows)
        kept, held_back = _split(windows)
        given = find_thresholds(model, kept, form)
    thresholds = tuple(given)
    with masked(model, thresholds):
        logits = reference_logits(model, token_ids)
    realised = realised_sparsity(model, held_back, thresholds)
    return Sparsity(thresholds=thresholds, realised=realised, effect=compare(dense, logits)), logits


def find_thresholds(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], form: MlpFormat
) -> tuple[NDArray[np.float32], ...]:
    """Return the thresholds of each layer that `form` asks for, on all of these windows."""
    assert form.cats is not None
    find = _cats_thresholds if form.cats_method == "cats" else _chess_thresholds
    return find(model, windows, form.cats)


def realised_sparsity(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], thresholds: Sequence[NDArray[np.float32]]
) -> tuple[float, ...]:
    """Return the share of dead neurons in each layer, with dead neurons in the layers before it too."""
    with masked(model, thresholds) as dead:
        _read(model, windows)
    return tuple(float(np.mean(shares)) for shares in dead)


def union_density(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], thresholds: Sequence[NDArray[np.float32]], rows: int
) -> float:
    """Return the mean share of neurons that at least one of `rows` consecutive tokens wakes: what a block reads."""
    import torch

    limits, shares = [torch.from_numpy(layer) for layer in thresholds], []

    def count(layer: int, activated: torch.Tensor) -> torch.Tensor:
        is_dead = activated.abs() <= limits[layer]
        whole = is_dead.shape[-2] // rows * rows
        blocks = is_dead[..., :whole, :].unflatten(-2, (-1, rows))
        shares.append(1 - float(blocks.all(-2).float().mean()))
        return activated.masked_fill(is_dead, 0)

    with _observed([mlp.activation for mlp in _gated_mlps(model)], count):
        _read(model, windows)
    return float(np.mean(shares))


@contextlib.contextmanager
def masked(model: torch.nn.Module, thresholds: Sequence[NDArray[np.float32]]) -> Iterator[list[list[float]]]:
    """Let neurons at or below their thresholds be dead in a model inside a `with` block.

    Yields:
        A list for each layer, to which each forward appends the share that was dead.
    """
    import torch

    limits = [torch.from_numpy(layer) for layer in thresholds]
    dead: list[list[float]] = [[] for _ in limits]

    def mask(layer: int, activated: torch.Tensor) -> torch.Tensor:
        is_dead = activated.abs() <= limits[layer]
        dead[layer].append(float(is_dead.float().mean()))
        return activated.masked_fill(is_dead, 0)

    with _observed([mlp.activation for mlp in _gated_mlps(model)], mask):
        yield dead


def _cats_thresholds(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], share: float
) -> tuple[NDArray[np.float32], ...]:
    mlps = _gated_mlps(model)
    quantiles = [Quantiles() for _ in mlps]
    with _observed([mlp.activation for mlp in mlps], lambda layer, values: quantiles[layer].add(values)):
        _read(model, windows)
    return tuple(np.array([each.quantile(share)], np.float32) for each in quantiles)


def _chess_thresholds(
    model: torch.nn.Module, windows: Sequence[Sequence[int]], share: float
) -> tuple[NDArray[np.float32], ...]:
    """Read the text twice: the quantile is of magnitudes that contain the mean square of `up`."""
    import torch

    mlps = _gated_mlps(model)
    scales = [torch.from_numpy(scale) for scale in _up_scales(model, windows)]
    quantiles = [Quantiles() for _ in mlps]
    with _observed(
        [mlp.activation for mlp in mlps], lambda layer, values: quantiles[layer].add(values * scales[layer])
    ):
        _read(model, windows)
    with np.errstate(divide="ignore"):  # a neuron whose up projection is always 0 is always dead
        return tuple(
            (each.quantile(share) / scale.numpy()).astype(np.float32)
            for each, scale in zip(quantiles, scales, strict=True)
        )


def _up_scales(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
    """Return sqrt(E[u_i²]) of each layer, (F,)."""
    mlps = _gated_mlps(model)
    squares: list[Any] = [0.0] * len(mlps)

    def add(layer: int, values: torch.Tensor) -> None:
        up = values.chunk(2, dim=-1)[1] if mlps[layer].is_merged else values
        squares[layer] += up.double().square().flatten(0, -2).sum(0)

    with _observed([mlp.up for mlp in mlps], add):
        _read(model, windows)
    count = sum(map(len, windows))
    return [(total / count).sqrt().float().numpy() for total in squares]


def _split(windows: Sequence[Sequence[int]]) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    """Return what thresholds are found on and what they are tried on."""
    num_kept = len(windows) - round(HELD_BACK * len(windows))
    return windows[:num_kept], windows[num_kept:]


def _read(model: torch.nn.Module, windows: Sequence[Sequence[int]]) -> None:
    for window in windows:
        reference_logits(model, np.array([window], np.int64))


class _GatedMlp(NamedTuple):
    """The modules of an MLP that are listened to."""

    activation: torch.nn.Module
    up: torch.nn.Module
    is_merged: bool
    """Whether `up` returns gate and up side by side, in this order."""


def _gated_mlps(model: torch.nn.Module) -> list[_GatedMlp]:
    """Return the gated MLPs in the order of the layers.

    Raises:
        ExportError: There are none of the two layouts that transformers uses.
    """
    found = [mlp for mlp in map(_gated_mlp, model.modules()) if mlp]
    if not found:
        raise ExportError("cats supports gated MLPs with SiLU or GELU, and the model has none", "export without --cats")
    return found


def _gated_mlp(module: torch.nn.Module) -> _GatedMlp | None:
    """Return a module's parts: `gate_proj, up_proj, act_fn` (Llama), or `gate_up_proj, activation_fn` (Phi-3, GLM)."""
    parts = dict(module.named_children())
    activation = parts.get("act_fn") or parts.get("activation_fn")
    up = parts.get("up_proj") if "gate_proj" in parts else parts.get("gate_up_proj")
    if activation is None or up is None or "down_proj" not in parts:
        return None
    return _GatedMlp(activation, up, "gate_up_proj" in parts)


@contextlib.contextmanager
def _observed(modules: Sequence[torch.nn.Module], observer: Observer | Callable[[int, Any], None]) -> Iterator[None]:
    """Call `observer` with what each module returns, inside a `with` block."""

    def hook(layer: int) -> Callable[..., Any]:
        return lambda _module, _inputs, output: observer(layer, output)

    with contextlib.ExitStack() as stack:
        for layer, module in enumerate(modules):
            handle: AbstractContextManager[Any] = module.register_forward_hook(hook(layer))
            stack.enter_context(handle)
        yield
