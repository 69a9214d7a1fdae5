"""Tiny random causal language models as Hugging Face folders, and their exports, for every test that needs a model.

Weights are random but large enough that logits spread over a few units, so a wrong rope, mask, norm or cache shows.
Each tokenizer is a byte-level BPE learnt from a handful of sentences: any UTF-8 text goes in and comes out unchanged.

    folder = make_hf_model("llama", tmp_path / "llama")       # a Hugging Face folder
    ir = export_tiny("llama", tmp_path / "llama-ir")          # the same, exported in fp32

A test takes the fixture `tiny_ir` and calls it: `tiny_ir("llama")` is a folder exported once per session.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCES = (
    "Once upon a time there was a little fox who lived in a quiet forest.",
    "The little fox liked to run, and the little bird liked to sing in the forest.",
    "def add(left, right):\n    return left + right\n",
    "One day the bird said to the fox: let us walk to the river together.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
)
EOS_TOKEN, USER_TOKEN, ASSISTANT_TOKEN = SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT_LENGTH = 512

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "initializer_range": 0.2,
}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24}

# Each family with what it adds to Llama: biases, q/k norms, fused projections, local attention, soft caps, learnt
# positions. The first name is the transformers config class.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {"pad_token_id": 0, "sliding_window": None}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT_LENGTH}),
}


def make_tokenizer(folder: Path, vocab_size: int = 384) -> int:
    """Write a byte-level BPE tokenizer in Hugging Face format into `folder`; return its number of entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def make_hf_model(family: str, folder: Path, *, vocab_size: int = 384, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of `family` with its tokenizer as a Hugging Face folder.

    Args:
        family: A key of `FAMILIES`.
        folder: Created if missing.
        vocab_size: Rows of the embedding; the tokenizer has at most this many entries.
        seed: Of the weights.
        overrides: Entries of the family's transformers config.
    """
    from edge_export.quiet import quiet

    with quiet():
        import torch
        import transformers

        folder.mkdir(parents=True, exist_ok=True)
        make_tokenizer(folder, vocab_size)
        config_class, extra = FAMILIES[family]
        sizes = _SIZES if family != "gpt2" else {"initializer_range": _SIZES["initializer_range"]}
        tokens = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
        config = getattr(transformers, config_class)(**{**sizes, **tokens, **extra, **overrides})
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start as ones and zeros, which hide a lost one
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def export_tiny(family: str, folder: Path, *, weights: str = "fp32", **overrides: Any) -> Path:
    """Make a tiny model of `family` beside `folder` and export it into `folder`; return `folder`."""
    from edge_export.convert import export_model

    source = make_hf_model(family, folder.with_name(folder.name + "-hf"), **overrides)
    export_model(source, folder, weights=weights)
    return folder


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family to its Hugging Face folder, made once per session."""
    return _once(lambda family: make_hf_model(family, tmp_path_factory.mktemp(family) / "hf"))


@pytest.fixture(scope="session")
def tiny_ir(tiny_hf: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a family to its model folder, exported once per session in fp32."""

    def export(family: str) -> Path:
        from edge_export.convert import export_model

        folder = tmp_path_factory.mktemp(family) / "ir"
        export_model(tiny_hf(family), folder, weights="fp32")
        return folder

    return _once(export)


def _once(make: Callable[[str], Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in made:
            made[key] = make(key)
        return made[key]

    return get
