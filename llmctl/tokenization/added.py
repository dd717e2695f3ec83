"""The added tokens of a tokenizer, gathered from all the places where older files name them."""

from __future__ import annotations

from llmctl.errors import UserError
from llmctl.tokenization import special

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def token(content: str, special: bool = True, **flags: bool) -> dict:
    """An added token, without an id as yet; one that is not special is looked for in the normalized text, unless told otherwise."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special, "special": special}
    return {"content": content, **plain, **flags}


def gathered(own: list[dict], vocab: dict[str, int], config: dict) -> list[dict]:
    """Added tokens in order of their ids: the vocabulary's `own`, and those of the configuration.

    A configuration names them in `added_tokens` (the content of added_tokens.json, to ids), `added_tokens_decoder` (ids to
    tokens with flags), by role ("bos_token"), and in lists. A token that the vocabulary holds keeps its id; new ones
    follow behind, and where their ids leave room, unused tokens fill it: ids of a tokenizer.json have no holes.
    """
    tokens = {each["content"]: {key: value for key, value in each.items() if key != "id"} for each in own}
    ids = {each["content"]: each["id"] for each in own if "id" in each}
    for content, token_id in (config.get("added_tokens") or {}).items():
        tokens.setdefault(content, token(content, special=False, normalized=False))
        ids[content] = token_id
    for number, value in (config.get("added_tokens_decoder") or {}).items():
        each = _with_flags(value, tokens)
        tokens[each["content"]] = each
        ids[each["content"]] = int(number)
    for value in _named(config):
        each = _with_flags(value, tokens, is_special=True)
        tokens[each["content"]] = each
    return _numbered(tokens, ids, vocab)


def _with_flags(value: str | dict, tokens: dict[str, dict], is_special: bool = False) -> dict:
    """A token as a configuration writes it, a string or a dict with its flags, on top of what is known of it."""
    content = special.content(value)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if isinstance(value, dict) else {}
    each = (tokens.get(content) or token(content, flags.get("special", True))) | flags
    if each["special"] or is_special:
        # Some configurations say that special tokens are normalized, by which "</s>" would be one at a text's start only.
        each |= {"special": True, "normalized": False}
    return each


def _named(config: dict) -> list[str | dict]:
    values = [config[role] for role in special.ROLES if special.content(config.get(role))]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key) or []
        values += more.values() if isinstance(more, dict) else more
    return values


def _numbered(tokens: dict[str, dict], ids: dict[str, int], vocab: dict[str, int]) -> list[dict]:
    taken = {token_id: content for content, token_id in vocab.items()}
    numbered = {vocab[content]: each for content, each in tokens.items() if content in vocab}
    for content, token_id in ids.items():
        if vocab.get(content, token_id) != token_id:
            raise _clash(content, token_id, f"it the id {vocab[content]}")
        if taken.setdefault(token_id, content) != content:
            raise _clash(content, token_id, f"that id to {taken[token_id]!r}")
        numbered[token_id] = tokens[content]
    first = max(vocab.values(), default=-1) + 1
    free = max([first - 1, *numbered]) + 1
    for content, each in tokens.items():
        if content not in vocab and content not in ids:
            numbered[free] = each
            free += 1
    for token_id in range(first, free):
        numbered.setdefault(token_id, token(f"<|unused_{token_id}|>"))
    return [{"id": token_id, **numbered[token_id]} for token_id in sorted(numbered)]


def _clash(content: str, token_id: int, fact: str) -> UserError:
    return UserError(f"the added token {content!r} has the id {token_id}, but the vocabulary gives {fact}")
