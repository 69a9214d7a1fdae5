"""How one model is compiled and run: every option of `LoadConfig` resolved once, for one device, with the reasons.

Passes, compilation and the models read a `CompilePlan` and nothing of `LoadConfig`. Two things are left to them, since
only the graph or a trial can tell: whether a model's layers are large enough for our attention op where nobody asked
for one, and in which form its fused MLPs are faster.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from edge_runtime.config import LoadConfig
from edge_runtime.devices import npuw_runs_on_cpu
from edge_runtime.errors import ConfigError, DeviceError
from edge_runtime.manifest import Manifest
from edge_runtime.models.attention import AttentionPattern
from edge_runtime.models.compiling import PRECISION, THREADS, survivable
from edge_runtime.models.cpu_facts import CpuFacts, cpu_facts
from edge_runtime.models.weights import FLOATS, Weights

SMALL_MODEL_BYTES = 6 << 20
"""Models below this are faster on one thread: waking a second one costs more than it saves. Measured on 2 cores: 4 MB
of f32 in 5 layers took 272 us a token on one thread, 317 on two; 9 MB of int8 in 6 layers, the embedded target, gave
636 tokens/s on one and 718 on two (`edge-run generate --threads N -K 0 --stats`)."""

ACTIVATION_GROUP_SIZE = 128
"""Activations share one int8 scale in groups of this many where weights are int8 or int4. OpenVINO's default is 32;
128 made the forward of a 1B model 1.1 to 1.4 times faster at int8 and int4, one token or five (2 cores, AVX-512 VNNI).
A group must not exceed the weights' own: twice theirs cost 1.5 to 3 times the time at five tokens."""

_GROUPS = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
KV_TYPES = ("f32", "bf16", "u8")
"""How our attention op can keep keys and values."""
UNKNOWN_CONTEXT_LENGTH = 1 << 20
"""Context on CPU and GPU where a folder does not say how long it is."""
NPU_CONTEXT_LENGTH = 2048
"""Context on the NPU where nobody names one: memory for all of it is taken at once, and each step reads all of it."""
_ASKED = ("precision", "kv_precision", "activation_group_size", "num_threads", "mlp", "attention", "properties")
"""Options that may be why a model does not compile."""
_UNKNOWN = Manifest(architecture="unknown", context_length=None, vocab_size=None)


@dataclass(frozen=True, kw_only=True)
class CompilePlan:
    """The outcome.

    Attributes:
        device: OpenVINO device.
        context_length: Most tokens of a sequence.
        chunk_size: Most tokens of a prompt in one forward.
        step_tokens: NPU: most tokens of one step.
        attention: `block_sparse` for our op, `stock` for OpenVINO's, `auto` for ours where the layers are large enough.
        pattern: What each layer sees, from the manifest; None for what the graph itself says.
        kv_type: How our op keeps keys and values, one of KV_TYPES; None where it cannot run.
        mlp: Form in which fused MLPs run: `fused`, `stock`, or `auto` for a trial.
        sparsity: Share of the MLPs' neurons that the model was exported to skip.
        is_exact: Whether our ops keep activations unrounded.
        hidden_layers: Layers whose output the model also returns, after the rows given to its last matrix product; None
            where it returns logits alone.
        num_threads: CPU threads; 0 where OpenVINO chooses.
        reason: Why the arithmetic is what it is.
        rounds_activations: Whether products with int8 and int4 weights round their activations.
        properties: What OpenVINO is given.
        asked: Options that the user set and that may keep a model from compiling, by name.
        prefix_cache_bytes: Most bytes of keys and values of earlier sequences that are kept for later ones.
        prefix_cache_dir: Folder where such keys and values outlive the process; None for nowhere.
    """

    device: str
    context_length: int
    chunk_size: int
    step_tokens: int
    attention: str
    pattern: AttentionPattern | None
    kv_type: str | None
    mlp: str
    sparsity: float
    is_exact: bool
    hidden_layers: tuple[int, ...] | None
    num_threads: int
    reason: str
    rounds_activations: bool
    properties: dict[str, Any]
    asked: dict[str, Any]
    prefix_cache_bytes: int
    prefix_cache_dir: Path | None

    @property
    def added_properties(self) -> dict[str, Any]:
        """Properties of OpenVINO that the user added."""
        added: dict[str, Any] = self.asked.get("properties", {})
        return added


class _Arithmetic(NamedTuple):
    """What a device is given to compile with, and why; fields of `CompilePlan`."""

    properties: dict[str, Any]
    reason: str
    num_threads: int = 0
    rounds_activations: bool = False


