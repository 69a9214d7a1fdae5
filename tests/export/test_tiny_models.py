"""The models that other tests build upon are what they claim to be."""

import pytest
from tests.tiny_models import FAMILIES, SENTENCES

TEXTS = (*SENTENCES, "Привет, мир", "你好，世界", "שלום", "👩‍👩‍👧 🦊", "\x00\x7f tab\tnew\nline", "")


def test_tokenizer_round_trips_any_text(tiny_hf):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_hf("llama") / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_a_model_folder(tiny_ir, family):
    from edge_runtime.manifest import load_manifest

    manifest = load_manifest(tiny_ir(family))
    assert manifest.context_length == 512
    assert manifest.vocab_size == 384
    assert manifest.eos_token_ids == (0,)
