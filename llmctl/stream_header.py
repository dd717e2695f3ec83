"""What a token stream says about itself: the tokenizer in its schema, and the totals in its last batch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from llmctl.errors import UserError
from llmctl.stream_source import not_a_stream

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class StreamMetadata:
    """What the schema says before the first token."""

    version: int
    tokenizer_sha256: str
    vocab_size: int
    tokenizer_json: str
    tokenizer_config: dict

    def encode(self) -> dict[bytes, bytes]:
        return {f"llmctl.{name}".encode(): _to_text(value).encode() for name, value in asdict(self).items()}

    @classmethod
    def decode(cls, metadata: dict[bytes, bytes] | None, name: str) -> StreamMetadata:
        """Raises `UserError` for a schema that is not ours, a newer version, or a damaged tokenizer."""
        ours = {key: value for key, value in (metadata or {}).items() if key.startswith(b"llmctl.")}
        texts = {key.decode().removeprefix("llmctl."): value.decode() for key, value in ours.items()}
        if "version" not in texts or "tokenizer_json" not in texts:
            raise not_a_stream(name, "an Arrow stream without llmctl's metadata")
        if int(texts["version"]) != VERSION:
            raise UserError(
                f"{name}: token stream version {texts['version']}, this llmctl reads version {VERSION}",
                hint="re-run `llmctl tokenize` with this version",
            )
        sha256 = hashlib.sha256(texts["tokenizer_json"].encode()).hexdigest()
        if sha256 != texts["tokenizer_sha256"]:
            raise UserError(
                f"{name}: its tokenizer has sha256 {sha256[:12]}, its header says {texts['tokenizer_sha256'][:12]}: damaged",
                hint="re-run `llmctl tokenize`",
            )
        config = json.loads(texts["tokenizer_config"])
        return cls(VERSION, sha256, int(texts["vocab_size"]), texts["tokenizer_json"], config)


@dataclass
class SplitTotals:
    """Counts of one split; `bytes` is the UTF-8 length of its text, None where nobody counted it."""

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int | None = None
    sha256: str = ""


@dataclass
class Totals:
    """What the last batch carries. `shard` and `last` tell whether a directory of shards is whole."""

    rows: int
    tokens: int
    max_id: int
    sha256: str
    splits: dict[str, SplitTotals]
    shard: int = 0
    last: bool = True

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Totals:
        values = json.loads(text)
        values["splits"] = {name: SplitTotals(**split) for name, split in values["splits"].items()}
        return cls(**values)


@dataclass
class Tally:
    """Counts and content hashes per split, the same whatever the sizes of the batches."""

    splits: dict[str, SplitTotals] = field(default_factory=dict)
    hashes: dict[str, list] = field(default_factory=dict)
    max_id: int = -1

    def add(
        self, ids: np.ndarray, offsets: np.ndarray, loss_mask: np.ndarray | None, split: str, continues: bool
    ) -> None:
        counts = self.splits.setdefault(split, SplitTotals())
        hashes = self.hashes.setdefault(split, [hashlib.sha256(), hashlib.sha256(), hashlib.sha256()])
        counts.rows += len(offsets) - 1
        counts.documents += len(offsets) - 1 - continues
        counts.tokens += len(ids)
        self.max_id = max(self.max_id, int(ids.max(initial=0)))
        hashes[0].update(ids)
        hashes[1].update((offsets[1:] - offsets[:-1]).astype("<i8"))
        if loss_mask is not None:
            hashes[2].update(loss_mask.view("u1"))

    def totals(self) -> Totals:
        for split, hashes in self.hashes.items():
            self.splits[split].sha256 = _digest(part.hexdigest() for part in hashes)
        return Totals(
            rows=sum(counts.rows for counts in self.splits.values()),
            tokens=sum(counts.tokens for counts in self.splits.values()),
            max_id=self.max_id,
            sha256=_digest(f"{split} {self.splits[split].sha256}" for split in sorted(self.splits)),
            splits=self.splits,
        )


def _digest(parts) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _to_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
