"""What layers see, from a user's words or a Hugging Face config.

    longgen                        the middle third of the layers full, the rest 64 first and 1984 last tokens
    longgen:window=960,sink=64,full=4
    longgen:window=1024,sink=0,stride=16
    s2:window=1024,stride=8        one shard for each KV head
    s2:window=1024,stride=32,dense_every=2
    window:window=4096,sink=64     every layer

All take `block` too, the tokens of a block.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from edge_runtime.errors import ConfigError
from edge_runtime.models.attention import BLOCK_SIZE, FULL, AttentionPattern, LayerPattern, longgen, s2

CONFIG_ENTRY = "edge_attention"
"""Where a config.json of ours says it."""


def _window(num_layers: int, _kv_heads: int, *, window: int, sink: int = 0, block_size: int) -> AttentionPattern:
    return AttentionPattern.of_layers([LayerPattern(window=window, sink=sink)] * num_layers, block_size)


def _longgen(num_layers: int, _kv_heads: int, **options: int) -> AttentionPattern:
    return longgen(num_layers, **options)


_KINDS: dict[str, tuple[Callable[..., AttentionPattern], dict[str, str]]] = {
    "longgen": (_longgen, {"window": "window", "sink": "sink", "stride": "stride", "full": "num_full"}),
    "s2": (s2, {"window": "window", "stride": "stride", "sink": "sink", "dense_every": "dense_every"}),
    "window": (_window, {"window": "window", "sink": "sink"}),
}


def parse_pattern(words: str, num_layers: int, num_kv_heads: int) -> AttentionPattern:
    """Return what `--attention` says of a model with L layers and H_kv KV heads.

    Raises:
        ConfigError: A name or a number in it is not known, or they do not fit each other or the model.
    """
    kind, _, rest = words.partition(":")
    if kind not in _KINDS:
        raise ConfigError(f"attention is `{kind}`, expected one of {', '.join(_KINDS)}", _nearest(kind, list(_KINDS)))
    make, names = _KINDS[kind]
    options = {"block_size": BLOCK_SIZE}
    for part in filter(None, rest.split(",")):
        name, _, value = part.partition("=")
        if name not in (*names, "block"):
            raise ConfigError(f"attention {kind} has no `{name}`, it has {', '.join([*names, 'block'])}")
        if not value.isdecimal():
            raise ConfigError(f"attention {name} is `{value}`, expected a whole number", f"write {name}=64")
        options["block_size" if name == "block" else names[name]] = int(value)
    if kind == "window" and "window" not in options:
        raise ConfigError("attention pattern `window` needs a size", "for example window:window=4096")
    made = make(num_layers, num_kv_heads, **options)
    if all(layer.is_full for layer in made.patterns):
        raise ConfigError(f"attention {words} leaves all {num_layers} layers full", "make fewer of them full")
    return made


def check_words(words: str, config: dict[str, Any]) -> None:
    """Refuse what `parse_pattern` would, as far as the content of a config.json shows it, before torch is imported.

    Raises:
        ConfigError: The pattern is not known, or does not fit the model.
    """
    text = config.get("text_config") or config
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = [int(text[name]) for name in names if isinstance(text.get(name), int)]
    if len(sizes) == len(names):  # what a config.json leaves out, its class knows
        layers, heads, kv_heads = sizes
        for layer in parse_pattern(words, layers, kv_heads).patterns:
            layer.check(heads, kv_heads)


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean `{near[0]}`?" if near else f"for example `{known[0]}`"


def of_config(config: Any) -> AttentionPattern | None:
    """Return what a transformers config says that its layers see; None for everything.

    Natively hybrid families map onto the same description: a sliding window by tokens (transformers' mask is
    j > i - W), and Phi-3-small's shards by query head, whose convention is (j + h step + 1) % stride.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if (entry := getattr(text, CONFIG_ENTRY, None)) is not None:
        return AttentionPattern.from_json(entry)
    if getattr(text, "blocksparse_vert_stride", None):
        return _phi3_small(text)
    return _sliding(text)


def _sliding(text: Any) -> AttentionPattern | None:
    window = getattr(text, "sliding_window", None)
    longest = getattr(text, "max_position_embeddings", None)
    if not window or (longest and window >= longest) or getattr(text, "use_sliding_window", True) is False:
        return None
    local = LayerPattern(window=int(window), by_tokens=True)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return AttentionPattern.of_layers([local if "sliding" in kind else FULL for kind in kinds])


def _phi3_small(text: Any) -> AttentionPattern:
    """vLLM phi3_small.py: every `dense_attention_every_n_layers`-th layer is dense, heads slide by one block each."""
    heads, stride = text.num_attention_heads, text.blocksparse_vert_stride
    size, every = text.blocksparse_block_size, text.dense_attention_every_n_layers
    step = max(1, stride // heads)
    is_alike = getattr(text, "blocksparse_homo_head_pattern", False)
    offsets = (1,) if is_alike else tuple((head * step + 1) % stride for head in range(heads))
    sparse = LayerPattern(window=text.blocksparse_num_local_blocks * size, stride=stride, offsets=offsets)
    layers = [FULL if every and (layer + 1) % every == 0 else sparse for layer in range(text.num_hidden_layers)]
    return AttentionPattern.of_layers(layers, size)


def check_fits(pattern: AttentionPattern, config: Any) -> None:
    """Refuse a pattern that a model cannot have.

    Raises:
        ConfigError: Its layers or heads are not the model's.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if len(pattern.layers) != text.num_hidden_layers:
        raise ConfigError(
            f"the attention pattern has {len(pattern.layers)} layers, but the model has {text.num_hidden_layers}",
            "give the pattern again with --attention",
        )
    heads, kv_heads = shape_of(config)[1:]
    for layer in pattern.patterns:
        layer.check(heads, kv_heads)


def shape_of(config: Any) -> tuple[int, int, int]:
    """Return a model's layers, query heads and KV heads."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = int(text.num_attention_heads)
    return int(text.num_hidden_layers), heads, int(getattr(text, "num_key_value_heads", None) or heads)
