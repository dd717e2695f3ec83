"""Which special tokens a tokenizer has."""

from __future__ import annotations

import logging

import tokenizers

log = logging.getLogger("llmctl")

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# The usual names, for a tokenizer.json that comes without a configuration.
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
USUAL = {"mask_token": ("[MASK]", "<mask>"), "pad_token": ("[PAD]", "<pad>")}


def content(value: str | dict | None) -> str | None:
    """The string of a special token, which configurations write as a string or as a dict with its flags."""
    return value.get("content") if isinstance(value, dict) else value


def token_id(config: dict, role: str, tokenizer: tokenizers.Tokenizer) -> int | None:
    token = content(config.get(role))
    return None if token is None else tokenizer.token_to_id(token)


def named_in_full(config: dict, tokenizer: tokenizers.Tokenizer, front: list[int], back: list[int]) -> dict:
    """The configuration with its special tokens named: by itself, else by the post-processor, else by the usual names."""
    config = dict(config)
    specials = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}

    def missing(role: str) -> bool:
        return content(config.get(role)) is None

    for role, names in USUAL.items():
        guess = next((token for token in names if token in specials), None)
        if missing(role) and guess is not None:
            config[role] = guess
    if not missing("mask_token") and len(front) == len(back) == 1:
        # An encoder's text stands between a token of the whole and a separator, whatever else these are called.
        for role, ids in (("cls_token", front), ("sep_token", back)):
            config[role] = config.get(role) or tokenizer.id_to_token(ids[0])
    if missing("bos_token") and missing("cls_token") and len(front) == 1:
        config["bos_token"] = tokenizer.id_to_token(front[0])
    if missing("eos_token") and missing("sep_token"):
        guess = next((token for token in USUAL_EOS if token in specials), None)
        if guess is not None:
            log.info("the tokenizer does not name its end-of-text token; taking %s", guess)
            config["eos_token"] = guess
    return config
