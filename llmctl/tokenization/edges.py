"""What a tokenizer puts around a text."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice

import tokenizers
from tokenizers.models import WordLevel

log = logging.getLogger("llmctl")


def template_ids(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor puts before and behind a text."""
    for text in _probes(tokenizer):
        encoding = tokenizer.encode(text)
        own = [position for position, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
        if own:
            return encoding.ids[: own[0]], encoding.ids[own[-1] + 1 :]
    return [], []


def _probes(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """Texts of which one should have a token: a letter, else some tokens themselves."""
    if not isinstance(tokenizer.model, WordLevel):  # which fails where it knows neither the word nor an unknown one
        yield "a"
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    yield from islice((token for token in tokenizer.get_vocab(with_added_tokens=False) if token not in added), 64)


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


def note_flags(config: dict, stand: dict[str, bool]) -> None:
    """Says where add_bos_token or add_eos_token is another than what `stand`s around a text: transformers ignores it too."""
    for role, stands in stand.items():
        wanted = config.get(f"add_{role}")
        if isinstance(wanted, bool) and wanted != stands:
            log.info("add_%s is %s in the configuration, but not so in tokenizer.json, which counts", role, wanted)
