"""Chats as text: what transformers' apply_chat_template gives for the shapes of templates that models have."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import chat_template
from llmctl.errors import UserError
from llmctl.tokenization import edges, training
from llmctl.tokenizer import Tokenizer

# Written for these tests, each in the manner of a family.
CHATML = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
INST = """{{ bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n') if system is defined and loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""
HEADERS = """{%- set ns = namespace(seen=0) %}
{{- bos_token }}
{%- if not date is defined %}
    {%- set date = strftime_now('%d %b %Y') %}
{%- endif %}
{{- '<|header|>system<|end|>\\nToday: ' + date + '\\n' }}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
        {{- '\\n' }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {%- if message.role == 'stop' %}
        {%- break %}
    {%- endif %}
    {%- set ns.seen = ns.seen + 1 %}
    {{- '<|header|>' ~ message.role ~ '<|end|>\\n' ~ ns.seen ~ ': ' }}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- message.tool_calls | tojson }}
    {%- elif message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {%- if message.reasoning_content %}{{ '(' + message.reasoning_content + ')' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|end|>\\n' }}{% endif %}
"""
GENERATION = """{% for m in messages %}
{% if m.role == 'assistant' %}
A: {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}

{% else %}
    U: {{ m.content }}
{% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "inst": INST, "headers": HEADERS, "generation": GENERATION}
TURNS = [
    {"role": "user", "content": " Who are you?  "},
    {"role": "assistant", "content": 'I <b>am</b> a "model" & naïve 🦙\n', "tool_calls": None},
    {"role": "user", "content": "Good."},
]
PARTS = [{"type": "text", "text": "see "}, {"type": "image", "url": "x"}, {"type": "text", "text": "this"}]
CALL = {"name": "find", "arguments": {"what": "é", "n": 3}}
CHATS = {
    "turns": TURNS,
    "system": [{"role": "system", "content": "Be brief."}, *TURNS],
    "rich": [
        {"role": "user", "content": PARTS},
        {"role": "skip", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "so", "thinking": "hm"},
        {"role": "stop", "content": "x"},
        {"role": "user", "content": "never seen"},
    ],
}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


def with_template(template: str | list[dict], adds_bos: bool = False, **config) -> Tokenizer:
    """A byte tokenizer with <s>, which stands in front of a text where asked."""
    spec = json.loads(training.plain_bytes())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 257, "content": "<s>"})
    if adds_bos:
        spec["post_processor"] = edges.template({"<s>": 257}, ["<s>"], [], [])
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": template, **config}
    return Tokenizer(json.dumps(spec), config)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(("name", "chat"), [*product(TEMPLATES, ["turns", "system"]), ("headers", "rich")])
def test_text_and_ids_are_transformers(name, chat, add_generation_prompt, in_transformers):
    ours = with_template(TEMPLATES[name])
    theirs = in_transformers(ours)
    asked = {"add_generation_prompt": add_generation_prompt, "tools": [TOOL] if name == "headers" else None}
    text = theirs.apply_chat_template(CHATS[chat], tokenize=False, **asked)
    assert ours.render_chat(CHATS[chat], **asked).text == text
    assert (
        ours.apply_chat_template(CHATS[chat], **asked) == theirs.apply_chat_template(CHATS[chat], **asked)["input_ids"]
    )


@settings(max_examples=60, deadline=None)
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1")), min_size=1, max_size=4
    )
)
def test_any_content_is_transformers(contents):
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    for name in ("chatml", "inst", "generation"):
        expected, spans = render(
            [messages], chat_template=TEMPLATES[name], return_assistant_tokens_mask=name == "generation", **tokens
        )
        rendered = chat_template.render(TEMPLATES[name], messages, **tokens)
        assert rendered.text == expected[0]
        if name == "generation":
            assert rendered.generated == spans[0]


def test_the_models_own_words_are_known():
    rendered = chat_template.render(GENERATION, TURNS, eos_token="</s>")
    assert [rendered.text[start:stop] for start, stop in rendered.generated] == [TURNS[1]["content"] + "</s>"]
    assert chat_template.render(CHATML, TURNS).generated == []


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_stands_there_once(name, adds_bos):
    tokenizer = with_template(TEMPLATES[name], adds_bos)
    assert tokenizer.adds_bos == adds_bos
    ids = tokenizer.apply_chat_template(TURNS)
    assert ids.count(tokenizer.bos_id) == (name in ("inst", "headers"))


def test_today():
    days = [datetime.now()]
    text = chat_template.render(HEADERS, TURNS, bos_token="").text
    days.append(datetime.now())
    assert any(day.strftime("Today: %d %b %Y\n") in text for day in days)
    assert "Today: 1 May\n" in chat_template.render(HEADERS, TURNS, bos_token="", date="1 May").text


def test_named_templates(in_transformers):
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]
    ours = with_template(templates)
    theirs = in_transformers(ours)
    for asked in ({}, {"tools": [TOOL]}):
        assert ours.render_chat(TURNS, **asked).text == theirs.apply_chat_template(TURNS, tokenize=False, **asked)
    assert ours.render_chat(TURNS, template="rag").text == "rag" and ours.chat_template == "plain"
    with pytest.raises(UserError, match="no chat template 'other'; the tokenizer has 'default', 'tool_use', 'rag'"):
        ours.render_chat(TURNS, template="other")
    nameless = with_template(templates[1:])
    assert nameless.chat_template is None
    with pytest.raises(UserError, match="no chat template 'default'"):
        nameless.render_chat(TURNS)


def test_templates_in_files(tmp_path):
    with_template("of the configuration").save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert Tokenizer.load(tmp_path).chat_template == "of the file"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.chat_template == "of the file"
    assert loaded.render_chat(TURNS, tools=[TOOL]).text == "with tools"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (INST, TURNS[1:], "does not take these messages: roles must alternate user/assistant"),
        ("a\n{% for %}", TURNS, "the chat template is broken: line 2"),
        ("{{ messages[0].content.nothing.at.all }}", TURNS, "the chat template failed"),
        ("{{ messages[0].content + 1 }}", TURNS, "the chat template failed"),
        ("{{ 1 // 0 }}", TURNS, "the chat template failed"),
        ("{{ messages.append(1) }}", TURNS, "the chat template failed"),
        ("{{ ''.__class__.__mro__ }}", TURNS, "the chat template failed"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", TURNS, "the chat template failed"),
        ("{% include '/etc/passwd' %}", TURNS, "the chat template failed"),
        ("x", [], "a chat without messages"),
        ("x", [{"role": "user", "content": "\ufdd0"}], "noncharacter"),
        (None, TURNS, "the tokenizer has no chat template"),
    ],
)
def test_what_fails_is_one_line(template, messages, message):
    with pytest.raises(UserError) as error:
        with_template(template).render_chat(messages)
    assert message in error.value.message
    assert "\n" not in error.value.message
