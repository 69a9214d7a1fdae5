"""Chats are written as transformers writes them, and what it would lose without a word is adapted or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from edge_runtime.errors import ConfigError, ModelFormatError
from edge_runtime.text.chat_config import ChatConfig
from edge_runtime.text.chat_template import ChatTemplate
from edge_runtime.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "  What is 2 + 2?  "}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "4, naïvely."},
    {"role": "user", "content": "Why? <b>&amp;</b>"},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "ü": [1, None]}}}
CALLS = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "hm"},
    {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Ädd", "parameters": {"a": "int"}}}]
DOCUMENTS = [{"title": "One", "text": "Two <three>"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]

RICH = """{{- bos_token }}{% if sep_token is defined %}{{ sep_token }}{% endif %}
{%- if tools %}{{ '<tools>' }}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2, ensure_ascii=True) }}{% endfor %}{% endif %}
{%- if documents is not none %}{% for d in documents %}{{ d.title ~ ': ' ~ d.text }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{% set ns.last = messages | length - loop.index %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
<|im_start|>{{ message['role'] }}{% if message.name %} {{ message.name }}{% endif %}
{% if message.content is string %}{{ message.content | trim }}{% elif message.content is not none %}
{%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}
{%- if message.reasoning_content is defined and message.reasoning_content %}<think>
{{ message.reasoning_content }}</think>{% endif %}
{%- for call in message.tool_calls or [] %}<call>{{ call.function.arguments | tojson }} {{ call.id | default('no id') }}
{%- endfor %}{% generation %}<|im_end|>{% endgeneration %}
{% if loop.index0 == ns.last %}{{ strftime_now('%Y') }}{{ [1, 2] | join(' and ') }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>{% endif %}{% endif %}"""
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": RICH}]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a tokenizer of few tokens, which transformers loads quickly."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, config: dict, tokens: dict | None = None, **files: str) -> Path:
    """Write what a model folder may hold beside tokenizer.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    if tokens is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    for name, text in files.items():
        path = folder / name.replace("__", "/") if "__" in name else folder / name
        path = path.with_suffix(".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def rendered(folder: Path, messages: list, **options) -> str:
    """Return our text of a chat."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return ChatTemplate(folder, config).render(messages, ChatConfig(**options))


def theirs(folder: Path, messages: list, **options) -> str:
    """Return transformers' text of a chat."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    continues = options.get("continue_final_message", False)
    further = options.pop("template_options", {})
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not continues, **options, **further
    )


TOKENS = {
    "bos_token": "<|endoftext|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
    "sep_token": "<|im_start|>",
}


@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (USER, {}),
        (CHAT, {}),
        (CALLS, {"tools": TOOLS}),
        (CHAT, {"documents": DOCUMENTS}),
        (PARTS, {}),
        (CHAT[:3], {"continue_final_message": True}),
        ([*CHAT[:2], {"role": "assistant", "content": "so \n "}], {"continue_final_message": True}),
        (PARTS, {"continue_final_message": True}),
        (CHAT, {"template_options": {"enable_thinking": False, "bos_token": "<|im_end|>"}}),
    ],
)
def test_chat_is_written_as_in_transformers(folder, messages, options):
    write(folder, {**TOKENS, "chat_template": RICH})
    assert rendered(folder, messages, **options) == theirs(folder, messages, **options)


SHOW = "".join(
    f"{name}={{{{ {name} | default('-') }}}} "
    for name in (
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("image_token", "boi_token"),
    )
)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (TOKENS, None),
        ({}, {**TOKENS, "eos_token": {"content": "<|im_end|>", "rstrip": True}}),
        ({"eos_token": "<|im_start|>"}, {"eos_token": "<|im_end|>", "mask_token": {"content": "<|im_start|>"}}),
        ({"image_token": "<|im_start|>", "pad_token": None, "cls_token": "<|im_end|>"}, {}),
        ({"extra_special_tokens": {"image_token": "<|im_start|>", "boi_token": "<|im_end|>"}}, None),
        ({"additional_special_tokens": ["<|im_start|>"], "unk_token": "<|im_end|>"}, None),
    ],
)
def test_templates_know_the_tokens_that_transformers_names(folder, config, tokens):
    """In special_tokens_map.json as well, and the added ones of models that also see."""
    write(folder, {**config, "chat_template": SHOW}, tokens)
    assert rendered(folder, USER) == theirs(folder, USER)


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "files",
    [
        {"config": {"chat_template": NAMED}},
        {"config": {}, "chat_template": PLAIN, "additional_chat_templates__tool_use": RICH},
        {"config": {"chat_template": "not this"}, "chat_template": PLAIN},
    ],
    ids=["list", "folder", "file"],
)
def test_template_is_chosen_as_in_transformers(folder, files, tools):
    write(folder, files["config"] | TOKENS, **{name: text for name, text in files.items() if name != "config"})
    assert rendered(folder, USER, tools=tools) == theirs(folder, USER, tools=tools)


