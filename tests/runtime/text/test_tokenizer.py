"""Text comes out whole however its tokens are cut, and a template cannot reach beyond its messages."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path

import pytest

from edge_runtime.errors import ConfigError, ModelFormatError, ModelPairError
from edge_runtime.text.tokenizer import REPLACEMENT, Tokenizer

REAL = ("gpt2", "phi3", "qwen2")
TEXTS = (
    "Once upon a time there was a little fox.",
    "naïve café, Zwölf Boxkämpfer, 你好，世界, привет, שלום",
    "🦊👩‍👩‍👧 e\u0301 👍🏽 \U0001f1e9\U0001f1ea",
    "  two  spaces\n\n\ttabs\r\n and more ",
    "def f(x):\n    return x  # done\n",
    "\n🦊\n\n你\n",
    f"a {REPLACEMENT} of its own",
)
USER = [{"role": "user", "content": "  Tell me:\n a story?  "}]
CHAT = [*USER, {"role": "assistant", "content": "Once …"}, {"role": "user", "content": "Go on. <b>&amp;</b>"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHAT]


@pytest.fixture(scope="module", params=REAL)
def real(request, shared_data) -> Tokenizer:
    """A real tokenizer: byte-level BPE (gpt2, qwen2) and sentencepiece with byte fallback (phi3)."""
    return Tokenizer(shared_data / "tokenizers" / request.param)


def pieces(tokenizer: Tokenizer, ids: list[int], context: list[int] = ()) -> list[str]:
    """Return what each token adds, and what is left at the end."""
    decoder = tokenizer.decode_stream(context)
    return [*(decoder.push(token_id) for token_id in ids), decoder.flush()]


def composed(text: str) -> str:
    """Qwen's tokenizer composes accents with their letters."""
    return unicodedata.normalize("NFC", text)


def test_pieces_add_up_to_the_text(real):
    for text in TEXTS:
        ids = real.encode(text, add_special_tokens=False)
        made = "".join(pieces(real, ids))
        assert made == real.decode(ids)
        assert composed(made) == composed(text)


def test_pieces_after_a_context_add_up_to_the_rest(real):
    """From any token on; a character that the context only begins is shown when it is complete."""
    for text in TEXTS[:-1]:
        ids = real.encode(text, add_special_tokens=False)
        for size in range(len(ids)):
            before = real.decode(ids[:size]).rstrip(REPLACEMENT)
            rest = "".join(pieces(real, ids[size:], ids[:size]))
            assert before + rest == real.decode(ids)


def test_no_piece_holds_part_of_a_character(real):
    """Clients that print piece by piece would show a replacement character for each half."""
    for text in TEXTS[:-1]:
        made = pieces(real, real.encode(text, add_special_tokens=False))
        assert not any(REPLACEMENT in piece for piece in made)
        assert made[-1] == ""


def test_incomplete_character_is_flushed_as_a_replacement(real):
    """An answer that ends by length may end within a character."""
    *ids, _ = real.encode("fox 🦊", add_special_tokens=False)
    made = pieces(real, ids)
    assert "".join(made[:-1]).rstrip() == "fox"
    assert set(made[-1]) <= {REPLACEMENT, " "}


def test_any_tokens_in_any_order_are_decoded(real):
    """A model at a high temperature emits bytes that are no character: the library's DecodeStream raises an error then.

    Byte-level tokenizers give exactly the text of all tokens; with byte fallback one bad byte spoils the run of bytes
    before it, which was shown already.
    """
    chooser = random.Random(1)
    size = real._tokenizer.get_vocab_size()
    is_byte_level = real._tokenizer.token_to_id("<0x0A>") is None
    for _ in range(1500):
        ids = [chooser.randrange(chooser.choice((300, size))) for _ in range(chooser.randrange(1, 12))]
        made, whole = "".join(pieces(real, ids)), real.decode(ids)
        if is_byte_level or REPLACEMENT not in whole:
            assert made == whole


