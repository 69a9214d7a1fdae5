"""Families that nothing else here uses, each exported once, and rope variants: equal to PyTorch, or refused."""

import pytest

from edge_export.convert import export_model
from edge_runtime.errors import ContextOverflowError, ExportError
from edge_runtime.models.passes.block_sparse_attention import OURS_FROM
from tests import tiny_models
from tests.export.helpers import encode, runtime_logits, torch_logits
from tests.export.test_families import LOGITS_TOLERANCE, PROMPT, WINDOW
from tests.tiny_models import make_hf_model

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}

EQUAL = {
    "arcee": ("ArceeConfig", {}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "codegen": ("CodeGenConfig", {**_GPT, "rotary_dim": 8}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW}),
    "exaone4": ("Exaone4Config", {"sliding_window": WINDOW, "sliding_window_pattern": 2}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "glm": ("GlmConfig", {"head_dim": 16, "pad_token_id": 0}),
    "glm4": ("Glm4Config", {"head_dim": 16, "pad_token_id": 0}),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": ("GptOssConfig", {**_EXPERTS, "head_dim": 16, "sliding_window": WINDOW}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "granite": ("GraniteConfig", {}),
    "granitemoe": ("GraniteMoeConfig", _EXPERTS),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {"head_dim": 16, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "sliding_window": None}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "opt": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "pad_token_id": 1}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phimoe": ("PhimoeConfig", _EXPERTS),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 16}),
    "smollm3": ("SmolLM3Config", {"pad_token_id": 0}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}
REFUSED = {
    "gpt_neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        "sliding-window attention is recognised in 0 of 1 layers",
    ),
    "mpt": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}, "differs from its source"),
    "mamba": ("MambaConfig", {}, "exports `mamba` only with transformers up to"),
}
ROPES = {
    "llama": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "qwen2": {"rope_type": "yarn", "factor": 4.0},
    "phi3": {"rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [3.0] * 8},
}
FIRST_CONTEXT = 40


@pytest.mark.slow
@pytest.mark.parametrize("family", EQUAL)
def test_family_equals_pytorch(tmp_path, monkeypatch, family):
    monkeypatch.setitem(tiny_models.FAMILIES, family, EQUAL[family])
    source = make_hf_model(family, tmp_path / "hf")
    export_model(source, tmp_path / "ir", weights="fp32")
    ids = encode(tmp_path / "ir", PROMPT)
    wanted = torch_logits(source, ids)
    for least in (OURS_FROM, 1):  # OpenVINO's attention, which small models get, and what large ones get
        monkeypatch.setattr("edge_runtime.models.passes.block_sparse_attention.OURS_FROM", least)
        assert abs(runtime_logits(tmp_path / "ir", ids) - wanted).max() < LOGITS_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_family_that_would_be_wrong_is_refused(tmp_path, monkeypatch, family):
    """OpenVINO's PagedAttention loses GPT-Neo's window and MPT's position biases without a word."""
    *description, message = REFUSED[family]
    monkeypatch.setitem(tiny_models.FAMILIES, family, tuple(description))
    with pytest.raises(ExportError, match=message):
        export_model(make_hf_model(family, tmp_path / "hf"), tmp_path / "ir", weights="fp32")


def _export_with_rope(family, folder):
    rope = {"rope_theta": 10_000.0, "original_max_position_embeddings": FIRST_CONTEXT, **ROPES[family]}
    source = make_hf_model(family, folder / "hf", rope_parameters=rope, original_max_position_embeddings=FIRST_CONTEXT)
    return source, export_model(source, folder / "ir", weights="fp32")


@pytest.mark.parametrize(("family", "num_tokens"), [("llama", 55), ("qwen2", 55), ("phi3", FIRST_CONTEXT)])
def test_scaled_rope_equals_pytorch(tmp_path, family, num_tokens):
    source, report = _export_with_rope(family, tmp_path)
    ids = encode(report.output, PROMPT)[:num_tokens]
    assert len(ids) == num_tokens
    assert abs(runtime_logits(report.output, ids) - torch_logits(source, ids)).max() < LOGITS_TOLERANCE


def test_longrope_ends_where_its_frequencies_change(tmp_path):
    """Beyond, tokens that were read before would keep keys of the other frequencies."""
    _, report = _export_with_rope("phi3", tmp_path)
    assert report.manifest.context_length == FIRST_CONTEXT
    with pytest.raises(ContextOverflowError):
        runtime_logits(report.output, encode(report.output, PROMPT + PROMPT))