def test_templates_by_name_without_a_default_are_named(folder):
    write(folder, {"chat_template": {"tool_use": PLAIN, "rag": PLAIN}})
    assert not Tokenizer(folder).has_chat_template
    with pytest.raises(ConfigError, match="has templates named tool_use, rag, but no default"):
        rendered(folder, USER)


def test_parts_become_a_text_where_the_template_expects_one(folder):
    """`content | trim` would otherwise write Python's list, and `+` fail."""
    for template in (PLAIN, PLAIN.replace("m['content']", "(m['content'] | trim)")):
        write(folder, {"chat_template": template})
        assert "user\none \ntwo<|im_end|>" in rendered(folder, PARTS)


def test_text_becomes_a_part_where_the_template_expects_parts(folder):
    """The letters of a text have no entry `text`: the message would be empty."""
    write(
        folder,
        {"chat_template": "{% for m in messages %}{% for p in m.content %}{{ p.text }};{% endfor %}{% endfor %}"},
    )
    assert rendered(folder, CHAT) == ";".join(m["content"] for m in CHAT) + ";"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "image", "url": "x"}], "a part of type 'image', but this model reads only text"),
        ([{"type": "text", "text": "a"}, {"type": "image_url"}], "a part of type 'image_url'"),
        ([{"type": "text"}], "expected a text in its entry `text`"),
        (["text"], "the part 'text', but this model reads only text"),
        (5, "expected its content to be a text or a list of text parts"),
        (None, "expected a dictionary with role and content"),
    ],
)
def test_content_that_is_no_text_is_one_error(folder, content, told):
    write(folder, {"chat_template": RICH, **TOKENS})
    with pytest.raises(ConfigError, match="message 1 ") as caught:
        rendered(folder, [*USER, {"role": "user", "content": content}])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tool_calls_without_a_text_are_refused_where_the_template_would_lose_them(folder):
    write(folder, {"chat_template": PLAIN})
    with pytest.raises(ConfigError, match=r"message 1 has tool calls in place of a text, which .* does not support"):
        rendered(folder, CALLS)


@pytest.mark.parametrize("content", ["one{{ 1 }}".encode("utf-16"), b"\xff\xfe", b"caf\xe9"])
def test_template_file_that_is_not_utf8_is_one_line(folder, content):
    write(folder, {})
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"chat_template\.jinja` is not UTF-8 at byte \d"):
        Tokenizer(folder)


def test_mark_before_a_template_is_no_part_of_it(folder):
    write(folder, {}, chat_template="\ufeff" + PLAIN)
    assert rendered(folder, USER).startswith("<|im_start|>")


@pytest.mark.parametrize("template", [5, [PLAIN], [{"name": "default"}], {"default": 5}])
def test_template_that_is_no_text_is_one_line(folder, template):
    write(folder, {"chat_template": template})
    with pytest.raises(ModelFormatError, match="expected a text or named texts"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("messages", "template"),
    [
        ([{"role": "assistant", "content": None, "tool_calls": [CALL]}], RICH),
        ([*USER, {"role": "assistant", "content": "lost"}], "{{ messages[0].content }}"),
        ([*USER, {"role": "assistant", "content": "LOST"}], "{{ messages[1].content | lower }}"),
    ],
)
def test_message_that_cannot_be_continued_is_one_line(folder, messages, template):
    write(folder, {**TOKENS, "chat_template": template})
    with pytest.raises(ConfigError, match="continue_final_message is set, but "):
        rendered(folder, messages, continue_final_message=True)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": "add"},
        {"tools": [len]},
        {"documents": ["text"]},
        {"template_options": ["a"]},
        {"template_options": {"messages": 1}},
        {"template_options": {1: 1}},
        {"continue_final_message": 1},
        {"special_tokens_in_messages": "no"},
        {"tool": TOOLS},
    ],
)
def test_options_of_chats_are_checked(options):
    with pytest.raises(ConfigError):
        ChatConfig.from_options(**options)