def make_plan(
    device: str,
    config: LoadConfig,
    weights: Weights,
    manifest: Manifest = _UNKNOWN,
    *,
    facts: CpuFacts | None = None,
    wants_hidden: bool = False,
) -> CompilePlan:
    """Resolve the options for one model.

    Args:
        device: OpenVINO device, in its spelling.
        config: What the user asked of this model.
        weights: Facts about the model's weights.
        manifest: Facts about the model; without them nothing but its weights is known.
        facts: About the CPU; None for this computer's.
        wants_hidden: Whether the model returns hidden states too.

    Raises:
        ConfigError: An option has a value that the device or the model does not take, or a folder cannot be written.
        DeviceError: The device has no kernel for the model's attention, its keys and values cannot be kept in files,
            or OpenVINO would end the process.
    """
    attention = _attention(device, config, manifest.attention)
    kept_in = config.prefix_cache_dir
    if kept_in and device != "CPU":
        raise DeviceError(f"keys and values on {device} cannot be kept in files", "leave `prefix_cache_dir` out")
    context_length = _context_length(device, config, manifest)
    if device.startswith("NPU"):
        arithmetic = _Arithmetic(_npu_properties(config, context_length), "the NPU has no other")
    elif device.startswith("CPU"):
        arithmetic = _cpu(config, weights, facts or cpu_facts())
    else:
        arithmetic = _gpu(device, config)
    default = LoadConfig()
    return CompilePlan(
        device=device,
        context_length=context_length,
        chunk_size=config.prefill_chunk_size,
        step_tokens=config.npu_step_tokens or 1,
        attention=attention,
        pattern=manifest.attention,
        kv_type=None if attention == "stock" else kv_precision(config),
        mlp=config.mlp if device == "CPU" else "stock",
        sparsity=(manifest.mlp and manifest.mlp.activation_sparsity) or 0.0,
        is_exact=activation_group_size(config, None) == 0,
        hidden_layers=manifest.hidden_layers if wants_hidden else None,
        asked={name: value for name in _ASKED if (value := getattr(config, name)) != getattr(default, name)},
        prefix_cache_bytes=config.prefix_cache_bytes,
        prefix_cache_dir=Path(usable_dir("prefix_cache_dir", kept_in)) if kept_in else None,
        **arithmetic._asdict(),
    )


def _attention(device: str, config: LoadConfig, pattern: AttentionPattern | None) -> str:
    """Return the attention op, as far as it can be told before the graph is seen; see `CompilePlan`."""
    if config.attention == "stock" and pattern is not None:
        raise ConfigError(
            "this model uses sparse attention, which attention=stock does not support",
            "leave `attention` at auto",
        )
    is_wanted = pattern is not None or config.attention == "block_sparse"
    if is_wanted and device != "CPU":
        raise DeviceError(f"{device} has no kernel for block-sparse attention", "run the model on CPU")
    kept = kv_precision(config)
    if is_wanted and kept not in KV_TYPES:
        raise ConfigError(
            f"kv_precision is {kept}, expected one of {', '.join(KV_TYPES)} with block-sparse attention",
            "leave `kv_precision` at auto",
        )
    if is_wanted:
        return "block_sparse"
    return "stock" if device != "CPU" or kept not in KV_TYPES else config.attention


def _context_length(device: str, config: LoadConfig, manifest: Manifest) -> int:
    lengths = [length for length in (manifest.context_length, config.context_length) if length]
    if device.startswith("NPU") and config.context_length is None:
        lengths.append(NPU_CONTEXT_LENGTH)
    return min(lengths, default=UNKNOWN_CONTEXT_LENGTH)


def _common_properties(config: LoadConfig) -> dict[str, Any]:
    """Return what CPU and GPU are given alike.

    KV precision is always explicit: exporters write a hidden default into the IR, which would override the plugin's.
    """
    common = {"PERFORMANCE_HINT": "LATENCY", "KV_CACHE_PRECISION": kv_precision(config)}
    return common | ({"CACHE_DIR": usable_dir("cache_dir", config.cache_dir)} if config.cache_dir else {})


def _gpu(device: str, config: LoadConfig) -> _Arithmetic:
    asked = {} if config.precision == "auto" else {PRECISION: config.precision}
    reason = f"the {device}'s own choice" if config.precision == "auto" else "asked for"
    return _Arithmetic({**_common_properties(config), **asked, **config.properties}, reason)


def _cpu(config: LoadConfig, weights: Weights, facts: CpuFacts) -> _Arithmetic:
    precision, reason = cpu_arithmetic(config, weights, facts)
    threads = _num_threads(config, weights, facts)
    own = _cpu_properties(config, weights, precision, threads)
    wanted = {**_common_properties(config), **own, **config.properties}
    properties = survivable(wanted, weights.has_floats, facts)
    if properties is not wanted:
        reason = "OpenVINO cannot compile these weights in bf16 for one thread on a CPU with AMX"
    rounds = weights.kind not in FLOATS and bool(properties[_GROUPS])
    return _Arithmetic(properties, reason, threads, rounds)


def cpu_arithmetic(config: LoadConfig, weights: Weights, facts: CpuFacts) -> tuple[str | None, str]:
    """Return the arithmetic on the CPU, None for the plugin's own choice, and why.

    A CPU with bf16 decodes int8 and int4 weights about half as fast in it as in f32 with activations that are rounded
    in groups, and no better. Measured on a CPU with AMX before this was the default, with the options set by hand: 10.4
    against 20.7 tokens/s of 1 billion int8 weights, 15.2 against 28.9 of int4 (`benchmarks/decode.py` compares them).
    Weights of 16 bits are read as they are in bf16, and as twice as many bytes in f32.
    """
    if config.precision != "auto":
        return config.precision, "asked for"
    if not facts.has_bf16:
        return None, "this CPU has no bf16"
    if weights.kind == "16-bit":
        return None, "OpenVINO's own choice for 16-bit weights"
    if weights.kind == "f32":
        return "f32", "f32 weights would lose bits in bf16"
    return "f32", f"{weights.kind} weights decode faster so than in bf16"


