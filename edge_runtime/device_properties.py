"""Properties of OpenVINO that a user may set, and those that are refused with what to do instead."""

from __future__ import annotations

from typing import Any

from edge_runtime.errors import ConfigError

_OPTION_OF = {
    "INFERENCE_PRECISION_HINT": "precision",
    "KV_CACHE_PRECISION": "kv_precision",
    "INFERENCE_NUM_THREADS": "num_threads",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "activation_group_size",
    "CACHE_DIR": "cache_dir",
    "NPUW_LLM_MAX_PROMPT_LEN": "context_length",
    "NPUW_LLM_MAX_GENERATION_TOKEN_LEN": "npu_step_tokens",
    "NPUW_LLM_PREFILL_CHUNK_SIZE": "prefill_chunk_size",
}
"""Properties that an option of ours sets, which knows what else follows from it."""
_HELD = {
    "DEVICE_PROPERTIES": "it could hold any other one",
    "KEY_CACHE_QUANT_MODE": "rolling back a rejected draft is exact in no other mode",
    "NPU_USE_NPUW": "language models run on the NPU in no other way",
    "NPUW_LLM": "language models run on the NPU in no other way",
    "NPUW_DEVICES": "nothing may run on another device than the one asked for",
    "NPUW_LLM_MIN_RESPONSE_LEN": "the context has room for one step behind the prompt",
    "NPUW_LLM_GENERATE_PYRAMID": "steps of several tokens fail between caches of two sizes",
    "NPUW_LLM_ENABLE_CONTINUOUS_PREFILL": "long prompts are read in pieces by it",
    "NPUW_LLM_ENABLE_PREFIX_CACHING": "it cannot be combined with reading a prompt in pieces",
    "NPUW_LLM_BATCH_DIM": "the graph's own axes are known",
    "NPUW_LLM_SEQ_LEN_DIM": "the graph's own axes are known",
}
"""Properties that right answers rest on, and why."""


def check_properties(option: str, values: Any) -> None:
    """Refuse what is no dictionary of properties, or holds one that cannot be set.

    Args:
        option: The option that holds them, for messages.
        values: Names and values.

    Raises:
        ConfigError: It does.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{option} is {values!r}, expected a dictionary from name to value")
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{option} holds the name {name!r}, expected one such as PERFORMANCE_HINT")
        if not isinstance(value, (str, bool, int, float)):
            raise ConfigError(f"{option} sets {name} to {value!r}, expected text, a number, True or False")
        if own := _OPTION_OF.get(name):
            raise ConfigError(f"{option} holds {name}, which has an option of its own", f"set `{own}` instead")
        if reason := _HELD.get(name):
            raise ConfigError(f"{option} holds {name}, which is fixed: {reason}", "leave it out")
