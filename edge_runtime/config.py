"""Every option and its default, in one place: the Python API, the command line and the server read them from here.

`LoadConfig` is fixed when a model is loaded, `GenerationConfig` belongs to one request. Unknown names raise and
suggest the nearest; a value that cannot be honoured raises; nothing is adjusted silently.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, Self

from edge_runtime.device_properties import check_properties
from edge_runtime.errors import ConfigError, nearest

PRECISIONS = ("auto", "f32", "bf16", "f16")
KV_PRECISIONS = ("auto", "f32", "bf16", "f16", "u8", "u4")
MLPS = ("auto", "fused", "stock")
ATTENTIONS = ("auto", "block_sparse", "stock")
NPU_VERIFIED_TOKENS = 8
"""Tokens of one step of an NPU target with a draft. A step compiled for 1, 8, 16 or 32 tokens took 12, 18, 22 or 30 ms
however many it was given (NPUW on CPU, 2 cores, 33 MB of int8 weights)."""


class KeywordOptions:
    """Construct a dataclass from a caller's keywords, naming what is wrong with them."""

    @classmethod
    def from_options(cls, base: Self | None = None, /, **options: Any) -> Self:
        """Build the config from keyword options.

        Args:
            base: Values of the options that are not given; None for the defaults.
            **options: Fields of the config.

        Raises:
            ConfigError: An option is unknown (the nearest name is suggested) or has a bad value.
        """
        known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option `{name}`", _hint_for(name, known))
        if base is None:
            return cls(**options)
        if not isinstance(base, cls):
            told = f"config is {base!r:.60}, expected a {cls.__name__}"
            raise ConfigError(told, f"options are keywords, such as {known[0]}=…")
        return dataclasses.replace(base, **options)  # type: ignore[type-var]

    def _make_numbers_plain(self) -> None:
        """Turn numbers of other libraries into Python's: numpy's would change the arithmetic that they meet."""
        for option in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, option.name, _plain(getattr(self, option.name)))


def _hint_for(unknown: str, known: list[str]) -> str:
    """Suggest the option that an unknown one begins, or else resembles most."""
    if unknown == "system":
        return 'a system message is the first of the messages: [{"role": "system", "content": …}, …]'
    near = nearest(unknown, known)
    return f"did you mean `{near}`?" if near else f"known options: {', '.join(known)}"


