"""Byte-level BPE tokenizers of our own: learnt from text, or with no merges at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from llmctl.errors import UserError

END_OF_TEXT = "<|endoftext|>"
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
_N_SENTINELS = 100


@dataclass(frozen=True)
class Specials:
    """The special tokens of a trained tokenizer: `tokens` in the order of their ids, and what stands around one text and
    around two (None: an EOS behind documents alone)."""

    tokens: tuple[str, ...]
    config: dict
    around: tuple[str, str] | None = None


def _roles(**tokens: str) -> dict:
    return {**CONFIG, **{f"{role}_token": token for role, token in tokens.items()}}


SPECIALS = {
    "text": Specials((END_OF_TEXT,), CONFIG),
    # in the order that RoBERTa's and BART's configs take for granted
    "encoder": Specials(
        ("<s>", "<pad>", "</s>", "<mask>"),
        _roles(bos="<s>", cls="<s>", eos="</s>", sep="</s>", pad="<pad>", mask="<mask>"),
        ("<s> $A </s>", "<s> $A </s> </s> $B </s>"),
    ),
    "sentinels": Specials(
        ("<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(_N_SENTINELS))),
        {key: value for key, value in _roles(eos="</s>", pad="<pad>").items() if key != "bos_token"},
        ("$A </s>", "$A </s> $B </s>"),
    ),
}
"""By the names of `tokenize --special-tokens`."""
# Words keep the space or mark in front of them, digits stand alone, blank lines and indentation stay whole (Qwen2's
# pattern): against GPT-2's it spends fewer tokens on source code and none on learning three-digit numbers.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The trainer keeps several words of bookkeeping for each byte of a text that it splits, so it gets texts in pieces.
PIECE = 1 << 16


def byte_level_bpe(texts: Iterable[str], vocab_size: int, specials: Specials = SPECIALS["text"]) -> str:
    """tokenizer.json of a BPE of at most `vocab_size` tokens learnt from `texts`; the same texts give the same file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len(specials.tokens)
    if vocab_size < least:
        named = " ".join(specials.tokens[:4]) + (" ..." if len(specials.tokens) > 4 else "")
        raise UserError(f"a vocabulary of {vocab_size} is too small", hint=f"the bytes and {named} alone need {least}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(specials.tokens), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    if specials.around is None:
        return _finished(tokenizer)
    if "<mask>" in specials.tokens:  # it stands for a word and the space in front of it
        tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.decoder = decoders.ByteLevel()
    single, pair = specials.around
    used = [(token, number) for number, token in enumerate(specials.tokens) if token in single.split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    return tokenizer.to_str()


def plain_bytes() -> str:
    """tokenizer.json whose ids 0 to 255 are the bytes and 256 the end of a text."""
    vocab = {character: byte for byte, character in byte_characters().items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _finished(tokenizer)


def byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable}
    table.update({byte: chr(256 + position) for position, byte in enumerate(others)})
    return table


def _finished(tokenizer: tokenizers.Tokenizer) -> str:
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer.to_str()


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Each text cut where the pattern cuts it anyway: in front of a space after a letter."""
    cut = re.compile(r"(?<=[A-Za-z]) ")
    for text in texts:
        start = 0
        while len(text) - start > PIECE:
            place = cut.search(text, start + PIECE)
            if place is None:
                break
            yield text[start : place.start()]
            start = place.start()
        yield text[start:]
