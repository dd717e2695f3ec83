"""Ids back to text, one at a time, with no character torn and no space lost."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence

import tokenizers

from llmctl.tokenization import training

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CHARACTER_BYTES = {character: byte for byte, character in training.byte_characters().items()}


def spelled_bytes(spelling: str) -> bytes | None:
    """The bytes that a byte-level token stands for, or None where a character of it is no byte's."""
    try:
        return bytes([CHARACTER_BYTES[character] for character in spelling])
    except KeyError:
        return None


class ByteLevelPieces:
    """Tokens spelled in the characters that stand for bytes."""

    stripped_spaces = 0

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        spelling = self._tokenizer.id_to_token(token) or ""
        spelled = spelled_bytes(spelling)
        return spelling.encode() if spelled is None else spelled  # an added token is written as itself


class SentencePieces:
    """Tokens with U+2581 for a space, and <0xNN> for a byte; the decoder drops `stripped_spaces` at the start of a text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stripped_spaces: int):
        self._tokenizer = tokenizer
        self.stripped_spaces = stripped_spaces

    def bytes_of(self, token: int) -> bytes:
        spelling = self._tokenizer.id_to_token(token) or ""
        byte = BYTE_TOKEN.fullmatch(spelling)
        return bytes([int(byte[1], 16)]) if byte else spelling.replace("▁", " ").encode()


def pieces_for(tokenizer: tokenizers.Tokenizer) -> ByteLevelPieces | SentencePieces | None:
    """How tokens spell bytes, or None where the decoder is not a plain concatenation of them (WordPiece, say)."""
    decoder = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteLevelPieces(tokenizer)
    replaces = steps[0].get("pattern") == {"String": "▁"} and steps[0].get("content") == " "
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or not replaces:
        return None
    if kinds[3:] == []:
        return SentencePieces(tokenizer, stripped_spaces=0)
    if kinds[3:] == ["Strip"] and steps[3]["content"] == " " and steps[3]["stop"] == 0:
        return SentencePieces(tokenizer, steps[3]["start"])
    return None


def token_bytes(tokenizer: tokenizers.Tokenizer, pieces: ByteLevelPieces | SentencePieces | None, token: int) -> bytes:
    return tokenizer.decode([token], skip_special_tokens=False).encode() if pieces is None else pieces.bytes_of(token)


class ByteStreamDecoder:
    """Joins the bytes of tokens and gives out whole characters.

    The text equals `decode`'s, but for bytes that are no UTF-8 in a tokenizer with <0xNN> tokens: `decode` waits for
    the end of such a run and then replaces all of it, which a stream cannot.
    """

    def __init__(self, pieces: ByteLevelPieces | SentencePieces, after: Sequence[int], skipped: frozenset[int]):
        self._pieces = pieces
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = pieces.stripped_spaces
        for token in after:
            self.push(token)

    def push(self, token: int) -> str:
        """The text that became complete with `token`, often one word, sometimes nothing."""
        token = int(token)
        return "" if token in self._skipped else self._stripped(self._utf8.decode(self._pieces.bytes_of(token)))

    def flush(self) -> str:
        """U+FFFD for a character that never became complete, else nothing."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while text and self._spaces_to_strip:
            if text[0] != " ":
                self._spaces_to_strip = 0
                break
            text = text[1:]
            self._spaces_to_strip -= 1
        return text


class WindowStreamDecoder:
    """For decoders that look at neighbouring tokens: the difference that new tokens make behind the ones before."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, after: Sequence[int], skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._shown = [int(token) for token in after]
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        self._pending.append(int(token))
        text = self._added_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._shown, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        text = self._added_text()
        self._pending = []
        return text

    def _added_text(self) -> str:
        before = self._tokenizer.decode(self._shown, skip_special_tokens=self._skip)
        both = self._tokenizer.decode(self._shown + self._pending, skip_special_tokens=self._skip)
        return both[len(before) :]
