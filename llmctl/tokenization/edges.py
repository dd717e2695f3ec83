"""What a tokenizer puts around a text."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers

from llmctl.tokenization import special

ROLES = ("bos_token", "eos_token")
FLAGS = ("add_bos_token", "add_eos_token")


def template_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and behind a text."""
    encoding = tokenizer.encode("a")
    mask = encoding.special_tokens_mask
    own = [position for position, added in enumerate(mask) if not added]
    if own:
        return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    return encoding.ids, []


def template(
    ids: dict[str, int], front: Sequence[str], back: Sequence[str], between: Sequence[str], pair_type: int = 0
) -> dict | None:
    """The post-processor that puts tokens around a text, and `between` in front of the second text of a pair."""
    if not front and not back:
        return None

    def row(tokens: Sequence[str], kind: int) -> list[dict]:
        return [{"SpecialToken": {"id": token, "type_id": kind}} for token in tokens]

    single = [*row(front, 0), {"Sequence": {"id": "A", "type_id": 0}}, *row(back, 0)]
    second = [*row(between, pair_type), {"Sequence": {"id": "B", "type_id": pair_type}}, *row(back, pair_type)]
    tokens = sorted({*front, *back, *between})
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + second,
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in tokens},
    }


def as_configured(tokenizer: tokenizers.Tokenizer, json_text: str, config: dict) -> tuple[str, dict]:
    """A tokenizer.json that puts BOS and EOS around a text as add_bos_token and add_eos_token have it.

    `json_text` is what `tokenizer` was read from; both stay the same where they do so already, and where something else
    than BOS and EOS stands there. The configuration then has both flags or none: transformers takes a missing one for false.
    """
    if not any(isinstance(config.get(flag), bool) for flag in FLAGS):
        return json_text, config
    tokens = [special.content(config.get(role)) for role in ROLES]
    ids = [token and tokenizer.token_to_id(token) for token in tokens]
    present = template_ids(tokenizer)
    if special.content(config.get("cls_token")) or any(edge not in ([], [own]) for edge, own in zip(present, ids)):
        return json_text, {key: value for key, value in config.items() if key not in FLAGS}
    wanted = [
        own is not None and bool(edge if config.get(flag) is None else config[flag])
        for flag, own, edge in zip(FLAGS, ids, present)
    ]
    config = config | dict(zip(FLAGS, wanted))
    if wanted == [bool(edge) for edge in present]:
        return json_text, config
    front, back = ([token] if add else [] for token, add in zip(tokens, wanted))
    spec = json.loads(json_text)
    spec["post_processor"] = template(dict(zip(tokens, ids)), front, back, between=front)
    json_text = json.dumps(spec, ensure_ascii=False)
    tokenizer.post_processor = tokenizers.Tokenizer.from_str(json_text).post_processor
    return json_text, config
