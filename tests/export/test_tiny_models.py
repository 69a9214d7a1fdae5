"""The models that other tests build upon are what they claim to be."""

from tests.export.helpers import encode, torch_logits
from tests.tiny_models import SENTENCES, make_hf_model

TEXTS = (*SENTENCES, "Привет, мир", "你好世界", "שלום", "👩‍👩‍👧 🦊", "\x00\x7f tab\tnew\nline", "")


def test_tokenizer_round_trips_any_text(tiny_hf):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_hf("llama") / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_seed_and_vocabulary_are_honoured(tiny_hf, tmp_path):
    other = make_hf_model("llama", tmp_path / "other", vocab_size=400, seed=1)
    ids = encode(tiny_hf("llama"), SENTENCES[0])
    mine, others = torch_logits(tiny_hf("llama"), ids), torch_logits(other, ids)
    assert (mine.shape[1], others.shape[1]) == (384, 400)
    assert abs(mine - others[:, :384]).max() > 1


def test_logits_are_neither_flat_nor_saturated(tiny_hf):
    """Tests of sampling and of draft acceptance need a distribution with a shape."""
    logits = torch_logits(tiny_hf("llama"), encode(tiny_hf("llama"), " ".join(SENTENCES)))
    assert 1 < logits.std() < 3
    assert len(set(logits.argmax(-1).tolist())) > 10