def test_tokens_without_text_add_nothing(real):
    """Special tokens, and padding rows beyond the tokenizer's entries, which a random model does emit."""
    ids = real.encode("one two", add_special_tokens=False)
    size = real._tokenizer.get_vocab_size()
    special = [i for i, token in real._tokenizer.get_added_tokens_decoder().items() if token.special][:1]
    for silent in (*special, size + 3):
        made = pieces(real, [silent, ids[0], silent, silent, *ids[1:], silent])
        assert "".join(made) == real.decode(ids)
        assert made[0] == ""


def test_text_that_is_no_unicode_is_refused(real):
    with pytest.raises(ConfigError, match="not valid Unicode"):
        real.encode("half a pair: \ud83e")


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"}}', b"\xff\xfe\x00", b"[1]"])
def test_damaged_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"tokenizer.json` is damaged") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ModelFormatError, match=r"holds no tokenizer\.json"):
        Tokenizer(tmp_path)


def test_damaged_tokenizer_config_is_named(tmp_path, shared_data):
    shutil.copy(shared_data / "tokenizers" / "gpt2" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFormatError, match=r"tokenizer_config\.json` is not readable JSON"):
        Tokenizer(tmp_path)


def test_tokens_have_ids_and_roles(shared_data):
    """What turn ends and exports ask: an id by its token, a token by its role, and which tokens are no words."""
    phi3 = Tokenizer(shared_data / "tokenizers" / "phi3")
    assert phi3.token(phi3.token_id("<|end|>")) == "<|end|>"
    assert phi3.token_id("no token at all") is None
    assert (phi3.special_token("eos_token"), phi3.special_token("bos_token")) == ("<|endoftext|>", "<s>")
    assert phi3.token_id("<|end|>") in phi3.added_token_ids
    assert phi3.token_id("▁the") not in phi3.added_token_ids


def test_id_beyond_every_vocabulary_has_no_token(shared_data):
    tokenizer = Tokenizer(shared_data / "tokenizers" / "phi3")
    assert [tokenizer.token(token_id) for token_id in (-1, 1 << 31, 1 << 32, 10**30)] == [None] * 4


def test_chat_may_end_with_its_last_message(shared_data):
    phi3 = Tokenizer(shared_data / "tokenizers" / "phi3")
    done, asked = (phi3.apply_chat_template(USER, add_generation_prompt=flag) for flag in (False, True))
    assert asked[: len(done)] == done
    assert asked[len(done) :][0] == phi3.token_id("<|assistant|>")


# --- chat templates -------------------------------------------------------------------------------------------------

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FEATURES = """
    {% for message in messages %}
        {% if loop.index0 > 1 %}{% break %}{% endif %}
        {% generation %}{{ message | tojson }}{% endgeneration %}
    {% endfor %}
    {{ {'a': ['<é>', none]} | tojson(indent=2) }} {{ eos_token }} {{ namespace(x=1).x }}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "turns": TURNS, "features": FEATURES}


def with_template(folder: Path, source: Path, template: str, **config: object) -> Tokenizer:
    """Return a copy of a tokenizer that has another chat template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "tokenizer.json", folder)
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


@pytest.fixture
def phi3(shared_data) -> Path:
    return shared_data / "tokenizers" / "phi3"


@pytest.fixture(scope="module")
def hf_tokenizer(shared_data):
    """transformers' wrapper of the same tokenizer.json."""
    from edge_export.quiet import quiet

    with quiet():
        from transformers import PreTrainedTokenizerFast

        path = shared_data / "tokenizers" / "phi3" / "tokenizer.json"
        return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("messages", [USER, CHAT, SYSTEM], ids=["user", "chat", "system"])
