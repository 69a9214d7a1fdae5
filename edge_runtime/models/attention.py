"""Which keys a layer's queries see: written by export, obeyed by the caches, the kernel and the Torch side alike.

A query at position p, in block i = p // B, sees the key at position k <= p, in block j = k // B, if one of these holds:

    the layer is full                    window is None
    k < sink                             first tokens, kept for ever
    k >= start(p)                        local window: start = (i + 1) B - window, by blocks, the current one counts
                                                       start = p + 1 - window, by tokens
    (j + offset) % stride == 0           strided blocks; heads with different offsets share the context

LongGen (arXiv 2410.01485): the middle third of the layers is full, the rest sink + window or strided with one offset.
S2-Attention (arXiv 2407.17678): local + strided, an offset for each KV head; dense layers in between.
Masks are by absolute position, so keys keep the RoPE they were stored with, and a block that has left the window and
belongs to no shard is never needed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import ConfigError

Positions = TypeVar("Positions", int, NDArray[np.int64])
"""One position or several."""
BLOCK_SIZE = 64
"""Tokens of a block, unless said otherwise: S2-Attention's and Phi-3-small's choice."""
BLOCK_SIZES = (16, 32, 64, 128)
"""What the kernel can do."""


@dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """What the heads of one layer see.

    Attributes:
        window: Tokens of the local window, the query's own included; None: every earlier token (a full layer).
        sink: First tokens that are always seen.
        by_tokens: The window starts at a token (Gemma, Mistral) and not at a block.
        stride: Every so many blocks one is seen; 0 for none.
        offsets: Added to a block's number before `stride` divides it: one for all heads, or one for each KV head, or
            one for each query head.
        num_dense_heads: Last query heads that see everything.
    """

    window: int | None = None
    sink: int = 0
    by_tokens: bool = False
    stride: int = 0
    offsets: tuple[int, ...] = (0,)
    num_dense_heads: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and not (_is_count(self.window) and self.window):
            raise ConfigError(f"attention window is {self.window!r} tokens, expected at least 1")
        if self.window is None and (self.sink or self.stride):
            raise ConfigError("attention sink and stride need a window, and the layer has none")
        for name, value in (("sink", self.sink), ("stride", self.stride), ("num_dense_heads", self.num_dense_heads)):
            if not _is_count(value):
                raise ConfigError(f"attention {name} is {value!r}, expected 0 or more")
        if not self.offsets or not all(map(_is_count, self.offsets)):
            raise ConfigError(f"attention offsets are {list(self.offsets)}, expected one or more, none negative")

    @property
    def is_full(self) -> bool:
        """Whether every earlier token is seen by every head."""
        return self.window is None

    def check(self, num_heads: int, num_kv_heads: int) -> None:
        """Refuse a pattern that does not fit H query heads on H_kv KV heads.

        Raises:
            ConfigError: The offsets are not one for all, one for each KV head or one for each query head, or there are
                more dense heads than heads.
        """
        if len(self.offsets) not in (1, num_kv_heads, num_heads):
            raise ConfigError(
                f"attention has {len(self.offsets)} offsets for {num_kv_heads} KV heads of {num_heads} heads, expected "
                "one for all, one for each KV head or one for each head"
            )
        if self.num_dense_heads > num_heads:
            raise ConfigError(
                f"attention has {self.num_dense_heads} dense heads, expected at most the {num_heads} of a layer"
            )

    def head_offsets(self, num_heads: int) -> NDArray[np.int64]:
        """Return the offset of each of H query heads, (H,); `check` has said that they fit."""
        return np.repeat(np.array(self.offsets, np.int64), num_heads // len(self.offsets))

    def head_strides(self, num_heads: int) -> NDArray[np.int64]:
        """Return the stride of each of H query heads, (H,): 0 for none, 1 where every block is seen."""
        dense = np.arange(num_heads) >= num_heads - self.num_dense_heads
        return np.where(dense | self.is_full, 1, self.stride)

    def local_start(self, position: Positions, block_size: int) -> Positions:
        """Return the first position of the local window of a query at `position`, or of each of several."""
        if self.window is None:
            return position * 0
        end = position + 1 if self.by_tokens else (position // block_size + 1) * block_size
        start = end - self.window
        return start * (start > 0)

    def token_mask(
        self, queries: NDArray[np.int64], num_keys: int, num_heads: int, block_size: int
    ) -> NDArray[np.bool_]:
        """Return which of the keys 0 to `num_keys` each query sees, (H, T, S) of bool: the definition, for references.

        Args:
            queries: (T,) positions.
            num_keys: S.
            num_heads: H.
            block_size: Tokens of a block.
        """
        keys = np.arange(num_keys)
        near = (keys < self.sink) | (keys >= self.local_start(queries, block_size)[:, None])
        heads = self.head_strides(num_heads)[:, None]
        strided = (keys // block_size + self.head_offsets(num_heads)[:, None]) % np.maximum(heads, 1) == 0
        seen: NDArray[np.bool_] = (near | (strided & (heads > 0))[:, None]) & (keys <= queries[:, None])
        return seen

    def kept_blocks(
        self, blocks: NDArray[np.int64], num_kv_heads: int, num_heads: int, block_size: int
    ) -> NDArray[np.bool_]:
        """Return which of n blocks are seen even from far away, (H_kv, n): by some query head of each KV head.

        Args:
            blocks: (n,) numbers.
            num_kv_heads: H_kv.
            num_heads: H.
            block_size: Tokens of a block.
        """
        strides, offsets = self.head_strides(num_heads)[:, None], self.head_offsets(num_heads)[:, None]
        strided = ((blocks + offsets) % np.maximum(strides, 1) == 0) & (strides > 0)
        kept: NDArray[np.bool_] = strided.reshape(num_kv_heads, -1, len(blocks)).any(axis=1)
        return kept | (blocks * block_size < self.sink)

    def held_blocks(self, num_tokens: int, num_kv_heads: int, num_heads: int, block_size: int) -> NDArray[np.bool_]:
        """Return which blocks are seen by the last of `num_tokens` tokens or later, (H_kv, blocks): what is held."""
        blocks = np.arange(-(-num_tokens // block_size))
        near = blocks >= self.local_start(max(0, num_tokens - 1), block_size) // block_size
        return near | self.kept_blocks(blocks, num_kv_heads, num_heads, block_size)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


FULL = LayerPattern()


@dataclass(frozen=True, kw_only=True)
class AttentionPattern:
    """The patterns of a model's layers.

    Attributes:
        block_size: Tokens of a block.
        patterns: The different ones.
        layers: For each layer the number of its pattern.
    """

    block_size: int
    patterns: tuple[LayerPattern, ...]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"attention block size is {self.block_size}, expected one of {list(BLOCK_SIZES)}")
        if sorted(set(self.layers)) != list(range(len(self.patterns))):
            raise ConfigError(
                f"attention layers use the patterns {sorted(set(self.layers))}, expected every number from 0 to "
                f"{len(self.patterns) - 1}"
            )
        for pattern in self.patterns:
            if pattern.window is not None and not pattern.by_tokens and pattern.window % self.block_size:
                raise ConfigError(
                    f"attention window is {pattern.window} tokens, expected a multiple of the block size "
                    f"{self.block_size}"
                )

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Layers that share a pattern, and with it the list of blocks they hold."""
        return [tuple(i for i, n in enumerate(self.layers) if n == number) for number in range(len(self.patterns))]

    def of_layer(self, layer: int) -> LayerPattern:
        """Return the pattern of a layer."""
        return self.patterns[self.layers[layer]]

    def held_tokens(self, num_tokens: int, num_kv_heads: int, num_heads: int) -> int:
        """Return how many tokens' keys are held after `num_tokens`, over all layers and KV heads, in whole blocks."""
        counts = [
            int(pattern.held_blocks(num_tokens, num_kv_heads, num_heads, self.block_size).sum())
            for pattern in self.patterns
        ]
        return self.block_size * sum(counts[number] for number in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> AttentionPattern:
        """Read an entry of a JSON file.

        Raises:
            TypeError: It is not one.
            ConfigError: It names what cannot be.
        """
        if not isinstance(content, dict):
            raise TypeError(f"attention is {content!r}, expected an object")
        patterns = tuple(
            LayerPattern(**entry | {"offsets": tuple(entry.get("offsets", (0,)))}) for entry in content["patterns"]
        )
        return cls(block_size=content["block_size"], patterns=patterns, layers=tuple(content["layers"]))

    @classmethod
    def of_layers(cls, layers: Sequence[LayerPattern], block_size: int = BLOCK_SIZE) -> AttentionPattern:
        """Collect the pattern of each layer in order."""
        patterns = tuple(dict.fromkeys(layers))
        return cls(block_size=block_size, patterns=patterns, layers=tuple(patterns.index(layer) for layer in layers))


def longgen(
    num_layers: int,
    *,
    sink: int = BLOCK_SIZE,
    window: int = 2048 - BLOCK_SIZE,
    stride: int = 0,
    num_full: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> AttentionPattern:
    """Return LongGen's hourglass: first and last layers sparse, the middle full.

    Args:
        num_layers: L.
        sink: Tokens; the paper's budget is 2048 tokens of 128K, sink and window together.
        window: Tokens.
        stride: 0 for the sink + window variant; else every so many blocks one is seen, by all heads the same.
        num_full: Full layers in the middle; None: L less a third before and a third after, rounded down (12 of 32).
        block_size: Tokens.

    Raises:
        ConfigError: The numbers do not fit each other.
    """
    full = num_layers - 2 * (num_layers // 3) if num_full is None else num_full
    if not 0 <= full <= num_layers:
        raise ConfigError(f"longgen has {full} full layers, expected 0 to {num_layers}, all of the model's")
    before = (num_layers - full) // 2
    sparse = LayerPattern(window=window, sink=sink, stride=stride)
    layers = [FULL if before <= layer < before + full else sparse for layer in range(num_layers)]
    return AttentionPattern.of_layers(layers, block_size)


def s2(
    num_layers: int,
    num_kv_heads: int,
    *,
    window: int = 16 * BLOCK_SIZE,
    stride: int = 8,
    sink: int = 0,
    dense_every: int = 0,
    block_size: int = BLOCK_SIZE,
) -> AttentionPattern:
    """Return S2-Attention with one shard for each KV head, the union of which is the whole context.

    Args:
        num_layers: L.
        num_kv_heads: H_kv; head h takes the blocks j with (j + h) % stride == 0. Where the stride
            exceeds H_kv, the shards go on in the next layer: the union is over heads and layers.
        window: Tokens of the local window.
        stride: Blocks.
        sink: Tokens; none in the paper.
        dense_every: Every so many layers the last is full (Phi-3-small: 2); 0 for none.
        block_size: Tokens.

    Raises:
        ConfigError: Some block is seen by no head of any layer, or the numbers do not fit each other.
    """
    is_full = [bool(dense_every) and (layer + 1) % dense_every == 0 for layer in range(num_layers)]
    layers: list[LayerPattern] = []
    seen: set[int] = set()
    shard = 0
    for full in is_full:
        offsets = tuple((shard + head) % max(stride, 1) for head in range(num_kv_heads))
        layers.append(FULL if full else LayerPattern(window=window, sink=sink, stride=stride, offsets=offsets))
        if not full:
            seen.update(offsets)
            shard += num_kv_heads if stride > num_kv_heads else 0
    if not any(is_full) and len(seen) < stride:
        raise ConfigError(
            f"s2 with stride {stride} leaves KV blocks that no head attends to in {num_layers} layers with "
            f"{num_kv_heads} KV heads; expected a stride of at most {len(seen)}"
        )
    return AttentionPattern.of_layers(layers, block_size)