@dataclass(frozen=True, kw_only=True)
class LoadConfig(KeywordOptions):
    """How models are compiled.

    Attributes:
        device: OpenVINO device of the target: `CPU`, `GPU`, `GPU.1`, `NPU`.
        draft_device: Device of the draft; None for the target's.
        precision: Arithmetic. `auto` is what decodes fastest: on CPU f32 for int8, int4 and f32 weights and OpenVINO's
            own choice for 16-bit weights (bf16 where the CPU has it), on other devices their own choice. Activations
            are then rounded, so answers may differ at near-ties; `f32` alone is exact, which makes greedy speculative
            output equal plain output token for token.
        kv_precision: Storage of keys and values. `auto` is f32 with `precision="f32"`, else u8. The NPU computes and
            stores in f16; a draft there does so whatever is asked of the target, whose answers it cannot change.
        activation_group_size: CPU: activations that share a scale when they are rounded to int8 for the product with
            int8 or int4 weights; 0 disables rounding. None is 0 with `precision="f32"`, where verifying a block is to
            equal plain decoding, and else 128 or the weights' quantisation group. Rounding makes drafted blocks and
            prompts much faster.
        num_threads: CPU threads; 0 for the device's choice (one for models too small to share).
        prefill_chunk_size: Prompt tokens per forward: bounds memory and how long a cancel can take. On NPU a power of
            two.
        context_length: Most tokens held, prompt and answer together, where the model's own context is not shorter.
            None for the model's own; on NPU, which takes the memory for all of them at once, for at most 2048.
        npu_step_tokens: Most tokens of one step of the target on NPU, the last one and those drafted after it: 1 or a
            multiple of 8; more are verified in several steps. Shapes are static there, so that a step costs what this
            many tokens cost. None for 8 with a draft and 1 without, where prompt lookup then gains nothing.
        mlp: For models exported with fused MLPs, on CPU: `fused` runs them as exported, `stock` in OpenVINO's own ops,
            which skip no neuron; `auto` times the first layer in both while it loads, and takes `stock` only where that
            is clearly faster. Other devices have no kernel for them and run `stock`, with a logged warning.
        attention: On CPU: `block_sparse` is our own op, whose caches hold only what each layer's pattern still sees;
            `stock` is OpenVINO's PagedAttention, which always holds everything. `auto` takes ours for models exported
            with a pattern, and for others where it is faster: all but small ones.
        cache_dir: Where compiled models are kept between runs; None for nowhere. On CPU they load no faster with it:
            SmolLM2-135M int8 took 2.6 s with and 2.3 s without.
        prefix_cache_bytes: Most bytes of keys and values of earlier requests that each model keeps for later ones that
            begin alike: the next turn of a chat, the same instructions. The longest unused go first, and of one that is
            too long its beginning stays; 0 keeps none.
        prefix_cache_dir: On CPU, folder where as many bytes of them are kept between runs, of all models that share the
            folder; written when they leave memory, or when the model is closed. None for nowhere.
        properties: OpenVINO's own properties of the target by name, such as `{"ENABLE_CPU_PINNING": False}`. They win
            over ours; those that another option sets, or that right answers rest on, are refused.
        draft_properties: OpenVINO properties of the draft. None takes `properties` where both run on one device.
    """

    device: str = "CPU"
    draft_device: str | None = None
    precision: str = "auto"
    kv_precision: str = "auto"
    activation_group_size: int | None = None
    num_threads: int = 0
    prefill_chunk_size: int = 512
    context_length: int | None = None
    npu_step_tokens: int | None = None
    mlp: str = "auto"
    attention: str = "auto"
    cache_dir: str | os.PathLike[str] | None = None
    prefix_cache_bytes: int = 1 << 30
    prefix_cache_dir: str | os.PathLike[str] | None = None
    properties: dict[str, Any] = field(default_factory=dict)
    draft_properties: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _name("device", self.device)
        if self.draft_device is not None:
            _name("draft_device", self.draft_device)
        _choice("precision", self.precision, PRECISIONS)
        _choice("kv_precision", self.kv_precision, KV_PRECISIONS)
        if self.activation_group_size is not None:
            _integer("activation_group_size", self.activation_group_size, 0, _LARGEST_INT)
        _choice("mlp", self.mlp, MLPS)
        _choice("attention", self.attention, ATTENTIONS)
        _integer("num_threads", self.num_threads, 0, _LARGEST_INT)
        _integer("prefill_chunk_size", self.prefill_chunk_size, 1)
        if self.context_length is not None:
            _integer("context_length", self.context_length, 2)
        if self.npu_step_tokens is not None:
            _integer("npu_step_tokens", self.npu_step_tokens, 1, 128)
            if self.npu_step_tokens > 1 and self.npu_step_tokens % 8:
                raise ConfigError(f"npu_step_tokens is {self.npu_step_tokens}, expected 1 or a multiple of 8")
        _integer("prefix_cache_bytes", self.prefix_cache_bytes, 0)
        for name in ("cache_dir", "prefix_cache_dir"):
            if getattr(self, name) is not None:
                _path(name, getattr(self, name))
        check_properties("properties", self.properties)
        if self.draft_properties is not None:
            check_properties("draft_properties", self.draft_properties)
        self._make_numbers_plain()

    def for_target(self, has_draft: bool) -> Self:
        """Return what the target is compiled with."""
        step_tokens = self.npu_step_tokens or (NPU_VERIFIED_TOKENS if has_draft else 1)
        return dataclasses.replace(self, npu_step_tokens=step_tokens)

    def for_draft(self) -> Self:
        """Return what the draft is compiled with."""
        device, properties = self.draft_device or self.device, self.draft_properties
        if properties is None:
            properties = self.properties if device.upper() == self.device.upper() else {}
        config = dataclasses.replace(self, device=device, npu_step_tokens=1, properties=properties)
        if not config.device.upper().startswith("CPU"):
            config = dataclasses.replace(config, prefix_cache_dir=None)
        if not config.device.upper().startswith("NPU"):
            return config
        return dataclasses.replace(config, precision="auto", kv_precision="auto", attention="auto")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(KeywordOptions):
    """What one request asks for.

    Attributes:
        max_new_tokens: Upper bound of emitted tokens; the context's remaining room bounds it too.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of most likely tokens whose probability reaches top_p; 1 keeps all.
        min_p: Keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        repetition_penalty: > 1 divides positive and multiplies negative logits of every token seen (CTRL, Keskar 2019).
        presence_penalty: Subtracted from the logit of every token already generated.
        frequency_penalty: Subtracted once for each time that the token was generated.
        logit_bias: Token id to a number added to its logit; -inf forbids it.
        seed: Fixes the random numbers of each position, so that in exact arithmetic the answer is the same however it
            is drafted. At default precision, where rounding depends on the width of a forward, 70 of 80 answers of
            SmolLM2-135M int8 and 650 of 650 of the embedded pair were the same (CPU without bf16). Fewer drafts are
            accepted than without a seed: 0.29 for 0.38 at temperature 1. None draws new numbers.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Ids that end the answer beside the model's own.
        ignore_eos: Go on past the model's own end-of-text tokens (for measurements).
        logprobs: Report this many most likely tokens with each emitted one, as log-probabilities of the model's own
            distribution (before penalties and temperature); None reports nothing.
        num_draft_tokens: K, tokens drafted for each target forward (γ in Leviathan et al. 2023,
            `num_assistant_tokens` elsewhere). `auto` chooses it at each step by measured cost, down to 0.
        max_draft_tokens: Upper bound of `auto`.
        lookup: Also draft by prompt lookup: copy what followed the last earlier occurrence of the current ending.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    num_draft_tokens: int | Literal["auto"] = "auto"
    max_draft_tokens: int = 8
    lookup: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", (self.stop,) if isinstance(self.stop, str) else self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _integer("max_new_tokens", self.max_new_tokens, 1)
        _within("temperature", self.temperature, 0, _LARGEST)
        _integer("top_k", self.top_k, 0)
        _within("top_p", self.top_p, 0, 1, low_open=True)
        _within("min_p", self.min_p, 0, 1)
        _within("repetition_penalty", self.repetition_penalty, 1 / _LARGEST, _LARGEST)
        _within("presence_penalty", self.presence_penalty, -_LARGEST, _LARGEST)
        _within("frequency_penalty", self.frequency_penalty, -_LARGEST, _LARGEST)
        _logit_bias("logit_bias", self.logit_bias)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        check_flag("ignore_eos", self.ignore_eos)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, 100)
        if self.num_draft_tokens != "auto":
            if isinstance(self.num_draft_tokens, str):
                raise ConfigError(f"num_draft_tokens is {self.num_draft_tokens!r:.60}, expected `auto` or a number")
            _integer("num_draft_tokens", self.num_draft_tokens, 0, 64)
        _integer("max_draft_tokens", self.max_draft_tokens, 1, 64)
        check_flag("lookup", self.lookup)
        self._make_numbers_plain()

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


_LARGEST_INT = (1 << 31) - 1
"""Bound of what OpenVINO keeps in 32 bits."""
_LARGEST = 1e30
"""Bound of what has none: it keeps infinity and NaN out of float32 arithmetic."""


def _plain(value: Any) -> Any:
    """Return a number, or those within a tuple or dictionary, as Python's int or float; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if type(value) in (bool, int, float):
        return value
    return int(value) if isinstance(value, Integral) else float(value) if isinstance(value, Real) else value


