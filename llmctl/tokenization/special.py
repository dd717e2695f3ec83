"""Which special tokens a tokenizer has, and what its post-processor puts around a text."""

from __future__ import annotations

import logging

import tokenizers

log = logging.getLogger("llmctl")

# The usual names, for a tokenizer.json that comes without a configuration.
USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


def content(value: str | dict | None) -> str | None:
    """The string of a special token, which configurations write as a string or as a dict with its flags."""
    return value.get("content") if isinstance(value, dict) else value


def token_id(config: dict, name: str, tokenizer: tokenizers.Tokenizer) -> int | None:
    token = content(config.get(name))
    return None if token is None else tokenizer.token_to_id(token)


def template_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and behind a text."""
    encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    own = [position for position, added in enumerate(mask) if not added]
    start, stop = (own[0], own[-1] + 1) if own else (len(mask), len(mask))
    return encoding.ids[:start], encoding.ids[stop:]


def named_in_full(config: dict, tokenizer: tokenizers.Tokenizer, front: list[int]) -> dict:
    """The configuration with BOS and EOS named: by itself, else by the post-processor, else by the usual names."""
    config = dict(config)
    specials = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if content(config.get("bos_token")) is None and content(config.get("cls_token")) is None and len(front) == 1:
        config["bos_token"] = tokenizer.id_to_token(front[0])
    if content(config.get("eos_token")) is None and content(config.get("sep_token")) is None:
        guess = next((token for token in USUAL_EOS if token in specials), None)
        if guess is not None:
            log.info("the tokenizer does not name its end-of-text token; taking %s", guess)
            config["eos_token"] = guess
    return config


def default_chat_template(config: dict) -> str | None:
    """The chat template; of several named ones, the one called default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template
