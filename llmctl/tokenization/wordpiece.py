"""Vocabularies of one token a line: BERT's words and pieces of words, and ESM's residues of proteins."""

from __future__ import annotations

import re

from llmctl.errors import UserError
from llmctl.tokenization import added, draft

BERT_NAMES = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
ESM_NAMES = {
    "unk_token": "<unk>",
    "cls_token": "<cls>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
    "eos_token": "<eos>",
}


def convert(text: str, config: dict, family: str) -> tuple[str, dict]:
    """tokenizer.json and its configuration of a vocab.txt; raises UserError for a line without a token."""
    vocab = _vocabulary(text)
    is_esm = family == "esm" or (not family and "<cls>" in vocab and "[CLS]" not in vocab)
    return draft.finished(_esm(vocab) if is_esm else _bert(vocab, config), config)


def _vocabulary(text: str) -> dict[str, int]:
    # Only line feeds end a token: some tokens are other kinds of white space.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    blank = next((number for number, line in enumerate(lines, start=1) if not line), None)
    if blank is not None:
        raise UserError(f"line {blank} holds no token; the line's number is the token's id")
    return {line: number for number, line in enumerate(lines)}


def _bert(vocab: dict[str, int], config: dict) -> draft.Draft:
    names = {role: config.get(role) or name for role, name in BERT_NAMES.items()}
    unknown = names["unk_token"] if isinstance(names["unk_token"], str) else names["unk_token"]["content"]
    if unknown not in vocab:
        raise UserError(f"no token {unknown} for unknown words", hint="is this a vocabulary of WordPiece?")
    lowercase = bool(config.get("do_lower_case", True))
    return draft.Draft(
        vocab,
        {
            "type": "WordPiece",
            "unk_token": unknown,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
        names=BERT_NAMES,
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
            "strip_accents": config.get("strip_accents"),  # null: as letters' case
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
        front=("cls_token",),
        back=("sep_token",),
        pair_type=1,
    )


def _esm(vocab: dict[str, int]) -> draft.Draft:
    specials = set(ESM_NAMES.values())
    pieces = sorted((token for token in vocab if token not in specials), key=len, reverse=True)
    # A special token of a corpus is text, which is no residue; cut in two it is not taken for one either.
    marks = [f"{_escaped(token[0])}(?={_escaped(token[1:])})" for token in sorted(specials & vocab.keys())]
    residues = {"Regex": "|".join([*map(_escaped, pieces), *marks])}
    return draft.Draft(
        vocab,
        {"type": "WordLevel", "vocab": vocab, "unk_token": ESM_NAMES["unk_token"]},
        tokens=[added.token(token) for token in ESM_NAMES.values() if token in vocab],
        names=ESM_NAMES,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": residues, "behavior": "Isolated", "invert": False},
                {"type": "WhitespaceSplit"},
            ],
        },
        decoder={"type": "Fuse"},
        front=("cls_token",),
        back=("eos_token",),
    )


def _escaped(token: str) -> str:
    # Not re.escape: the pattern is for another engine, in which a backslash before a letter means something.
    return re.sub(r"([^\w\s])", r"\\\1", token)
