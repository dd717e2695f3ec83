"""Where `tokenize` puts its rows: one token stream, or a new one whenever a shard is full."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from llmctl.data.encoding import Rows
from llmctl.data.tokenize_settings import TokenizeSettings, is_one_file
from llmctl.files import staged_directory, staged_file
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000


class ShardWriter:
    """Writes rows to the sinks that `open_sink(number)` gives, each closed with its totals.

    A shard ends with the row that brings it to `shard_tokens`; without that there is one shard. `counts` holds, per
    split, the documents, tokens and text bytes written so far.
    """

    def __init__(
        self, open_sink: Callable[[int], BinaryIO], tokenizer: Tokenizer, *, split: bool, shard_tokens: int | None
    ):
        self._open_sink, self._tokenizer, self._split = open_sink, tokenizer, split
        self._shard_tokens = shard_tokens
        self._number, self._room = -1, 0
        self._writer: TokenStreamWriter | None = None
        self._shard_bytes: Counter = Counter()
        self.counts: dict[str, Counter] = {}

    def write(self, rows: Rows) -> None:
        while len(rows):
            if self._writer is None or (self._shard_tokens and self._room <= 0):
                self._next_shard()
            n_rows = len(rows)
            if self._shard_tokens:
                n_rows = min(int(np.searchsorted(rows.offsets, rows.offsets[0] + self._room)), n_rows)
            self._write(rows[:n_rows])
            rows = rows[n_rows:]

    def close(self) -> None:
        self._finish(last=True)

    def _write(self, rows: Rows) -> None:
        n_tokens, n_bytes = int(rows.offsets[-1] - rows.offsets[0]), int(rows.sizes.sum())
        self._writer.write(rows.ids, rows.offsets, split=rows.split, continues=rows.continues)
        self._room -= n_tokens
        self._shard_bytes[rows.split] += n_bytes
        documents = len(rows) - rows.continues
        self.counts.setdefault(rows.split, Counter()).update(documents=documents, tokens=n_tokens, bytes=n_bytes)

    def _next_shard(self) -> None:
        if self._writer is not None:
            self._finish(last=False)
        self._number += 1
        self._room = self._shard_tokens or 0
        self._shard_bytes = Counter()
        self._writer = TokenStreamWriter(self._open_sink(self._number), self._tokenizer, split=self._split)

    def _finish(self, last: bool) -> None:
        self._writer.close(dict(self._shard_bytes), shard=self._number, last=last)


@contextlib.contextmanager
def opened(
    output: str | os.PathLike | BinaryIO, tokenizer: Tokenizer, settings: TokenizeSettings
) -> Iterator[ShardWriter]:
    """A writer to the output, closed with its totals, and kept, only when the block ends well."""
    shard_tokens = None
    with contextlib.ExitStack() as stack:
        if not isinstance(output, (str, os.PathLike)):
            sink = output
        elif is_one_file(output):
            sink = stack.enter_context(staged_file(output, settings.overwrite))
        else:
            directory = stack.enter_context(staged_directory(output, settings.overwrite))
            shard_tokens = settings.shard_tokens or SHARD_TOKENS
            shard = stack.enter_context(contextlib.ExitStack())

        def open_sink(number: int) -> BinaryIO:
            if shard_tokens is None:
                return sink
            shard.close()
            return shard.enter_context(open(directory / f"shard-{number:05}.arrow", "xb"))

        writer = ShardWriter(open_sink, tokenizer, split=settings.val_fraction > 0, shard_tokens=shard_tokens)
        yield writer
        writer.close()