def activation_group_size(config: LoadConfig, weight_group_size: int | None) -> int:
    """Return how many activations share an int8 scale; 0 where they are not rounded.

    The plugin rounds them in another way for one token than for several: verifying a block then differs from plain
    decoding by as much as rounding does (logits by 3 % of their deviation in a 1B model): not where f32 was asked for.
    """
    if config.activation_group_size is not None:
        return config.activation_group_size
    return 0 if config.precision == "f32" else min(ACTIVATION_GROUP_SIZE, weight_group_size or ACTIVATION_GROUP_SIZE)


def kv_precision(config: LoadConfig) -> str:
    """Return the storage type of keys and values: f32 where exactness was asked for, else u8."""
    if config.kv_precision != "auto":
        return config.kv_precision
    return "f32" if config.precision == "f32" else "u8"


def usable_dir(option: str, folder: str | os.PathLike[str]) -> str:
    """Return the folder that an option names, which is made if need be.

    Raises:
        ConfigError: Nothing can be written there.
    """
    import tempfile  # with what it imports 13 ms, which nobody else needs

    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return os.fspath(folder)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{option} is `{os.fspath(folder):.90}`, which cannot be written: {reason}",
            f"name a folder that can be written, or leave `{option}` out",
        ) from error


def _num_threads(config: LoadConfig, weights: Weights, facts: CpuFacts) -> int:
    """Return the CPU threads for a model; 0 leaves the choice to OpenVINO."""
    if config.num_threads or weights.num_bytes >= SMALL_MODEL_BYTES:
        return config.num_threads
    needs_two = config.precision == "bf16" and weights.has_floats and facts.may_have_amx
    return 0 if needs_two else 1


def _cpu_properties(config: LoadConfig, weights: Weights, precision: str | None, threads: int) -> dict[str, Any]:
    properties: dict[str, Any] = {
        _GROUPS: activation_group_size(config, weights.group_size),
        # By channel, the plugin's default, each token rescales its block of keys, and a rejected draft leaves its trace
        # in the scale. By token, rolling back is exact: speculation leaves what plain decoding leaves.
        "KEY_CACHE_QUANT_MODE": "BY_TOKEN",
    }
    if precision:
        properties[PRECISION] = precision
    if threads:
        properties[THREADS] = threads
    if threads == 1:
        # Pinned, it runs on the first core, as every other such process does: two of them took 5.3 ms a token and
        # left a core idle; unpinned 2.1 ms, and as much as pinned when alone (benchmarks/processes.py).
        properties["ENABLE_CPU_PINNING"] = False
    return properties


def _npu_properties(config: LoadConfig, context_length: int) -> dict[str, Any]:
    """Return the properties that a model is compiled with for NPU, by OpenVINO's NPUW.

    NPUW rounds prompt and response up to multiples of 64 and holds their sum less one step: room for the context.
    `NPUW_DEVICES` is explicit because its default moves to the CPU, without a word, what the NPU cannot run. One size
    of cache (no pyramid), because changing from one to the next fails in a step of several tokens (2026.4.1).

    Raises:
        ConfigError: An option has a value that other devices take and the NPU does not.
    """
    for name in ("precision", "kv_precision"):
        if getattr(config, name) not in ("auto", "f16"):
            raise ConfigError(
                f"{name} is {getattr(config, name)}, but the NPU computes and stores in f16",
                f"leave `{name}` at auto, or run the target on another device",
            )
    chunk, step_tokens = config.prefill_chunk_size, config.npu_step_tokens or 1
    if chunk < step_tokens or chunk & (chunk - 1):
        raise ConfigError(f"prefill_chunk_size is {chunk}, expected a power of two of at least {step_tokens} on NPU")
    properties: dict[str, Any] = {
        "NPU_USE_NPUW": "YES",
        "NPUW_LLM": "YES",
        "NPUW_DEVICES": "CPU" if npuw_runs_on_cpu() else "NPU",
        "NPUW_LLM_MAX_PROMPT_LEN": context_length,
        "NPUW_LLM_MIN_RESPONSE_LEN": step_tokens,
        "NPUW_LLM_MAX_GENERATION_TOKEN_LEN": step_tokens,
        "NPUW_LLM_PREFILL_CHUNK_SIZE": chunk,
        "NPUW_LLM_GENERATE_PYRAMID": "NO",
    }
    if chunk < context_length:
        properties["NPUW_LLM_ENABLE_CONTINUOUS_PREFILL"] = "YES"
    if npuw_runs_on_cpu():
        properties["NPUW_F16IC"] = "NO"  # the parts compute in f32 there, and hand it on
    if config.cache_dir:
        properties["CACHE_DIR"] = usable_dir("cache_dir", config.cache_dir)
    return {**properties, **config.properties}
