"""The chat template that training and serving share: the model's own, one that is given, or a plain one."""

from __future__ import annotations

import os
from pathlib import Path

from llmctl.errors import UserError
from llmctl.tokenizer import Tokenizer

PLAIN = """\
{%- if begin_with_bos %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{{- "Assistant:\\n" }}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endgeneration %}
{{- "\\n\\n" }}
{%- else %}
{{- message.role | capitalize }}{{ ":\\n" }}{{ message.content }}{{ "\\n\\n" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "Assistant:\\n" }}{% endif %}
"""
"""For a base model without a template: each turn under its role's name, the answer closed by the model's end token."""


def choose_template(tokenizer: Tokenizer, given: str | None) -> Tokenizer:
    """The tokenizer with the template of a file or text, else with its own, else with the plain one.

    Raises `UserError` for a file that is not there.
    """
    if given is not None:
        return with_template(tokenizer, _read(given))
    return tokenizer if tokenizer.chat_template else with_template(tokenizer, _plain_for(tokenizer))


def with_template(tokenizer: Tokenizer, template: str | list) -> Tokenizer:
    """The tokenizer with another chat template; what it saves has it too."""
    return Tokenizer.from_json(tokenizer.json, {**tokenizer.config, "chat_template": template})


def _plain_for(tokenizer: Tokenizer) -> str:
    return PLAIN.replace("begin_with_bos", str(tokenizer.adds_bos).lower())


def _read(chosen: str) -> str:
    if "{{" in chosen or "{%" in chosen:
        return chosen
    if not os.path.exists(chosen):
        raise UserError(f"--chat-template {chosen}: no such file, and no Jinja template either")
    try:
        return Path(chosen).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat-template {chosen}: {error}") from error
