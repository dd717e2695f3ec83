"""Which tokens of a conversation are learned: against transformers' own masks, and against the words of the answers."""

from __future__ import annotations

import dataclasses

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.errors import UserError
from llmctl.finetune.data.encoding import DraftEncoder
from llmctl.finetune.data.forms import Chat, Completion, Text
from llmctl.finetune.data.rendering import Renderer
from llmctl.finetune.data.template import choose_template
from llmctl.tokenizer import Tokenizer

# Templates of the shapes that chat models have; `{% generation %}` marks the answer and is left out for the other tests.
CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{- bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}{{ bos_token }}
{%- for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"""
GEMMA = """\
{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m.content | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
TAGGED = {"chatml": CHATML, "llama-3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA}
ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}
# What the model writes is the answer with this in front; a blank belongs to Mistral's answers.
LEADS = {"mistral": " "}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<think>", "</think>"]  # fmt: skip

TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Et en français ?"},
    {"role": "assistant", "content": "Quatre — 四.\nVoilà"},
]


def untagged(template: str) -> str:
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def json_text() -> str:
    """A byte-level BPE of some merges, which adds BOS by itself as Llama's does."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["It is what it is: assistant, user, model.\n\n Et en quatre ?"] * 9, trainer)
    bpe.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", bpe.token_to_id("<s>"))]),
        ]
    )
    return bpe.to_str()


@pytest.fixture(scope="module")
def tokenizer_with(json_text):
    def build(template: str | None) -> Tokenizer:
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        return Tokenizer.from_json(json_text, {**config, **({"chat_template": template} if template else {})})

    return build


def sequences(tokenizer, value, loss_on="assistant"):
    return DraftEncoder(tokenizer).encode(Renderer(tokenizer, loss_on).drafts(value))


def learned_text(tokenizer, tokens) -> list[str]:
    """The stretches of learned tokens as text."""
    parts, before = [], False
    for token, learned in zip(tokens.ids.tolist(), tokens.learned.tolist()):
        if learned:
            parts = [*parts, [token]] if not before else [*parts[:-1], [*parts[-1], token]]
        before = learned
    return [tokenizer.decode(part, skip_special_tokens=False) for part in parts]


# --- against transformers ---


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize("n_turns", [2, 4])
def test_a_marking_template_gives_the_mask_of_transformers(tokenizer_with, json_text, name, n_turns):
    tokenizer = tokenizer_with(TAGGED[name])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json_text), bos_token="<s>", eos_token="</s>"
    )
    expected = reference.apply_chat_template(
        TALK[:n_turns], chat_template=TAGGED[name], return_dict=True, return_assistant_tokens_mask=True
    )
    (found,) = sequences(tokenizer, Chat(TALK[:n_turns]))
    assert found.ids.tolist() == expected["input_ids"]
    assert found.learned.tolist() == [bool(mark) for mark in expected["assistant_masks"]]


@pytest.mark.parametrize("name", TAGGED)
def test_without_marks_the_same_tokens_are_found(tokenizer_with, name):
    for messages in (TALK, TALK[:2], [*TALK, {"role": "user", "content": "Merci"}]):
        marked, plain = (
            sequences(tokenizer_with(template), Chat(messages)) for template in (TAGGED[name], untagged(TAGGED[name]))
        )
        assert [each.ids.tolist() for each in plain] == [each.ids.tolist() for each in marked]
        assert [each.learned.tolist() for each in plain] == [each.learned.tolist() for each in marked]


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\ufdd0\ufdd1"), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), st.sampled_from(sorted(TAGGED)), st.booleans())
def test_exactly_the_answers_are_learned_with_their_ends(tokenizer_with, pairs, name, has_marks):
    pairs = [(a.strip(), b.strip()) for a, b in pairs]
    if not all(a and b for a, b in pairs) or any(mark in a + b for a, b in pairs for mark in SPECIAL):
        return
    tokenizer = tokenizer_with(TAGGED[name] if has_marks else untagged(TAGGED[name]))
    messages = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    (found,) = sequences(tokenizer, Chat(messages))
    expected = [f"{LEADS.get(name, '')}{answer}{ENDS[name]}" for _, answer in pairs]
    texts = learned_text(tokenizer, found)
    # a newline of the prompt may stand in one token with the one that begins the answer
    assert [text.lstrip("\n") for text in texts] == [text.lstrip("\n") for text in expected] or found.is_torn
    assert found.ids.tolist() == tokenizer.apply_chat_template(messages)


def test_places_do_not_depend_on_the_post_processor(tokenizer_with, json_text):
    """One that trims the places of tokens leaves transformers without a mask, for it looks for the trimmed space."""
    trimming = json_text.replace('"trim_offsets":false', '"trim_offsets":true')
    assert trimming != json_text
    tokenizer = tokenizer_with(MISTRAL)
    (expected,) = sequences(tokenizer, Chat(TALK))
    (found,) = sequences(Tokenizer.from_json(trimming, tokenizer.config), Chat(TALK))
    assert found.learned.tolist() == expected.learned.tolist()


# --- what is learned ---


def test_what_loss_on_says(tokenizer_with):
    tokenizer = tokenizer_with(untagged(CHATML))
    first, last = "It is 4.<|im_end|>", "Quatre — 四.\nVoilà<|im_end|>"
    expected = {"assistant": [first, last], "last": [last], "completion": [last]}
    for loss_on, texts in expected.items():
        (found,) = sequences(tokenizer, Chat(TALK), loss_on)
        assert learned_text(tokenizer, found) == texts
    (found,) = sequences(tokenizer, Chat(TALK), "all")
    assert found.learned[1:].sum() >= len(found.ids) - 2 and not found.learned[0]
    (found,) = sequences(tokenizer, Chat(TALK, n_prompt=1), "completion")
    assert learned_text(tokenizer, found)[0].startswith(first) and "français" in learned_text(tokenizer, found)[0]


def test_a_prompt_and_turns_without_weight_are_not_learned(tokenizer_with):
    for template in (CHATML, untagged(CHATML)):
        tokenizer = tokenizer_with(template)
        (found,) = sequences(tokenizer, Chat(TALK, n_prompt=3))
        assert learned_text(tokenizer, found) == ["Quatre — 四.\nVoilà<|im_end|>"]
        weightless = [{**message, "weight": 0} if i == 3 else message for i, message in enumerate(TALK)]
        (found,) = sequences(tokenizer, Chat(weightless))
        assert learned_text(tokenizer, found) == ["It is 4.<|im_end|>"]


def test_the_end_is_learned_where_the_template_forgets_it(tokenizer_with):
    bare = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (found,) = sequences(tokenizer_with(bare), Chat(TALK[:2]))
    assert tokenizer_with(bare).decode(found.ids, skip_special_tokens=False).endswith("It is 4.\n</s>")
    assert found.learned[-1]
    outside = CHATML.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                             "{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}")  # fmt: skip
    (found,) = sequences(tokenizer_with(outside), Chat(TALK))
    assert learned_text(tokenizer_with(outside), found)[0] == "It is 4.<|im_end|>"


def test_text_that_looks_like_an_end_is_no_end(tokenizer_with):
    """Found by position: an answer may speak of the tokens that end it."""
    messages = [TALK[0], {"role": "assistant", "content": "Write <|im_end|> to stop\n<|im_start|>assistant\nNo."}]
    for template in (CHATML, untagged(CHATML)):
        (found,) = sequences(tokenizer_with(template), Chat(messages))
        assert learned_text(tokenizer_with(template), found) == [messages[1]["content"] + "<|im_end|>"]


def test_prompt_and_completion_stand_as_they_are_between_the_edges(tokenizer_with):
    tokenizer = tokenizer_with(None)
    (found,) = sequences(tokenizer, Completion("2 + 2 =", " 4"))
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == "<s>2 + 2 = 4</s>"
    assert learned_text(tokenizer, found) == [" 4</s>"] and not found.is_torn
    (again,) = sequences(tokenizer, Completion("<s>2 + 2 =", " 4</s>"))
    assert again.ids.tolist() == found.ids.tolist() and again.learned.tolist() == found.learned.tolist()
    (torn,) = sequences(tokenizer, Completion("It i", "s so"))
    assert torn.is_torn and learned_text(tokenizer, torn) == [" is so</s>"]


def test_plain_text_is_learned_whole_and_special_tokens_in_it_stay_text(tokenizer_with):
    tokenizer = tokenizer_with(None)
    (found,) = sequences(tokenizer, Text("a </s> b"))
    ids, _ = tokenizer.encode_documents(["a </s> b"])
    assert found.ids.tolist() == ids.tolist()
    assert found.learned.tolist() == [False] + [True] * (len(ids) - 1)


def test_the_plain_template_of_a_base_model(tokenizer_with):
    tokenizer = choose_template(tokenizer_with(None), None)
    (found,) = sequences(tokenizer, Chat([{"role": "system", "content": "Be brief."}, *TALK]))
    text = tokenizer.decode(found.ids, skip_special_tokens=False)
    assert text.startswith("<s>System:\nBe brief.\n\nUser:\nWhat is 2 + 2?\n\nAssistant:\nIt is 4.</s>\n\nUser:")
    assert learned_text(tokenizer, found) == ["It is 4.</s>", "Quatre — 四.\nVoilà</s>"]
    prompt = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)
    (short,) = sequences(tokenizer, Chat(TALK[:2]))
    assert short.ids[: len(prompt)].tolist() == prompt and short.learned[len(prompt)]
    without_bos = choose_template(Tokenizer.bytes(), None)
    assert without_bos.render_chat(TALK[:1]).text.startswith("User:")


def test_a_template_from_a_file_or_a_text_replaces_the_models_own(tokenizer_with, tmp_path):
    (tmp_path / "chat.jinja").write_text(CHATML)
    for given_template in (str(tmp_path / "chat.jinja"), CHATML):
        assert choose_template(tokenizer_with(GEMMA), given_template).chat_template == CHATML
    assert choose_template(tokenizer_with(GEMMA), None).chat_template == GEMMA
    with pytest.raises(UserError, match="no such file"):
        choose_template(tokenizer_with(None), "chat.jinj")


# --- templates that do not hold still ---


def test_earlier_turns_that_lose_their_thoughts_become_examples_of_their_own(tokenizer_with):
    """Some templates show the thoughts of the last answer only: each answer is learned as it would have been asked for."""
    forgetful = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}
{{- '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    talk = [dict(message) for message in TALK]
    talk[1]["content"] = "<think>easy</think>It is 4."
    tokenizer = tokenizer_with(forgetful)
    first, second = sequences(tokenizer, Chat(talk))
    assert first.ids.tolist() == tokenizer.apply_chat_template(talk[:2])
    assert second.ids.tolist() == tokenizer.apply_chat_template(talk)
    assert learned_text(tokenizer, first) == ["<think>easy</think>It is 4.<|im_end|>"]
    assert learned_text(tokenizer, second) == ["Quatre — 四.\nVoilà<|im_end|>"]
    assert len(sequences(tokenizer, Chat(TALK))) == 1  # nothing to forget


def test_a_prompt_that_opens_a_thought(tokenizer_with):
    opening = untagged(CHATML).replace("'<|im_start|>assistant\\n' }}", "'<|im_start|>assistant\\n<think>\\n' }}")
    (found,) = sequences(tokenizer_with(opening), Chat(TALK))
    assert learned_text(tokenizer_with(opening), found)[0] == "It is 4.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", r"leaves out turn 2 \(assistant\)"),
        ("{{ messages[0].content }}{{ messages[-1].content }}", r"leaves out turn 2 \(assistant\)"),
        ("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", r"turn 2 \(assistant\) out of its place"),
        ("{{ raise_exception('no') }}", "does not take these messages: no"),
        ("{% for m in messages %}", "broken: line 1"),
        ("{{ messages[0].nothing.at_all }}", "failed"),
    ],
)
def test_templates_that_lose_turns_or_fail(tokenizer_with, template, message):
    with pytest.raises(UserError, match=message):
        sequences(tokenizer_with(template), Chat(TALK))


def test_a_system_message_may_be_put_elsewhere(tokenizer_with):
    last = (
        "{% for m in messages[1:] %}{{ m.content }}{% if loop.last %}{{ messages[0].content }}{% endif %}{% endfor %}"
    )
    chat = Chat([{"role": "system", "content": "Be brief."}, *TALK[:3]])
    assert sequences(tokenizer_with(last), chat, "all")
    with pytest.raises(UserError, match=r"turn 1 \(system\)"):
        sequences(tokenizer_with(last.replace("messages[0].content", "'x'")), chat)


def test_tool_calls_are_learned_and_missed_where_they_are_dropped(tokenizer_with):
    calls = CHATML.replace(
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}"
        "{% endgeneration %}",
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    chat = Chat(
        [
            TALK[0],
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
            TALK[1],
        ]
    )
    for template in (calls, untagged(calls)):
        (found,) = sequences(tokenizer_with(template), chat)
        asked, answered = learned_text(tokenizer_with(template), found)
        assert asked == '{"name": "add", "arguments": {"a": 2}}<|im_end|>' and answered == "It is 4.<|im_end|>"
    with pytest.raises(UserError, match=r"leaves out turn 2 \(assistant\)"):
        sequences(tokenizer_with(CHATML), chat)


def test_drafts_are_values():
    tokenizer = Tokenizer.bytes()
    (draft,) = Renderer(tokenizer).drafts(Completion("a", "b"))
    assert dataclasses.replace(draft) == draft and draft.learned == [(1, 2)]
