"""An exported tokenizer gives the ids that the source's own tokenizer.json gives, or the export is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from edge_export.fastdraft.target import Target
from edge_export.sources import Source
from edge_export.tokenizer_files import SavedTokenizer, save_tokenizer
from edge_export.tokenizer_ids import CHAT_TEXTS, PLAIN_TEXTS, library_tokenizer
from edge_runtime.errors import ExportError
from edge_runtime.manifest import Manifest
from edge_runtime.text.chat_config import ChatConfig
from edge_runtime.text.tokenizer import Tokenizer
from tests.tiny_models import make_tokenizer

TEXTS = (*PLAIN_TEXTS, *CHAT_TEXTS)
CHAT = [{"role": "user", "content": "How are you?"}]


def save(folder: Path, output: Path, model_type: str = "llama", vocab_size: int = 200_000) -> SavedTokenizer:
    """Export the tokenizer of `folder` as that of a model of this type."""
    config = {"model_type": model_type, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(config))
    output.mkdir()
    return save_tokenizer(Source(name="source", folder=folder, onnx=None, config=config), output)


def edit(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture
def real(shared_data, tmp_path):
    """Return a function from a real tokenizer's name to a copy of its folder."""

    def copy(name: str, **config: Any) -> Path:
        shutil.copytree(shared_data / "tokenizers" / name, tmp_path / "source")
        edit(tmp_path / "source" / "tokenizer_config.json", **config)
        return tmp_path / "source"

    return copy


@pytest.fixture
def tiny(tmp_path):
    """Return a function from changes of tokenizer_config.json to a folder with a tiny byte-level tokenizer."""

    def make(**config: Any) -> Path:
        make_tokenizer(tmp_path / "source")
        edit(tmp_path / "source" / "tokenizer_config.json", **config)
        return tmp_path / "source"

    return make


# --- copied -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"), [("gpt2", "LlamaTokenizerFast"), ("qwen2", "LlamaTokenizer"), ("phi3", "LlamaTokenizer")]
)
def test_the_sources_own_tokenizer_json_is_the_truth(real, tmp_path, name, label):
    """transformers 5 builds a Llama tokenizer around the vocabulary alone: it lost the spaces of byte-level ones (as of
    R1-Distill-Llama), and phi3's `▁` after special tokens, and the export was verified against that.
    """
    source = real(name, tokenizer_class=label)
    saved = save(source, tmp_path / "out")
    own = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in TEXTS:
        assert saved.tokenizer.encode(text) == own.encode(text).ids
    spoken = saved.tokenizer.decode(saved.tokenizer.encode("How are you doing?"))
    assert spoken == "How are you doing?"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (note,) = saved.notes
    assert note.startswith("transformers (LlamaTokenizer) splits '")


def test_chat_prompts_keep_the_space_after_a_special_token(real, tmp_path):
    """Phi-3 was trained with `▁` between `<|user|>` and the newline."""
    tokenizer = save(real("phi3"), tmp_path / "out").tokenizer
    pieces = [tokenizer.token(token_id) for token_id in tokenizer.apply_chat_template(CHAT)]
    assert pieces[:4] == ["<|user|>", "▁", "<0x0A>", "How"]


