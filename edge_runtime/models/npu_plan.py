"""How a model is compiled for the NPU, by OpenVINO's NPUW: every option of `LoadConfig` resolved once."""

from __future__ import annotations

from typing import Any

from edge_runtime.config import LoadConfig
from edge_runtime.devices import npuw_runs_on_cpu
from edge_runtime.errors import ConfigError
from edge_runtime.models.plan import usable_cache_dir


def npu_properties(config: LoadConfig, context_length: int) -> dict[str, Any]:
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
        properties["CACHE_DIR"] = usable_cache_dir(config.cache_dir)
    return {**properties, **config.properties}
