"""A chat ends its turns at whatever token the model's files or its chat template end them with, and at nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_runtime.manifest import MODEL_NAME, Manifest, load_manifest
from edge_runtime.text.tokenizer import Tokenizer
from edge_runtime.text.turn_ends import answer_ends, further_ends, template_end

TURN = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
CHATML = "{% for message in messages %}" + TURN + "{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\\nAnswer.<|im_end|>\\n{% endif %}"

_NAMES = ("im_start", "im_end", "user", "assistant", "end", "start", "return", "head", "/head", "eot", "endoftext")
ADDED = [*(f"<|{name}|>" for name in _NAMES), "<s>", "</s>", "[INST]", "[/INST]"]


@pytest.fixture
def written(tmp_path):
    """Return a function from a chat template and special tokens to a tokenizer that has these tokens.

    It knows bytes, and as added tokens those of several families.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    def write(template: str | None, **special: str) -> Tokenizer:
        made = Library(
            models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
        )
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        made.add_special_tokens(ADDED)
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **special}))
        return Tokenizer(tmp_path)

    return write


@pytest.mark.parametrize(
    ("template", "special", "end"),
    [
        (CHATML + ASK, {}, "<|im_end|>"),
        (DEFAULT_SYSTEM + CHATML + ASK, {"bos_token": "<|im_start|>"}, "<|im_end|>"),  # SmolLM2
        (  # Llama 3
            "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content }}<|eot|>{% endfor %}"
            "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}",
            {"bos_token": "<s>"},
            "<|eot|>",
        ),
        (  # Llama 2, Mistral: words or tokens around the user, the end after a space
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
            " {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
            {"bos_token": "<s>", "eos_token": "</s>"},
            "</s>",
        ),
        (  # Phi-3: two ends, the first is the turn's
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
            {"eos_token": "<|endoftext|>"},
            "<|end|>",
        ),
        (  # speakers in plain words
            "{{ bos_token }}{% for m in messages %}Human {{ m.role }}: {{ m.content }}<|eot|>{% endfor %}",
            {"bos_token": "<s>"},
            "<|eot|>",
        ),
        (  # gpt-oss: a message ends otherwise when another follows, and thoughts must not end an answer
            "{% for m in messages %}<|start|>{{ m.role }}<|head|>{{ m.content }}"
            "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}",
            {},
            "<|return|>",
        ),
    ],
)
def test_end_of_a_turn_is_found_by_rendering(written, template, special, end):
    tokenizer = written(template, **special)
    assert tokenizer.token(template_end(tokenizer)) == end


@pytest.mark.parametrize(
    ("template", "special"),
    [
        (None, {}),
        ("{{ raise_exception('no') }}", {}),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", {}),  # GLM: nothing ends a turn
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>", {}),
        ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}<|im_start|>assistant\n", {}),
        ("<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>{{ m.content }}{% endfor %}<|head|>assistant<|/head|>",
         {"bos_token": "<s>"}),
        ("{% for m in messages %}{{ bos_token }}[INST]{{ m.content }}{% endfor %}<s>", {"bos_token": "<s>"}),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}", {}),
        ("{% for m in messages %}{{ m.content }} or so<|end|>{% endfor %}", {}),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", {}),
    ],
)  # fmt: skip
def test_plain_text_and_openers_of_the_next_turn_are_no_end(written, template, special):
    """`<|im_start|>` as an end would be harmless; `<s>`, `[INST]` or a word would cut answers short."""
    assert template_end(written(template, **special)) is None


def test_real_templates(shared_data):
    ends = {}
    for name in ("tokenizers/phi3", "tokenizers/gpt2", "tokenizers/qwen2"):
        tokenizer = Tokenizer(shared_data / name)
        found = further_ends(Path("nowhere"), (), tokenizer)
        ends[name] = {tokenizer.token(token_id): place for token_id, place in found.items()}
    assert ends == {
        "tokenizers/phi3": {"<|end|>": "the chat template", "<|endoftext|>": "the tokenizer's eos_token"},
        "tokenizers/gpt2": {"<|endoftext|>": "the tokenizer's eos_token"},
        "tokenizers/qwen2": {"<|im_end|>": "the tokenizer's eos_token"},
    }


def test_real_tokenizer_with_a_template_of_its_family(shared_data, tmp_path):
    """Qwen2 with `<|endoftext|>` for its eos_token, as base models have it."""
    (tmp_path / "tokenizer.json").write_bytes((shared_data / "tokenizers" / "qwen2" / "tokenizer.json").read_bytes())
    config = {"eos_token": "<|endoftext|>", "chat_template": DEFAULT_SYSTEM + CHATML + ASK}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert further_ends(tmp_path, (151643,), Tokenizer(tmp_path)) == {151645: "the chat template"}


def test_all_places_that_name_an_end_count_once(written, tmp_path):
    tokenizer = written(CHATML + ASK, eos_token="</s>")
    ids = {token: tokenizer.token_id(token) for token in ("</s>", "<|im_end|>", "<|eot|>", "<|endoftext|>")}
    config = {"eos_token_id": [ids["</s>"], ids["<|eot|>"]], "text_config": {"eos_token_id": ids["<|endoftext|>"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = further_ends(tmp_path, (ids["<|endoftext|>"],), tokenizer)
    assert found == {
        ids["<|im_end|>"]: "the chat template",
        ids["</s>"]: "config.json",
        ids["<|eot|>"]: "config.json",
    }


def test_ordinary_word_in_an_old_config_ends_nothing(written, tmp_path):
    """`eos_token_id: 2` is Llama's default, written into the configs of models to which 2 is `#` or a byte."""
    tokenizer = written(None)
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert further_ends(tmp_path, (1,), tokenizer) == {}


def test_folder_without_a_manifest_gets_all_ends(written, tmp_path):
    """As optimum-intel makes them; a manifest has them since its export."""
    tokenizer = written(CHATML + ASK)
    (tmp_path / MODEL_NAME).write_text("")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_id("<|endoftext|>")}))
    ends = answer_ends(tmp_path, load_manifest(tmp_path), tokenizer)
    assert [tokenizer.token(token_id) for token_id in ends] == ["<|endoftext|>", "<|im_end|>"]
    Manifest(architecture="llama", context_length=None, vocab_size=None, eos_token_ids=(7,)).save(tmp_path)
    assert answer_ends(tmp_path, load_manifest(tmp_path), tokenizer) == (7,)
