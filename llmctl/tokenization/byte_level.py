"""Recognise a byte-level BPE that the native encoder knows to the last id."""

from __future__ import annotations

from unicodedata import is_normalized

from llmctl.ops import bpe
from llmctl.tokenization import decoding, training

CL100K_PATTERN = training.SPLIT_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Split patterns as tokenizer.json files spell them.
SPLITS = {
    training.SPLIT_PATTERN: bpe.SPLIT_QWEN2,
    CL100K_PATTERN: bpe.SPLIT_CL100K,
    O200K_PATTERN: bpe.SPLIT_O200K,
}
_DIGITS = {"type": "Digits", "individual_digits": True}


def native_model(spec: dict) -> bpe.BpeModel | None:
    """The model of a tokenizer.json, as the library writes it, in native terms, or None where any part of it is not known exactly.

    Special tokens written in a text are to stay text, other added tokens become their ids.
    """
    model = spec["model"]
    split = _split(spec["pre_tokenizer"])
    tokens = _added_tokens(spec)
    plain = model["type"] == "BPE" and not any(
        model[key] for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if split is None or tokens is None or not plain or not _normalizer_known(spec):
        return None
    vocab = model["vocab"]
    byte_ids = [vocab.get(character) for _, character in sorted(training.byte_characters().items())]
    if None in byte_ids:
        return None
    merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in model["merges"]]
    words = {}
    if model["ignore_merges"]:
        spelled = ((decoding.spelled_bytes(token), token_id) for token, token_id in vocab.items())
        words = {word: token_id for word, token_id in spelled if word is not None}
    return bpe.BpeModel(split, byte_ids, merges, words, tokens)


def normalizes(spec: dict) -> bool:
    """Whether the text is brought to NFC first."""
    return spec["normalizer"] is not None


def finds_tokens_first(spec: dict) -> bool:
    """Whether added tokens are looked for in the text as it was written, and normalization cannot join what they part."""
    return any(not token["normalized"] for token in spec["added_tokens"] if not token["special"])


def adds_space(spec: dict) -> bool:
    """Whether a text that begins with something else gets a space in front of it."""
    return spec["pre_tokenizer"].get("add_prefix_space", False)


def _normalizer_known(spec: dict) -> bool:
    return (spec["normalizer"] or {"type": "NFC"}) == {"type": "NFC"}


def _split(pre_tokenizer: dict | None) -> int | None:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *first, byte_level = steps
    if not byte_level or byte_level["type"] != "ByteLevel" or (first and byte_level["add_prefix_space"]):
        return None
    if not first:
        return bpe.SPLIT_GPT2 if byte_level["use_regex"] else bpe.SPLIT_NONE
    if first == [_DIGITS] and byte_level["use_regex"]:
        return bpe.SPLIT_DIGITS
    known = len(first) == 1 and first[0]["type"] == "Split" and not byte_level["use_regex"]
    # Keeping what matches and removing what does not is the same where the pattern matches everything.
    if not known or (first[0]["behavior"], first[0]["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    return SPLITS.get(first[0]["pattern"].get("Regex"))


def _added_tokens(spec: dict) -> dict[bytes, int] | None:
    """Tokens to find in a text; special ones are found, since that hides what they overlap, and stay text.

    None where the library would look for them in two passes, at their neighbourhood, or put a space behind each.
    """
    groups = {}
    for token in spec["added_tokens"]:
        groups.setdefault(token["normalized"], []).append(token)
    live = [group for group in groups.values() if not all(token["special"] for token in group)]
    if not live:
        return {}
    plain = [token for token in live[0] if not token["special"]]
    if len(live) > 1 or any(token[flag] for token in plain for flag in ("single_word", "lstrip", "rstrip")):
        return None
    if adds_space(spec) or (normalizes(spec) and any(not is_normalized("NFC", token["content"]) for token in live[0])):
        return None
    return {token["content"].encode(): bpe.STAYS_TEXT if token["special"] else token["id"] for token in live[0]}
