"""The draft's shape: the target's vocabulary, few layers, a narrow body.

Depth costs latency, width little (FastDraft section 3; measured again by `edge-run bench draft`), so the depth is fixed
first and the width found from the parameter budget. The body is a Llama's: every engine runs it. Where no budget is
given it comes from time (`auto_shape.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_runtime.errors import ConfigError

if TYPE_CHECKING:
    from transformers import LlamaConfig

HEAD_DIMS = (64, 32)
"""Width of a head: the first that divides the model's width."""
WIDTH_STEP = 32
FFN_STEP = 64
DEPTH_WIDTH = 64
"""Width that a shape should have for each of its layers."""
FFN_RATIO = 8 / 3
"""SwiGLU's inner width for each hidden one: as many parameters as a plain MLP of four times the width."""
MAX_LAYERS = 6
"""The released FastDraft models have six layers of width 512."""


def draft_config(
    *,
    num_parameters: float,
    num_layers: int | None = None,
    vocab_size: int,
    context_length: int,
    special_tokens: dict[str, Any],
    tie_embeddings: bool = True,
) -> LlamaConfig:
    """Return the Llama shape nearest to a parameter budget.

    Args:
        num_parameters: Wanted, embeddings included.
        num_layers: Depth; None takes the deepest up to MAX_LAYERS whose body is at least as wide as deep shapes need
            (64 of width for each layer).
        vocab_size: The target's.
        context_length: The target's.
        special_tokens: bos_token_id, eos_token_id and pad_token_id as the target has them.
        tie_embeddings: Share input and output embeddings: for small drafts they are most of the parameters.

    Raises:
        ConfigError: The budget does not hold the vocabulary at the smallest width.
    """
    from transformers import LlamaConfig

    layers = num_layers or _depth(num_parameters, vocab_size, tie_embeddings)
    width = _width(num_parameters, layers, vocab_size, tie_embeddings)
    if width < WIDTH_STEP:
        least = count_parameters(WIDTH_STEP, 1, vocab_size, tie_embeddings)
        raise ConfigError(
            f"{num_parameters:,.0f} parameters are too few for a vocabulary of {vocab_size:,}",
            f"the smallest draft for this vocabulary has {least:,} parameters",
        )
    head_dim = next(dim for dim in HEAD_DIMS if width % dim == 0)
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn_width(width),
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        num_key_value_heads=width // head_dim,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_embeddings,
        attention_dropout=0.0,
        **special_tokens,
    )


def count_parameters(width: int, layers: int, vocab_size: int, tie_embeddings: bool) -> int:
    """Return the parameters of such a Llama: embeddings, 4 attention and 3 MLP matrices a layer, norms."""
    layer = 4 * width * width + 3 * width * ffn_width(width) + 2 * width
    return vocab_size * width * (1 if tie_embeddings else 2) + layers * layer + width


def ffn_width(width: int) -> int:
    """Return the MLP's inner width: 8/3 of the hidden one, rounded up to a multiple of 64."""
    return -int(-width * FFN_RATIO // FFN_STEP) * FFN_STEP


def _width(num_parameters: float, layers: int, vocab_size: int, tie_embeddings: bool) -> int:
    """Return the width whose model is nearest to the budget; 0 where even the smallest is above twice of it."""
    width = WIDTH_STEP
    if count_parameters(width, layers, vocab_size, tie_embeddings) > 2 * num_parameters:
        return 0
    while count_parameters(width + WIDTH_STEP, layers, vocab_size, tie_embeddings) <= num_parameters:
        width += WIDTH_STEP
    below, above = (
        abs(count_parameters(w, layers, vocab_size, tie_embeddings) - num_parameters)
        for w in (width, width + WIDTH_STEP)
    )
    return width if below <= above else width + WIDTH_STEP


def _depth(num_parameters: float, vocab_size: int, tie_embeddings: bool) -> int:
    for layers in range(MAX_LAYERS, 1, -1):
        if _width(num_parameters, layers, vocab_size, tie_embeddings) >= layers * DEPTH_WIDTH:
            return layers
    return 1
