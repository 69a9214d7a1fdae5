"""Pictures of attention: what each layer's heads see, and what that costs by length of context. Extra: bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.bench.plot import save_figure

if TYPE_CHECKING:
    from edge_runtime.models.attention import AttentionPattern, LayerPattern

COLORS = ("#f2f2f2", "#2f6db3", "#e0883a", "#7fb069", "#9aa5b1")
MEANINGS = ("not held", "local window", "sink", "strided", "full layer")
MASK_BLOCKS = 32
"""Blocks of the small pictures of queries and keys."""


def save_pattern_plot(
    attention: AttentionPattern, num_heads: int, num_kv_heads: int, num_tokens: int, path: Path
) -> None:
    """Draw the blocks that each layer and KV head holds, and for each pattern which keys a query sees.

    Args:
        attention: Attention pattern of a model.
        num_heads: H.
        num_kv_heads: H_kv.
        num_tokens: Context length to draw.
        path: Checked by `bench.plot.check_plot`.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [pattern for pattern in attention.patterns if not pattern.is_full][:4]
    figure = Figure(figsize=(8 + 3.2 * bool(shown), max(4.0, 3.0 * len(shown))), layout="constrained")
    grid = figure.add_gridspec(max(1, len(shown)), 2, width_ratios=[3, 1.2] if shown else [1, 1e-3])
    colors = ListedColormap(COLORS)
    kinds = [
        _kinds(attention.of_layer(layer), num_tokens, num_heads, num_kv_heads, attention.block_size)
        for layer in range(len(attention.layers))
    ]
    _draw_layers(figure.add_subplot(grid[:, 0]), kinds, attention, num_tokens, colors)
    for row, pattern in enumerate(shown):
        _draw_mask(figure.add_subplot(grid[row, 1]), pattern, num_heads, num_kv_heads, attention, colors)
    handles = [Patch(facecolor=color, label=label) for color, label in zip(COLORS, MEANINGS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save_figure(figure, path)


def _draw_layers(axes: Any, kinds: list[NDArray[Any]], attention: AttentionPattern, tokens: int, colors: Any) -> None:
    """Layers from top to bottom, a line for each KV head; blocks of the context from left to right."""
    heads, blocks = kinds[0].shape
    axes.imshow(
        np.concatenate(kinds), cmap=colors, vmin=-0.5, vmax=len(COLORS) - 0.5, aspect="auto", interpolation="nearest"
    )
    step = -(-len(kinds) // 16)  # more labels would overlap
    axes.set_yticks([(layer + 0.5) * heads - 0.5 for layer in range(0, len(kinds), step)], range(0, len(kinds), step))
    for layer in range(1, len(kinds)):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=0.8)
    marks = np.linspace(0, blocks, 5)
    axes.set_xticks(marks - 0.5, [f"{int(mark) * attention.block_size:,}" for mark in marks])
    share = np.concatenate(kinds).astype(bool).mean()
    axes.set_title(f"held after {tokens:,} tokens: {share:.1%} of the keys and values", fontsize=10)
    axes.set_xlabel("token")
    axes.set_ylabel(f"layer, {heads} KV heads each")


def _draw_mask(
    axes: Any, pattern: LayerPattern, num_heads: int, num_kv_heads: int, attention: AttentionPattern, colors: Any
) -> None:
    """Queries from top to bottom, keys from left to right, of the first KV head; long windows in coarser blocks."""
    size = attention.block_size
    reach = max(pattern.window or 0, pattern.stride * size) * 2 + pattern.sink
    blocks = max(MASK_BLOCKS, -(-reach // size))
    rows = np.zeros((blocks, blocks), int)
    for block in range(blocks):
        rows[block, : block + 1] = _kinds(pattern, (block + 1) * size, num_heads, num_kv_heads, size)[0]
    axes.imshow(rows, cmap=colors, vmin=-0.5, vmax=len(COLORS) - 0.5, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    layers = attention.groups[attention.patterns.index(pattern)]
    axes.set_title(f"layer {layers[0]}, head 0: queries by keys,\n{blocks * size:,} tokens", fontsize=9)


def _kinds(
    pattern: LayerPattern, num_tokens: int, num_heads: int, num_kv_heads: int, block_size: int
) -> NDArray[np.int64]:
    """Return why each block is held after so many tokens, as an index into MEANINGS, (H_kv, blocks)."""
    blocks = np.arange(-(-num_tokens // block_size))
    if pattern.is_full:
        return np.full((num_kv_heads, len(blocks)), 4)
    is_sink = blocks * block_size < pattern.sink
    is_near = blocks >= pattern.local_start(max(0, num_tokens - 1), block_size) // block_size
    is_kept = pattern.kept_blocks(blocks, num_kv_heads, num_heads, block_size)
    return np.where(is_near, 1, np.where(is_sink, 2, np.where(is_kept, 3, 0)))


def save_time_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of `AttentionBench`: time by context, a picture for each scope and phase.

    Args:
        rows: Rows of a report.
        path: Checked by `bench.plot.check_plot`.
    """
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys((row["scope"], row["phase"]) for row in rows))
    figure = Figure(figsize=(5.2 * len(parts), 4.6), layout="constrained")
    for axes, (scope, phase) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        _draw_times(axes, [row for row in rows if (row["scope"], row["phase"]) == (scope, phase)])
        axes.set_title(f"{'one layer' if scope == 'layer' else 'whole model'}, {phase}")
    save_figure(figure, path)


def _draw_times(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Lines of measured ms on logarithmic axes; dots where the formula puts a pattern, from our full attention."""
    kinds = list(dict.fromkeys((row["impl"], row["pattern"], row["stride"]) for row in rows))
    full = {row["context"]: row["ms"] for row in rows if (row["impl"], row["pattern"]) == ("edge", "full")}
    for index, (impl, pattern, stride) in enumerate(kinds):
        group = [row for row in rows if (row["impl"], row["pattern"], row["stride"]) == (impl, pattern, stride)]
        contexts, style = [row["context"] for row in group], {"color": f"C{index}"}
        label = f"{impl}, {pattern}" + (f"/{stride}" if stride else "")
        axes.plot(contexts, [row["ms"] for row in group], "s--" if impl == "genai" else "o-", label=label, **style)
        if impl == "edge" and pattern != "full" and group[0]["formula_ratio"]:
            expected = [full[row["context"]] / row["formula_ratio"] for row in group]
            axes.plot(contexts, expected, ":", **style)
    axes.plot([], [], "k:", label="expected from full")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = sorted({row["context"] for row in rows})
    axes.set_xticks(contexts, [f"{context // 1024}K" if context >= 1024 else str(context) for context in contexts])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms")
    axes.legend(frameon=False, fontsize=8)
