"""Tokens as a person can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence

from llmctl.tokenizer import Tokenizer

_VISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def token_labels(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token with its spaces visible; bytes that are no text by themselves in hexadecimal."""
    return [_label(tokenizer, token) for token in ids]


def _label(tokenizer: Tokenizer, token: int) -> str:
    raw = tokenizer.token_bytes(token)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return f"<{raw.hex(' ')}>"
    return (text or tokenizer.decode([token], skip_special_tokens=False) or f"#{token}").translate(_VISIBLE)
