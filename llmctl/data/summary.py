"""What a token stream holds: totals of its splits, and its first documents as text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llmctl.data.corpus import contents_sha256
from llmctl.errors import UserError
from llmctl.stream_header import TRAIN, Totals
from llmctl.streams import TokenBatch, TokenStream
from llmctl.tokenizer import Tokenizer

SHOWN_TOKENS = 1000  # of a document; the rest is counted and not shown


def summarize(streams: Iterable[TokenStream], name: str, n_documents: int = 0) -> Iterator[dict[str, Any]]:
    """A record "tokens" with what all shards hold together, then a record "document" for each of the first ones.

    Reads everything once, in bounded memory, and checks it: raises `UserError` for a truncated, damaged or mixed stream.
    """
    documents = _FirstDocuments(n_documents)
    totals: list[Totals] = []
    has_loss_mask, first = False, None
    for stream in streams:
        first = first or stream
        if stream.metadata.tokenizer_sha256 != first.metadata.tokenizer_sha256:
            raise UserError(f"{stream.name}: its tokenizer is not that of {first.name}")
        for batch in stream:
            documents.add(batch)
            has_loss_mask |= batch.packed_loss_mask is not None
        totals.append(stream.totals)
    tokenizer = first.tokenizer()
    yield {
        "kind": "tokens",
        "path": name,
        "shards": len(totals),
        "sha256": contents_sha256(tokenizer.sha256, totals),
        **_counts(totals),
        "max_id": max(each.max_id for each in totals),
        "loss_mask": has_loss_mask,
        "tokenizer": describe_tokenizer(tokenizer),
    }
    yield from documents.records(tokenizer)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "type": json.loads(tokenizer.json)["model"].get("type"),
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
    }


def _counts(totals: list[Totals]) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    for each in totals:
        for split, counts in each.splits.items():
            sums = splits.setdefault(split, {"documents": 0, "tokens": 0, "bytes": 0})
            sums["documents"] += counts.documents
            sums["tokens"] += counts.tokens
            known = sums["bytes"] is not None and counts.bytes is not None
            sums["bytes"] = sums["bytes"] + counts.bytes if known else None
    for sums in splits.values():
        known = sums["bytes"] is not None and sums["tokens"]
        sums["bytes_per_token"] = round(sums["bytes"] / sums["tokens"], 4) if known else None
    names = ("documents", "tokens")
    return {**{name: sum(sums[name] for sums in splits.values()) for name in names}, "splits": splits}


@dataclass
class _Document:
    split: str
    n_tokens: int = 0
    ids: list[int] = field(default_factory=list)


class _FirstDocuments:
    """The beginnings of the first documents, gathered over batches, in which a long document may be in pieces."""

    def __init__(self, count: int):
        self._count = count
        self._documents: list[_Document] = []

    def add(self, batch: TokenBatch) -> None:
        if not batch.continues and len(self._documents) >= self._count:
            self._count = 0
        if not self._count:
            return
        split = (batch.split or [TRAIN])[0]
        for row, (start, stop) in enumerate(zip(batch.offsets[:-1], batch.offsets[1:], strict=True)):
            if row or not batch.continues:
                if len(self._documents) == self._count:
                    self._count = 0
                    return
                self._documents.append(_Document(split))
            document = self._documents[-1]
            document.n_tokens += int(stop - start)
            missing = SHOWN_TOKENS - len(document.ids)
            document.ids += batch.ids[start : min(stop, start + missing)].tolist()

    def records(self, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
        for number, document in enumerate(self._documents):
            yield {
                "kind": "document",
                "document": number,
                "split": document.split,
                "tokens": document.n_tokens,
                "tokens_shown": len(document.ids),
                "text": tokenizer.decode(document.ids, skip_special_tokens=False),
            }