@pytest.mark.parametrize("name", ["own", *TEMPLATES])
def test_template_renders_as_in_transformers(name, messages, tmp_path, phi3, hf_tokenizer):
    own = json.loads((phi3 / "tokenizer_config.json").read_text())["chat_template"]
    template = own if name == "own" else TEMPLATES[name]
    ours = with_template(tmp_path / "copy", phi3, template)
    if name == "turns" and messages is SYSTEM:
        with pytest.raises(ConfigError, match="refuses these messages: System role not supported"):
            ours.apply_chat_template(messages)
        return
    wanted = hf_tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert ours.apply_chat_template(messages) == hf_tokenizer.encode(wanted, add_special_tokens=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ lipsum.__globals__['os'] }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ nothing.at.all }}",
        "{{ unfinished( }}",
    ],
)
def test_hostile_or_broken_template_is_an_error_of_one_line(template, tmp_path, phi3):
    """A template is code that came with a downloaded model."""
    with pytest.raises(ConfigError, match="chat template refuses these messages") as caught:
        with_template(tmp_path / "copy", phi3, template).apply_chat_template(USER)
    assert "\n" not in str(caught.value)


def test_attributes_of_the_interpreter_render_as_nothing(tmp_path, phi3):
    for template in ("{{ ''.__class__ }}", "{{ cycler.__globals__ }}", "{{ messages|attr('__class__') }}"):
        assert with_template(tmp_path / "copy", phi3, template).apply_chat_template(USER) == []


def test_template_is_found_wherever_models_keep_it(tmp_path, phi3):
    """In tokenizer_config.json, as one of several named ones, in chat_template.jinja or in chat_template.json."""
    made = with_template(tmp_path / "a", phi3, "one").apply_chat_template(USER)
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}]
    assert with_template(tmp_path / "b", phi3, named).apply_chat_template(USER) == made
    (tmp_path / "a" / "chat_template.jinja").write_text("two", encoding="utf-8")
    assert Tokenizer(tmp_path / "a").apply_chat_template(USER) != made
    tokenizer = with_template(tmp_path / "c", phi3, None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ConfigError, match="has no chat template"):
        tokenizer.apply_chat_template(USER)
    (tmp_path / "c" / "chat_template.json").write_text('{"chat_template": "one"}')
    assert Tokenizer(tmp_path / "c").apply_chat_template(USER) == made


# --- vocabularies ---------------------------------------------------------------------------------------------------


def changed(folder: Path, source: Path, change) -> Tokenizer:
    """Return a copy of a tokenizer whose description was changed by a function."""
    folder.mkdir()
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer(folder)


def test_same_vocabulary_in_another_layout_is_accepted(tmp_path, phi3):
    """The files differ in bytes, the ids mean the same."""
    Tokenizer(phi3).check_same_vocabulary(changed(tmp_path / "copy", phi3, lambda content: content.pop("padding", 0)))


def test_swapped_tokens_are_named(tmp_path, phi3):
    def swap(content: dict) -> None:
        vocab = content["model"]["vocab"]
        names = {i: name for name, i in vocab.items()}
        vocab[names[700]], vocab[names[500]] = 500, 700

    with pytest.raises(ModelPairError, match=r"token 500 is '.*' for the target and '.*' for the draft") as caught:
        Tokenizer(phi3).check_same_vocabulary(changed(tmp_path / "copy", phi3, swap))
    assert "\n" not in str(caught.value)


def test_missing_and_additional_tokens_are_named(tmp_path, phi3):
    def shorten(content: dict) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 32_010]

    mine, shorter = Tokenizer(phi3), changed(tmp_path / "copy", phi3, shorten)
    with pytest.raises(ModelPairError, match=r"token 32010 is '.*' for the target and None for the draft"):
        mine.check_same_vocabulary(shorter)
    with pytest.raises(ModelPairError, match=r"token 32010 is None for the target and '.*' for the draft"):
        shorter.check_same_vocabulary(mine)


def test_unrelated_vocabularies_are_refused(shared_data):
    folder = shared_data / "tokenizers"
    with pytest.raises(ModelPairError, match="token 0 is"):
        Tokenizer(folder / "gpt2").check_same_vocabulary(Tokenizer(folder / "phi3"))