def _is_a(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _within(name: str, value: Any, low: float, high: float, *, low_open: bool = False) -> None:
    if not _is_a(Real, value):
        raise ConfigError(f"{name} is {value!r}, expected a number")
    if not low <= value <= high or (low_open and value == low):
        raise ConfigError(f"{name} is {value}, expected {_bounds(low, high, low_open)}")


def _bounds(low: float, high: float, low_open: bool) -> str:
    lower = "" if low == -_LARGEST else f"above {low:g}" if low_open else f"at least {low:g}"
    upper = "" if high >= _LARGEST else f"at most {high:g}"
    return " and ".join(filter(None, (lower, upper))) or "a finite number"


def _integer(name: str, value: Any, low: int, high: float = float("inf")) -> None:
    if not _is_a(Integral, value):
        raise ConfigError(f"{name} is {value!r}, expected a whole number")
    _within(name, value, low, high)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, expected True or False")


def _strings(name: str, values: Any) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        raise ConfigError(f"{name} is {values!r}, expected a string or a list of strings")
    if not all(values):
        raise ConfigError(f"{name} holds an empty string, which would end every answer at once", "leave it out")
    return tuple(values)


def _token_ids(name: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)):
        raise ConfigError(f"{name} is {values!r}, expected a list of token ids")
    for value in values:
        _integer(f"an entry of {name}", value, 0)
    return tuple(values)


def _logit_bias(name: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{name} is {values!r}, expected a dictionary from token id to number")
    for token_id, bias in values.items():
        _integer(f"a token id of {name}", token_id, 0)
        if bias != float("-inf"):  # which forbids the token
            _within(f"{name}[{token_id}]", bias, -_LARGEST, _LARGEST)


def _name(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} is {value!r}, expected a name such as CPU or GPU")


def _path(name: str, value: Any) -> None:
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name} is {value!r}, expected a folder")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} is {value!r}, expected one of {', '.join(choices)}")