def test_all_files_of_a_tokenizer_are_copied_as_they_are(tiny, tmp_path):
    source = tiny()
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }} {# not as jinja would print it #}")
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')
    (source / "added_tokens.json").write_text('{"<|user|>":   1}')
    save(source, tmp_path / "out")
    copied = {path.name for path in (tmp_path / "out").iterdir()}
    assert copied == {path.name for path in source.iterdir()} - {"config.json"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_named_templates_are_found_where_transformers_puts_them(tiny, tmp_path):
    """One for chats with tools stands in a folder of its own."""
    from transformers import PreTrainedTokenizerFast

    source = tiny()
    theirs = PreTrainedTokenizerFast.from_pretrained(source)
    theirs.chat_template = {"default": "plain", "tool_use": "with tools"}
    theirs.save_pretrained(source)
    save(source, tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    tools = ChatConfig(tools=[{"type": "function", "function": {"name": "look"}}])
    made = [tokenizer.decode(tokenizer.apply_chat_template(CHAT, config)) for config in (None, tools)]
    assert made == ["plain", "with tools"]


def test_agreement_needs_no_words(tiny, tmp_path):
    assert save(tiny(), tmp_path / "out").notes == ()


def test_damaged_tokenizer_is_one_line(tiny, tmp_path):
    source = tiny()
    (source / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ExportError, match=r"tokenizer in .* cannot be read") as caught:
        save(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


# --- what tokenizer_config.json adds ----------------------------------------------------------------------------------


def with_bos(source: Path) -> Path:
    """Let tokenizer.json put `<|user|>`, the token of id 1, before a text."""
    own = library_tokenizer(source)
    own.post_processor = tokenizers.processors.TemplateProcessing("<|user|> $A", special_tokens=[("<|user|>", 1)])
    own.save(str(source / "tokenizer.json"))
    return source


@pytest.mark.parametrize(
    ("in_file", "label", "config", "has_bos"),
    [
        (False, "LlamaTokenizerFast", {"add_bos_token": True, "bos_token": "<|user|>"}, True),  # R1-Distill
        (False, "LlamaTokenizer", {"add_bos_token": True, "bos_token": None}, False),
        (False, "Qwen2Tokenizer", {"add_bos_token": False, "bos_token": None}, False),  # Qwen2
        (False, "GPT2Tokenizer", {"bos_token": "<|user|>"}, False),  # SmolLM2
        (False, "GPT2Tokenizer", {"add_bos_token": True, "bos_token": "<|user|>"}, False),
        (True, "PreTrainedTokenizerFast", {"bos_token": "<|user|>"}, True),  # Llama 3
        (True, "LlamaTokenizer", {"bos_token": "<|user|>"}, True),
        (True, "LlamaTokenizer", {"add_bos_token": True, "add_eos_token": False, "bos_token": "<|user|>"}, True),
        (True, "GemmaTokenizer", {"add_bos_token": True, "bos_token": "<|user|>"}, True),
        (True, "LlamaTokenizer", {"add_bos_token": False, "bos_token": "<|user|>"}, False),
        (True, "PreTrainedTokenizerFast", {"add_bos_token": False, "bos_token": "<|user|>"}, True),
    ],
)
def test_first_token_of_a_text_is_the_one_of_the_training(tiny, tmp_path, in_file, label, config, has_bos):
    """add_bos_token decides for the classes that transformers 4 heeded it for; else tokenizer.json does."""
    source = tiny(tokenizer_class=label, **config)
    if in_file:
        with_bos(source)
    saved = save(source, tmp_path / "out", "gpt_neox")  # no family of these classes: transformers reads the file itself
    plain = saved.tokenizer.encode("Once upon", add_special_tokens=False)
    assert saved.tokenizer.encode("Once upon") == [1] * has_bos + plain
    assert len(saved.notes) == (in_file != has_bos)
    assert not saved.notes or saved.notes[0].startswith("tokenizer_config.json sets add_bos_token")


def test_begin_that_no_setting_speaks_of_is_kept(tiny, tmp_path):
    """GLM begins with two tokens, neither of them bos."""
    source = tiny(tokenizer_class="LlamaTokenizer", add_bos_token=False, bos_token="<|assistant|>")
    saved = save(with_bos(source), tmp_path / "out")
    assert saved.tokenizer.encode("Once")[0] == 1


def added(token_id: int, content: str, **fields: bool) -> dict[str, Any]:
    """Return the entry of tokenizer_config.json for an added token."""
    return {str(token_id): {"content": content, "special": True, "normalized": False, **fields}}


def test_added_token_that_tokenizer_json_lacks_is_added(tiny, tmp_path):
    """A fine-tune whose ChatML tokens are in tokenizer_config.json alone."""
    size = make_tokenizer(tmp_path / "size")
    named = added(size, "<|im_start|>") | added(size + 1, "<|im_end|>")
    saved = save(tiny(added_tokens_decoder=named), tmp_path / "out")
    assert saved.tokenizer.encode("<|im_start|>Once<|im_end|>")[:: len(saved.tokenizer.encode("Once")) + 1] == [
        size,
        size + 1,
    ]
    assert saved.tokenizer.decode([size, size + 1]) == ""
    assert "lacks `<|im_start|>` and 1 more" in saved.notes[0]


def test_token_that_is_a_mere_word_in_tokenizer_json_becomes_one_token(tiny, tmp_path):
    """Without an entry in added_tokens its text would be split before it is looked for."""
    source = tiny(added_tokens_decoder=added(1, "<|user|>"))
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != 1]
    edit(source / "tokenizer.json", **content)
    assert save(source, tmp_path / "out").tokenizer.encode("Once <|user|>")[-1] == 1


@pytest.mark.parametrize("token_id", [0, 5000])
def test_added_token_whose_id_is_anothers_is_refused(tiny, tmp_path, token_id):
    """The files belong to different versions of a model; ids would be other than in training."""
    with pytest.raises(ExportError, match=rf"names token {token_id} '<\|im_start\|>', tokenizer\.json") as caught:
        save(tiny(added_tokens_decoder=added(token_id, "<|im_start|>")), tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_difference_in_what_is_special_is_told(tiny, tmp_path):
    saved = save(tiny(added_tokens_decoder=added(1, "<|user|>", special=False)), tmp_path / "out")
    assert saved.tokenizer.decode([1]) == ""
    assert "whether `<|user|>` is special: as in the latter" in saved.notes[0]


# --- ids and lengths --------------------------------------------------------------------------------------------------


def test_tokenizer_that_is_larger_than_the_model_is_refused(tiny, tmp_path):
    with pytest.raises(ExportError, match=r"gives token id \d+, the model's vocabulary has 200"):
        save(tiny(), tmp_path / "out", vocab_size=200)


def test_added_token_without_an_embedding_is_told(tiny, tmp_path):
    """`[PAD]` is often added without a row for it: it is in no text."""
    size = make_tokenizer(tmp_path / "size")
    source = tiny(added_tokens_decoder=added(size, "[PAD]"), pad_token="[PAD]")
    saved = save(source, tmp_path / "out", vocab_size=size)
    assert saved.notes[-1] == f"the model's vocabulary of {size} has no `[PAD]`: a prompt cannot hold it"


def test_cutting_and_padding_in_tokenizer_json_have_no_effect(tiny, tmp_path):
    """Neither on prompts nor on the texts that a draft is trained on."""
    source = tiny()
    own = library_tokenizer(source)
    own.enable_truncation(8)
    own.enable_padding(length=300)
    own.save(str(source / "tokenizer.json"))
    saved = save(source, tmp_path / "out")
    text = "Once upon a time there was a little fox. " * 4
    manifest = Manifest(architecture="llama", context_length=None, vocab_size=384)
    corpora = Target(folder=tmp_path / "out", manifest=manifest, config={}).tokenizer()
    assert 8 < len(saved.tokenizer.encode(text)) < 300
    assert [encoding.ids for encoding in corpora.encode_batch([text])] == [saved.tokenizer.encode(text)]


# --- converted --------------------------------------------------------------------------------------------------------


def unpacked(source: Path) -> Path:
    """Replace tokenizer.json by the vocab.json and merges.txt that GPT-2's first tokenizers had."""
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (source / "tokenizer.json").unlink()
    return source


def test_vocabulary_and_merges_are_converted_to_the_same_ids(real, tmp_path):
    source = real("gpt2", tokenizer_class="GPT2Tokenizer")
    own = library_tokenizer(source)
    saved = save(unpacked(source), tmp_path / "out", "gpt2")
    assert [saved.tokenizer.encode(text) for text in TEXTS] == [own.encode(text).ids for text in TEXTS]
    assert saved.notes == ("tokenizer.json was made by transformers: the source has none",)


def test_conversion_that_loses_the_spaces_is_refused(tiny, tmp_path):
    """The label sends a byte-level vocabulary through rules made for sentencepiece."""
    with pytest.raises(ExportError, match=r"turns 'How are you doing\?' into ''"):
        save(unpacked(tiny(tokenizer_class="LlamaTokenizer")), tmp_path / "out")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_model_is_converted_to_the_same_ids(tiny, tmp_path, legacy):
    """transformers leaves out the first space of a text that has its own; older models have one after each token."""
    sentencepiece = pytest.importorskip("sentencepiece")
    source = tiny(tokenizer_class="LlamaTokenizer", eos_token="</s>", add_bos_token=True, legacy=legacy)
    (source / "tokenizer.json").unlink()
    texts = source.parent / "texts.txt"
    texts.write_text("\n".join(text.replace("\n", " ") for text in PLAIN_TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(source / "tokenizer"), vocab_size=500, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    own = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    saved = save(source, tmp_path / "out").tokenizer
    for text in PLAIN_TEXTS:
        assert saved.encode(text) == [own.bos_id(), *own.encode(text)] or (not legacy and text.startswith(" "))
    begin, end, following, *_ = saved.encode("</s>\n")
    assert (begin, end) == (own.bos_id(), own.eos_id())
    assert (saved.token(following) == "▁") == legacy


def test_missing_package_is_named(tiny, tmp_path, monkeypatch):
    """A sentencepiece model without sentencepiece used to end in advice about tiktoken."""
    source = tiny()
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ExportError, match=r"only be read with the package sentencepiece, which is not installed"):
        save(source, tmp_path / "out")


def test_exported_tokenizer_is_read_by_the_runtime_alone(tiny, tmp_path):
    saved = save(tiny(), tmp_path / "out")
    assert Tokenizer(tmp_path / "out").encode("Once") == saved.tokenizer.encode("Once")


def test_tokenizer_that_the_runtime_reads_otherwise_is_refused(tiny, tmp_path, monkeypatch):
    """Whatever a later version of the runtime or of a library does to a text."""
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, **how: encode(self, text.replace("\t", " "), **how))
    with pytest.raises(ExportError, match=r"the exported tokenizer\.json splits '  two spaces.* the source's own file"):
        save(tiny(), tmp_path / "out")
