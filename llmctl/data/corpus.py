"""Token streams opened for training: any number of files, shards or a pipe, read at random as one long sequence."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from llmctl.errors import UserError
from llmctl.files import staged_file
from llmctl.stream_header import TRAIN
from llmctl.stream_source import SequentialSource
from llmctl.streams import TokenBatch, TokenStream, Totals, read_stream
from llmctl.tokenizer import Tokenizer

SHARDS = "shard-*.arrow"


class TokenView:
    """The tokens of one split, over all files, numbered from 0. Nothing is in memory but what is being read."""

    def __init__(self, batches: list[tuple[str, TokenBatch]], totals: list[Totals], split: str, vocab_size: int):
        counts = [each.splits[split] for each in totals if split in each.splits]
        self.n_tokens = sum(each.tokens for each in counts)
        self.n_documents = sum(each.documents for each in counts)
        self.n_bytes = None if any(each.bytes is None for each in counts) else sum(each.bytes for each in counts)
        self._vocab_size = vocab_size
        self._files = [file for file, _ in batches]
        self._batches = [batch for _, batch in batches]
        self._ids = [batch.ids for batch in self._batches]
        self._bounds = np.cumsum([0, *(len(ids) for ids in self._ids)])
        self._is_checked = np.zeros(len(self._ids), bool)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [n_documents]: the position of each document's first token."""
        parts = [
            bound + batch.offsets[int(batch.continues) : -1]
            for bound, batch in zip(self._bounds[:-1], self._batches, strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Token ids int64 [stop - start]. Raises `UserError` for an id beyond the vocabulary."""
        self._check_range(start, stop)
        out = np.empty(stop - start, np.int64)
        for piece, inside, place in self._pieces(start, stop):
            if not self._is_checked[piece]:
                self._check(piece)
            out[place] = self._ids[piece][inside]
        return out

    def loss_mask(self, start: int, stop: int) -> np.ndarray | None:
        """bool [stop - start]: which tokens are trained on; None where the stream has no such column."""
        if not self._batches or self._batches[0].packed_loss_mask is None:
            return None
        self._check_range(start, stop)
        out = np.empty(stop - start, bool)
        for piece, inside, place in self._pieces(start, stop):
            packed = self._batches[piece].packed_loss_mask
            out[place] = packed[inside.start : inside.stop].to_numpy(zero_copy_only=False)
        return out

    def document(self, number: int) -> np.ndarray:
        """Token ids int64 of one document."""
        stop = self.starts[number + 1] if number + 1 < len(self.starts) else self.n_tokens
        return self.read(int(self.starts[number]), int(stop))

    def _pieces(self, start: int, stop: int):
        """For each batch that overlaps the range: its number, the slice of it, and the slice of the result."""
        piece = int(np.searchsorted(self._bounds, start, side="right")) - 1
        at = start
        while at < stop:
            first, end = int(self._bounds[piece]), min(int(self._bounds[piece + 1]), stop)
            yield piece, slice(at - first, end - first), slice(at - start, end - start)
            at, piece = end, piece + 1

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.n_tokens}")

    def _check(self, piece: int) -> None:
        highest = int(self._ids[piece].max(initial=0))
        if highest >= self._vocab_size:
            raise _beyond_vocabulary(self._files[piece], highest, self._vocab_size)
        self._is_checked[piece] = True


class Corpus:
    """Token files of one tokenizer. `sha256` identifies tokenizer and contents, wherever the files lie."""

    def __init__(self, files: Sequence[str | os.PathLike], tokenizer_sha256: str | None = None):
        self.files = [os.fspath(file) for file in files]
        self._batches: list[tuple[str, TokenBatch]] = []
        self._totals: list[Totals] = []
        streams = [read_stream(file, verify=False) for file in self.files]
        self.metadata = streams[0].metadata
        for stream in streams:
            _check_tokenizer(stream, tokenizer_sha256, "the one expected")
            _check_tokenizer(stream, self.metadata.tokenizer_sha256, f"that of {streams[0].name}")
            batches = list(stream)
            _check_totals(stream, batches)
            self._batches += [(stream.name, batch) for batch in batches]
            self._totals.append(stream.totals)
        self.sha256 = contents_sha256(self.metadata.tokenizer_sha256, self._totals)

    @classmethod
    def open(
        cls,
        paths: Sequence[str | os.PathLike],
        spool_to: str | os.PathLike | None = None,
        tokenizer_sha256: str | None = None,
    ) -> Corpus:
        """Open files, directories of shards, and pipes ("-" is standard input), in this order, as one corpus.

        A pipe is copied to the file `spool_to`, which appears when it is complete, so that a later run can open that
        instead; without it to a file that is gone with this process. Raises `UserError` for a stream that is cut
        short or foreign, and for a tokenizer other than `tokenizer_sha256` before the first token is read.
        """
        if not paths:
            raise UserError("no token stream to read", hint="give its path, or - for standard input")
        files: list[str | os.PathLike] = []
        discarded = []
        for path in paths:
            if _is_pipe(path):
                files.append(spool_to or _temporary_name())
                _spool(path, files[-1], tokenizer_sha256)
                discarded += [] if spool_to else [files[-1]]
            else:
                files += shards_of(path)
        try:
            return cls(files, tokenizer_sha256)
        finally:
            for file in discarded:  # the maps keep the contents
                os.unlink(file)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_json(self.metadata.tokenizer_json, self.metadata.tokenizer_config)

    @cached_property
    def splits(self) -> list[str]:
        """Names of the splits that hold any tokens, "train" first."""
        names = {name for totals in self._totals for name, counts in totals.splits.items() if counts.tokens}
        return sorted(names, key=lambda name: (name != TRAIN, name))

    def split(self, name: str) -> TokenView | None:
        """The tokens of one split; None where the corpus holds none."""
        if name not in self.splits:
            return None
        batches = [(file, batch) for file, batch in self._batches if (batch.split or [TRAIN])[0] == name]
        return TokenView(batches, self._totals, name, self.metadata.vocab_size)


def contents_sha256(tokenizer_sha256: str, totals: Sequence[Totals]) -> str:
    """The identity of token files: their tokenizer's, and what each says of its contents."""
    return hashlib.sha256("\n".join([tokenizer_sha256, *(each.sha256 for each in totals)]).encode()).hexdigest()


def shards_of(path: str | os.PathLike) -> list[Path]:
    """The stream files that a path names: itself, or the shards of a directory, of which none may be missing."""
    if not os.path.isdir(path):
        return [Path(path)]
    shards = sorted(Path(path).glob(SHARDS))
    if not shards:
        raise UserError(f"{path}: holds no {SHARDS}", hint="`llmctl tokenize FILE -o DIR` makes such a directory")
    last = read_stream(shards[-1], verify=False)
    for _ in last:
        pass
    if not last.totals.last or last.totals.shard != len(shards) - 1:
        at_least = last.totals.shard + 1 + (not last.totals.last)
        raise UserError(f"{path}: shards are missing: {len(shards)} of at least {at_least} are there")
    return shards


def _is_pipe(path: str | os.PathLike) -> bool:
    if str(path) == "-":
        return True
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def _temporary_name() -> str:
    descriptor, name = tempfile.mkstemp(prefix="llmctl-", suffix=".arrow")
    os.close(descriptor)
    return name


def _spool(path: str | os.PathLike, spool_to: str | os.PathLike, tokenizer_sha256: str | None) -> None:
    # Unbuffered: a thread or a signal that interrupts the read must find no lock held.
    with open(0 if str(path) == "-" else path, "rb", buffering=0, closefd=str(path) != "-") as pipe:
        if pipe.isatty():
            raise UserError(
                "standard input is a terminal, a token stream was expected", hint="llmctl tokenize FILE | …"
            )
        with staged_file(spool_to, overwrite=True) as copy:
            stream = read_stream(SequentialSource(pipe, copy_to=copy))
            _check_tokenizer(stream, tokenizer_sha256, "the one expected")
            for _ in stream:
                pass


def _check_tokenizer(stream: TokenStream, sha256: str | None, whose: str) -> None:
    if sha256 not in (None, stream.metadata.tokenizer_sha256):
        raise UserError(
            f"{stream.name}: made by the tokenizer {stream.metadata.tokenizer_sha256[:12]}, not by {whose}, {sha256[:12]}",
            hint="re-run `llmctl tokenize` with --tokenizer",
        )


def _check_totals(stream: TokenStream, batches: list[TokenBatch]) -> None:
    totals = stream.totals
    tokens = sum(len(batch.ids) for batch in batches)
    if tokens != totals.tokens:
        raise UserError(f"{stream.name}: damaged: it holds {tokens} tokens, its totals say {totals.tokens}")
    if totals.max_id >= stream.metadata.vocab_size:
        raise _beyond_vocabulary(stream.name, totals.max_id, stream.metadata.vocab_size)


def _beyond_vocabulary(file: str, token_id: int, vocab_size: int) -> UserError:
    return UserError(
        f"{file}: token id {token_id} is beyond its tokenizer's vocabulary of {vocab_size}",
        hint="the file was not written by `llmctl tokenize`, or it is damaged",
    )
