"""A tokenizer read from files older than tokenizer.json, on its way to becoming one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from llmctl.errors import UserError
from llmctl.tokenization import added, edges, special


@dataclass
class Draft:
    """Sections of a tokenizer.json, and the special tokens that its kind has unless a configuration names others.

    `vocab` maps every token to its id, and is the model's own where that holds a dict; `tokens` are those that are found in a text as a whole, as `added.token`
    makes them. `names` gives the tokens of roles ("bos_token"), which count where the vocabulary holds them. `front` and
    `back` are the roles around a text, `between` those in front of the second text of a pair, `pair_type` its type id.
    """

    vocab: dict[str, int]
    model: dict
    tokens: list[dict] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    normalizer: dict | None = None
    pre_tokenizer: dict | None = None
    decoder: dict | None = None
    front: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    pair_type: int = 0


# What a tokenizer.json says by itself, or what names files and code that a converted tokenizer no longer has.
_STALE = frozenset(
    ["add_bos_token", "add_eos_token", "added_tokens", "added_tokens_decoder", "extra_ids", "legacy"]
    + ["auto_map", "from_slow", "merges_file", "name_or_path", "sp_model_kwargs", "spaces_between_special_tokens"]
    + ["special_tokens_map_file", "tokenizer_file", "vocab_file"]
)


def finished(draft: Draft, config: dict) -> tuple[str, dict]:
    """tokenizer.json and tokenizer_config.json; `config` is what the files beside the vocabulary say.

    Raises UserError where the ids of the vocabulary and of the added tokens do not make one row without holes.
    """
    known = draft.vocab.keys() | {token["content"] for token in draft.tokens}
    named = {role: token for role, token in draft.names.items() if token in known}
    config = named | {key: value for key, value in config.items() if value is not None}
    _check_ids(draft.vocab)
    tokens = added.gathered(draft.tokens, draft.vocab, config)
    ids = {token["content"]: token["id"] for token in tokens}
    # The library numbers added tokens upwards from the vocabulary, so one that stands inside of it has to be of it.
    last = max(draft.vocab.values())
    draft.vocab.update({token: token_id for token, token_id in ids.items() if token_id < last})
    _check_no_hole(ids | draft.vocab)
    front, back, between = _edges(draft, config)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": draft.normalizer,
        "pre_tokenizer": draft.pre_tokenizer,
        "post_processor": edges.template(ids | draft.vocab, front, back, between, draft.pair_type),
        "decoder": draft.decoder,
        "model": draft.model,
    }
    config = {key: value for key, value in config.items() if key not in _STALE} | _roles_with_flags(tokens, config)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.setdefault("clean_up_tokenization_spaces", False)
    types = ["token_type_ids"] if draft.pair_type else []
    config.setdefault("model_input_names", ["input_ids", *types, "attention_mask"])
    return json.dumps(spec, ensure_ascii=False), config


def _roles_with_flags(tokens: list[dict], config: dict) -> dict[str, dict | str]:
    """The tokens of roles as transformers has to read them: one that is a mere string loses its flags there."""
    by_content = {token["content"]: token for token in tokens}
    roles = {role: by_content[special.content(config[role])] for role in special.ROLES if config.get(role)}
    plain = {role: token["content"] for role, token in roles.items() if token == token | added.token(token["content"])}
    flags = {role: {key: value for key, value in token.items() if key != "id"} for role, token in roles.items()}
    return {role: {"__type": "AddedToken", **flags[role]} for role in roles} | plain


def _check_ids(vocab: dict[str, int]) -> None:
    if not vocab:
        raise UserError("the vocabulary is empty")
    tokens: dict[int, str] = {}
    for token, token_id in vocab.items():
        if not isinstance(token_id, int) or token_id < 0:
            raise UserError(f"the token {token!r} has the id {token_id!r}, expected a number from 0 on")
        if tokens.setdefault(token_id, token) != token:
            raise UserError(f"the tokens {tokens[token_id]!r} and {token!r} have the same id {token_id}")


def _check_no_hole(ids: dict[str, int]) -> None:
    hole = min(set(range(len(ids))).difference(ids.values()), default=None)
    if hole is not None:
        raise UserError(
            f"the vocabulary has a hole: no token has the id {hole}, but ids go up to {max(ids.values())}",
            hint="a file of added tokens may be missing (added_tokens.json, tokenizer_config.json), or lines were lost",
        )


def _edges(draft: Draft, config: dict) -> list[list[str]]:
    """Tokens in front of a text, behind it, and in front of the second of a pair; BOS and EOS as the configuration has it."""
    front, back, between = draft.front, draft.back, draft.between
    if "cls_token" not in front:
        if isinstance(config.get("add_bos_token"), bool):
            front = ("bos_token",) if config["add_bos_token"] else ()
        if isinstance(config.get("add_eos_token"), bool):
            back = ("eos_token",) if config["add_eos_token"] else ()
        between = front
    return [[special.content(config[role]) for role in roles if config.get(role)] for roles in (front, back, between)]
