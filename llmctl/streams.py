"""The token stream between `tokenize` and the commands that train: an Arrow IPC stream that proves its own completeness.

One row is one document (`input_ids`; `loss_mask` for supervised data; `split` where part is held out). The schema
carries the whole tokenizer. A batch's rows all belong to one split; a batch marked `continues` starts in the middle of
the document that the previous batch ended with, so that a document of any length streams through bounded memory.
The last batch is empty and carries the totals: a stream that ends without them was cut short.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pyarrow as pa

from llmctl.errors import UserError
from llmctl.stream_header import TRAIN, VERSION, SplitTotals, StreamMetadata, Tally, Totals
from llmctl.stream_source import SequentialSource, expect_end, not_a_stream, open_mapped, open_reader, truncated

if TYPE_CHECKING:
    from llmctl.tokenizer import Tokenizer

BATCH_TOKENS = 1_000_000

_TOTALS_KEY = b"llmctl.totals"
_CONTINUES_KEY = b"llmctl.continues"


@dataclass(frozen=True)
class TokenBatch:
    """Row i is `ids[offsets[i]:offsets[i + 1]]`. With `continues`, row 0 goes on with the batch before's last document."""

    columns: pa.RecordBatch
    continues: bool = False

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def ids(self) -> np.ndarray:
        """uint16 or uint32 [n_tokens], a view of the batch."""
        return self._flat("input_ids").to_numpy()

    @property
    def offsets(self) -> np.ndarray:
        """int64 [n_rows + 1], from 0."""
        offsets = self.columns.column("input_ids").offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0]

    @property
    def packed_loss_mask(self) -> pa.BooleanArray | None:
        """One bit per token, a view of the batch."""
        return self._flat("loss_mask") if "loss_mask" in self.columns.schema.names else None

    @property
    def loss_mask(self) -> np.ndarray | None:
        """bool [n_tokens]."""
        packed = self.packed_loss_mask
        return None if packed is None else packed.to_numpy(zero_copy_only=False)

    @property
    def split(self) -> list[str] | None:
        """The split of each row, the same for all rows of a batch."""
        if "split" not in self.columns.schema.names or not len(self):
            return None
        return [self.columns.column("split")[0].as_py()] * len(self)

    def _flat(self, name: str) -> pa.Array:
        lists = self.columns.column(name)
        first, last = lists.offsets[0].as_py(), lists.offsets[-1].as_py()
        return lists.values[first:last]


class TokenStreamWriter:
    """Writes documents to `sink` in batches of about `BATCH_TOKENS` tokens."""

    def __init__(self, sink: BinaryIO, tokenizer: Tokenizer, *, loss_mask: bool = False, split: bool = False):
        self._vocab_size = tokenizer.vocab_size
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        columns = [("input_ids", pa.list_(pa.from_numpy_dtype(self._dtype)))]
        columns += [("loss_mask", pa.list_(pa.bool_()))] if loss_mask else []
        columns += [("split", pa.string())] if split else []
        metadata = StreamMetadata(VERSION, tokenizer.sha256, tokenizer.vocab_size, tokenizer.json, tokenizer.config)
        self._schema = pa.schema(columns, metadata=metadata.encode())
        self._sink = sink
        self._writer = pa.ipc.new_stream(sink, self._schema)
        self._tally = Tally()
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._pending_tokens = 0
        self._split, self._continues = TRAIN, False

    def write(
        self,
        ids: np.ndarray,
        offsets: np.ndarray,
        *,
        loss_mask: np.ndarray | None = None,
        split: str = TRAIN,
        continues: bool = False,
    ) -> None:
        """Append documents `ids[offsets[i]:offsets[i + 1]]`; `continues` joins the first to the last one written.

        Raises `UserError` for an id beyond the vocabulary, before anything of this call is written.
        """
        if len(offsets) < 2:
            return
        ids, offsets = ids[offsets[0] : offsets[-1]], offsets - offsets[0]
        if len(ids) and ids.max() >= self._vocab_size:
            raise UserError(f"token id {ids.max()} is beyond the tokenizer's vocabulary of {self._vocab_size}")
        if continues or split != self._split:
            self._flush()
        if not self._pending:
            self._split, self._continues = split, continues
        self._pending.append((ids.astype(self._dtype), offsets, loss_mask))
        self._pending_tokens += len(ids)
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self, bytes_per_split: dict[str, int] | None = None, *, shard: int = 0, last: bool = True) -> Totals:
        """Write the last batch with the totals. Without this call the stream stays truncated, as it should."""
        self._flush()
        totals = self._tally.totals()
        totals.shard, totals.last = shard, last
        for split, n_bytes in (bytes_per_split or {}).items():
            totals.splits.setdefault(split, SplitTotals()).bytes = n_bytes
        empty = self._to_batch(np.empty(0, self._dtype), np.zeros(1, np.int64), np.empty(0, bool))
        self._writer.write_batch(empty, custom_metadata={_TOTALS_KEY: totals.to_json()})
        self._writer.close()
        self._sink.flush()
        return totals

    def _flush(self) -> None:
        if not self._pending:
            return
        ids = np.concatenate([part[0] for part in self._pending])
        lengths = np.concatenate([np.diff(part[1]) for part in self._pending])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        masks = [part[2] for part in self._pending if part[2] is not None]
        loss_mask = np.concatenate(masks).astype(bool) if masks else None
        self._pending, self._pending_tokens = [], 0
        self._tally.add(ids, offsets, loss_mask, self._split, self._continues)
        first = 0
        while first < len(lengths):
            after = max(first + 1, int(np.searchsorted(offsets, offsets[first] + BATCH_TOKENS, side="right")) - 1)
            batch = self._to_batch(ids, offsets[first : after + 1], loss_mask)
            is_inside = self._continues and first == 0
            self._writer.write_batch(batch, custom_metadata={_CONTINUES_KEY: b"1"} if is_inside else None)
            first = after

    def _to_batch(self, ids: np.ndarray, offsets: np.ndarray, loss_mask: np.ndarray | None) -> pa.RecordBatch:
        tokens = slice(offsets[0], offsets[-1])
        row_starts = _arrow((offsets - offsets[0]).astype(np.int32))
        columns: list[pa.Array] = [pa.ListArray.from_arrays(row_starts, _arrow(ids[tokens]))]
        if "loss_mask" in self._schema.names:
            columns.append(pa.ListArray.from_arrays(row_starts, pa.array(loss_mask[tokens])))
        if "split" in self._schema.names:
            columns.append(_repeated(self._split, len(offsets) - 1))
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


