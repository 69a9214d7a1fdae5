"""A model learns a longer context with layers that see a part of it (LongGen, arXiv 2410.01485).

Windows are packed texts of the new length, each seen once, dropout 0. RoPE's base grows with the context where none is
given: theta' = theta * ratio ^ (D / (D - 2)), which lets the slowest frequency turn as far at the new length as it did
at the old one ("NTK-aware" scaling). The recipe of the paper (learning rate, data mixture) is not public; ours are
choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_export.corpus import Windows
from edge_export.hybrid.patterns import check_fits, check_words, of_config, parse_pattern, shape_of
from edge_export.hybrid.torch_attention import use_pattern
from edge_export.train import next_token_loss
from edge_runtime.errors import ConfigError
from edge_runtime.models.attention import AttentionPattern

if TYPE_CHECKING:
    import torch


@dataclass
class HybridAdaptation:
    """Attention to a part of the context, learned; see `adapt.Adaptation`.

    Attributes:
        attention: What layers see, in the words of `patterns`.
        context: Tokens of the new context; None for the model's own.
        rope_theta: RoPE's base; None for what the docstring above says.
        is_from_scratch: Whether the weights are drawn anew, of the source's shape (S2-Attention's own setting).
        seed: Random seed of such weights.
    """

    attention: str
    context: int | None = None
    rope_theta: float | None = None
    is_from_scratch: bool = False
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return what decides the outcome."""
        return {
            "attention": self.attention,
            "context": self.context,
            "rope_theta": self.rope_theta,
            "is_from_scratch": self.is_from_scratch,
        }

    def check_early(self, config: dict[str, Any]) -> None:
        """Refuse a pattern that config.json shows not to fit.

        Raises:
            ConfigError: Its words are not known, or its layers or heads are not the model's.
        """
        check_words(self.attention, config)

    def check(self, config: Any, window: int | None) -> None:
        """Refuse what a model of this transformers config, trained on windows of this length, cannot have.

        Raises:
            ConfigError: The pattern does not fit the model or the one it has, its RoPE is scaled, or a window is longer
                than the context.
        """
        pattern, context = self._pattern(config), self.context or config.max_position_embeddings
        if (natural := of_config(config)) is not None and natural != pattern:
            raise ConfigError("the model already has an attention pattern", "start from a dense model")
        if window is not None and window > context:
            raise ConfigError(
                f"window is {window} tokens, expected at most the context of {context}", "give a longer --context"
            )
        kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        if (context > config.max_position_embeddings or self.rope_theta) and kind != "default":
            raise ConfigError(
                f"the model uses {kind} RoPE scaling, which training does not support", "use a model without it"
            )

    def _pattern(self, config: Any) -> AttentionPattern:
        layers, _, kv_heads = shape_of(config)
        pattern = parse_pattern(self.attention, layers, kv_heads)
        check_fits(pattern, config)
        return pattern

    def begin(self, model: Any, windows: Windows, work: Path) -> Any:
        """Set the pattern, the context and RoPE's base; return the model, or one of its shape with random weights."""
        config, pattern = model.config, self._pattern(model.config)
        context = self.context or config.max_position_embeddings
        rope = dict(getattr(config, "rope_parameters", None) or {})
        if context > config.max_position_embeddings or self.rope_theta:
            rope["rope_theta"] = self.rope_theta or longer_base(
                float(rope["rope_theta"]), context / config.max_position_embeddings, _head_dim(config)
            )
            config.rope_parameters, config.max_position_embeddings = rope, context
            model = _rebuilt(model, self.seed if self.is_from_scratch else None)
        elif self.is_from_scratch:
            model = _rebuilt(model, self.seed)
        use_pattern(model, pattern)
        return model

    def loss(self, model: Any, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of every next token."""
        return next_token_loss(model, token_ids)

    def save(self, model: Any, folder: Path) -> None:
        """Write the model; its config says what its layers see."""
        model.config._attn_implementation = "sdpa"
        model.save_pretrained(folder)


def longer_base(theta: float, ratio: float, head_dim: int) -> float:
    """Return RoPE's base for a context `ratio` times as long."""
    return float(theta * ratio ** (head_dim / (head_dim - 2)))


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rebuilt(model: Any, seed: int | None) -> Any:
    """Return a model of the changed config: with the same weights, or with new ones."""
    import torch

    if seed is not None:
        torch.manual_seed(seed)
    new = type(model)(model.config)
    if seed is None:
        new.load_state_dict(model.state_dict())
    return new
