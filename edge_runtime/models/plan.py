"""How one model is compiled for CPU or GPU: every option of `LoadConfig` resolved once, with the reasons."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.config import LoadConfig
from edge_runtime.errors import ConfigError
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


@dataclass(frozen=True, kw_only=True)
class CompilePlan:
    """The outcome.

    Attributes:
        properties: What OpenVINO is given.
        num_threads: CPU threads; 0 where OpenVINO chooses.
        reason: Why the arithmetic is what it is.
        rounds_activations: Whether products with int8 and int4 weights round their activations.
    """

    properties: dict[str, Any]
    num_threads: int
    reason: str
    rounds_activations: bool


def make_plan(device: str, config: LoadConfig, weights: Weights, facts: CpuFacts | None = None) -> CompilePlan:
    """Resolve the options for a model on CPU or GPU.

    KV precision is always explicit: exporters write a hidden default into the IR, which would override the plugin's.

    Args:
        device: OpenVINO device.
        config: What the user asked for.
        weights: Facts about the model's weights.
        facts: About the CPU; None for this computer's.

    Raises:
        ConfigError: `cache_dir` cannot be written.
        DeviceError: The options would let OpenVINO end the process.
    """
    common: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "KV_CACHE_PRECISION": kv_precision(config)}
    if config.cache_dir:
        common["CACHE_DIR"] = usable_cache_dir(config.cache_dir)
    if not device.startswith("CPU"):
        asked = {} if config.precision == "auto" else {PRECISION: config.precision}
        reason = f"the {device}'s own choice" if config.precision == "auto" else "asked for"
        properties = {**common, **asked, **config.properties}
        return CompilePlan(properties=properties, num_threads=0, reason=reason, rounds_activations=False)
    facts = facts or cpu_facts()
    precision, reason = cpu_arithmetic(config, weights, facts)
    threads = _num_threads(config, weights, facts)
    wanted = {**common, **_cpu_properties(config, weights, precision, threads), **config.properties}
    properties = survivable(wanted, weights.has_floats, facts)
    if properties is not wanted:
        reason = "OpenVINO cannot compile these weights in bf16 for one thread on a CPU with AMX"
    rounds = weights.kind not in FLOATS and bool(properties[_GROUPS])
    return CompilePlan(properties=properties, num_threads=threads, reason=reason, rounds_activations=rounds)


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


def usable_cache_dir(folder: str | os.PathLike[str]) -> str:
    """Return the folder for compiled models, which is made if need be.

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
            f"cache_dir is `{os.fspath(folder):.90}`, which cannot be written: {reason}",
            "name a folder that can be written, or leave `cache_dir` out",
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