class TokenStream:
    """Iterates over the `TokenBatch`es of a stream; `totals` is there after the last one.

    With `verify`, the counts and content hash are compared with the totals at the end.
    """

    def __init__(self, source: SequentialSource | pa.MemoryMappedFile, name: str, verify: bool):
        self.name = name
        self._source, self._verify = source, verify
        self._reader = open_reader(source, name)
        self.metadata = StreamMetadata.decode(self._reader.schema.metadata, name)
        self.totals: Totals | None = None
        _check_columns(self._reader.schema, self.metadata, name)

    def tokenizer(self) -> Tokenizer:
        from llmctl.tokenizer import Tokenizer

        return Tokenizer.from_json(self.metadata.tokenizer_json, self.metadata.tokenizer_config)

    def __iter__(self) -> Iterator[TokenBatch]:
        tally = Tally()
        while self.totals is None:
            try:
                batch, custom = self._reader.read_next_batch_with_custom_metadata()
                batch.validate(full=True)
            except StopIteration:
                raise truncated(self.name, "it ends without its totals") from None
            except (pa.ArrowException, OSError) as error:
                raise truncated(self.name, str(error)) from error
            custom = dict(custom or {})
            if _TOTALS_KEY in custom:
                self.totals = Totals.from_json(custom[_TOTALS_KEY])
                continue
            yield (tokens := TokenBatch(batch, continues=_CONTINUES_KEY in custom))
            if self._verify:
                tally.add(tokens.ids, tokens.offsets, tokens.loss_mask, (tokens.split or [TRAIN])[0], tokens.continues)
        if self._verify and tally.totals().sha256 != self.totals.sha256:
            raise UserError(
                f"{self.name}: damaged: its contents differ from what its totals say", hint="re-run tokenize"
            )
        expect_end(self._source, self.name)


def read_stream(source: str | os.PathLike | BinaryIO | SequentialSource, *, verify: bool = True) -> TokenStream:
    """Open a stream: a path is memory-mapped, and its arrays are views into the map; a binary file is read in order.

    Raises `UserError` ("not a llmctl token stream", "truncated stream", …) here for a wrong header and, while
    iterating, for a stream cut short or damaged.
    """
    if isinstance(source, (str, os.PathLike)):
        return TokenStream(open_mapped(source), os.fspath(source), verify)
    sequential = source if isinstance(source, SequentialSource) else SequentialSource(source)
    return TokenStream(sequential, sequential.name, verify)


def _check_columns(schema: pa.Schema, metadata: StreamMetadata, name: str) -> None:
    narrow = metadata.vocab_size <= 1 << 16
    wanted = {
        "input_ids": pa.list_(pa.uint16() if narrow else pa.uint32()),
        "loss_mask": pa.list_(pa.bool_()),
        "split": pa.string(),
    }
    for column in schema:
        if column.type != wanted.get(column.name):
            raise not_a_stream(name, f"it has a column {column.name} of type {column.type}")
    if "input_ids" not in schema.names:
        raise not_a_stream(name, "it has no column input_ids")


def _arrow(values: np.ndarray) -> pa.Array:
    """The array as Arrow, sharing its memory; `pa.array` would import pandas first, where that is installed."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _repeated(text: str, times: int) -> pa.StringArray:
    data = text.encode()
    ends = np.arange(times + 1, dtype=np.int32) * len(data)
    return pa.Array.from_buffers(pa.string(), times, [None, pa.py_buffer(ends), pa.py_buffer(data * times)])
