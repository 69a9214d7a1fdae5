"""Which architectures optimum-intel exports as a decoder, so that others are refused before it and torch are imported.

A test holds the list equal to what optimum-intel itself answers.
"""

from __future__ import annotations

from edge_export.sources import Source, unsupported

_NAMES = """
afmoe aquila arcee arctic baichuan bart bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom chatglm
codegen cohere cohere2 dbrx deci deepseek deepseek_v2 deepseek_v3 exaone exaone4 falcon falcon_mamba gemma gemma2
gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm glm4 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoehybrid hunyuan_v1_dense internlm internlm2 jais lfm2
lfm2_moe llama llama4 llama4_text llava-qwen2 maira2 mamba marian mbart minicpm minicpm3 mistral mixtral mpt
muse_glimmer_text olmo olmo2 opt orion ouro pegasus persimmon phi phi3 phimoe qwen qwen2 qwen2_moe qwen3
qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen3_omni_moe_talker_text qwen3_omni_moe_text qwen3_vl_text
smollm3 stablelm starcoder2 xglm xverse zamba2
"""

KNOWN = frozenset(_NAMES.split())
"""`model_type`s with a cache of keys and values that the pinned optimum-intel knows."""


def check_family(source: Source) -> None:
    """Raise ExportError where a PyTorch checkpoint has an architecture that no exporter knows."""
    if source.onnx is None and source.model_type not in KNOWN:
        raise unsupported(source)
