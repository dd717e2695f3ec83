"""Text to a token stream: reading, encoding and writing at the same time, in memory that does not grow with the corpus."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from llmctl import allocator
from llmctl.data.chunks import chunked, text_bytes, whole_documents
from llmctl.data.documents import DocumentReader
from llmctl.data.inputs import find_inputs
from llmctl.data.prefetch import Prefetch
from llmctl.data.tokenize_settings import TokenizeSettings, is_one_file
from llmctl.errors import CalledWrongly, UserError
from llmctl.files import refuse_existing, refuse_input, staged_directory
from llmctl.quantities import format_size
from llmctl.stream_header import TRAIN

if TYPE_CHECKING:
    from llmctl.data.encoding import Rows
    from llmctl.data.shards import ShardWriter
    from llmctl.tokenizer import Tokenizer

READ_AHEAD = 4  # chunks
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

log = logging.getLogger("llmctl")


@dataclass(frozen=True)
class Progress:
    """Bytes read so far in this stage, of a total that is None for a pipe, and the tokens written."""

    stage: str
    bytes_read: int
    bytes_total: int | None
    tokens: int = 0


Report = Callable[[Progress], None]


def tokenize(
    paths: list[str], output: str | os.PathLike | BinaryIO, settings: TokenizeSettings, report: Report
) -> dict[str, Counter]:
    """Write the token stream of the texts at `paths` ("-" is standard input) to `output`.

    `output` is an open binary file, the name of one file (`.arrow`), or that of a directory of shards; a name appears
    when it is complete. Returns documents, tokens and bytes per split. Raises `UserError` for empty or wrong input.
    """
    _check_outputs(paths, output, settings)
    allocator.keep_freed_memory()  # every chunk needs the same arrays again
    reader = DocumentReader(find_inputs(paths), settings.split, settings.field, settings.errors)
    if settings.tokenizer is None or settings.val_fraction:
        for each in reader.inputs:
            each.spool()
    val_start = _val_start(reader, settings.val_fraction, report) if settings.val_fraction else None
    trained = _train_tokenizer(reader, val_start, settings, report) if settings.tokenizer is None else None
    # Each library is loaded while the stage in front of it is at work already.
    with Prefetch(chunked(reader, val_start), depth=READ_AHEAD) as chunks:
        from llmctl.data.encoding import ChunkEncoder
        from llmctl.tokenizer import Tokenizer

        encoder = ChunkEncoder(trained or Tokenizer.load(settings.tokenizer), settings.workers)
        parts = chunks if encoder.cuts_exactly else whole_documents(chunks)
        with Prefetch(parts, encoder.encode, source=chunks) as rows:
            counts = _write(rows, output, encoder.tokenizer, settings, reader, report)
    if reader.n_empty:
        log.info("%d empty documents were left out", reader.n_empty)
    return counts


def _write(
    rows: Iterator[Rows],
    output: str | os.PathLike | BinaryIO,
    tokenizer: Tokenizer,
    settings: TokenizeSettings,
    reader: DocumentReader,
    report: Report,
) -> dict[str, Counter]:
    from llmctl.data.shards import opened

    first = next(rows, None)
    if first is None:
        raise _empty(reader)
    if settings.save_tokenizer:
        with staged_directory(settings.save_tokenizer, settings.overwrite) as directory:
            tokenizer.save(directory)
    with opened(output, tokenizer, settings) as writer:
        for each in chain([first], rows):
            writer.write(each)
            report(_progress(reader, writer))
    return writer.counts


def _check_outputs(paths: list[str], output: str | os.PathLike | BinaryIO, settings: TokenizeSettings) -> None:
    """Refuse before the work what would be refused after it."""
    is_directory = isinstance(output, (str, os.PathLike)) and not is_one_file(output)
    if settings.shard_tokens and not is_directory:
        raise CalledWrongly("--shard-tokens needs a directory as --output", hint="a name ending in .arrow is one file")
    for path, ours in ((output, ["shard-*.arrow"]), (settings.save_tokenizer, TOKENIZER_FILES)):
        if isinstance(path, (str, os.PathLike)):
            refuse_existing(path, settings.overwrite)
            refuse_input(path, paths)
            _refuse_loss(Path(path), ours)


def _refuse_loss(path: Path, ours: Sequence[str]) -> None:
    """--overwrite replaces a whole directory, so there must be nothing in it but what this command writes."""
    for entry in path.iterdir() if path.is_dir() else ():
        if not any(entry.match(pattern) for pattern in ours):
            raise CalledWrongly(
                f"{path}: holds {entry.name} too, which --overwrite would delete", "choose another name"
            )


def _val_start(reader: DocumentReader, fraction: float, report: Report) -> int:
    """The text byte at which validation begins."""
    total = reader.known_size()
    if total is None:
        total = _measured_size(reader, report)
    if total == 0:
        raise _empty(reader)
    n_val = round(total * fraction)
    if not 0 < n_val < total:
        raise UserError(f"{total} bytes of text are too few to hold out a share of {fraction}")
    return total - n_val


def _measured_size(reader: DocumentReader, report: Report) -> int:
    """Bytes of text; this reads the whole input once."""
    total = 0
    for group in reader:
        total += text_bytes(group.texts)
        report(Progress("measure", reader.bytes_read, _size(reader)))
    return total


def _train_tokenizer(
    reader: DocumentReader, val_start: int | None, settings: TokenizeSettings, report: Report
) -> Tokenizer:
    from llmctl.tokenizer import Tokenizer

    limit = settings.train_sample if val_start is None else min(settings.train_sample, val_start)
    sample = _sample(reader, limit, report)
    first = next(sample, None)
    if first is None:
        raise _empty(reader)
    log.info(
        "no --tokenizer: training a byte-level BPE of %d tokens on the %s (at most its first %s)",
        settings.vocab_size,
        "text" if val_start is None else "training part",
        format_size(settings.train_sample),
    )
    tokenizer = Tokenizer.train_bpe(chain([first], sample), settings.vocab_size, settings.special_tokens)
    if tokenizer.vocab_size < settings.vocab_size:
        log.info("the text gives a vocabulary of %d tokens only", tokenizer.vocab_size)
    return tokenizer


def _sample(reader: DocumentReader, limit: int, report: Report) -> Iterator[str]:
    """The texts up to byte `limit`."""
    done, total = 0, min(limit, reader.known_size() or limit)
    for chunk in takewhile(lambda chunk: chunk.split == TRAIN, chunked(reader, limit)):
        yield from (text.decode() for text in chunk.texts)
        done += chunk.n_bytes
        report(Progress("learn", done, total))


def _progress(reader: DocumentReader, writer: ShardWriter) -> Progress:
    tokens = sum(counts["tokens"] for counts in writer.counts.values())
    return Progress("tokenize", reader.bytes_read, _size(reader), tokens)


def _size(reader: DocumentReader) -> int | None:
    sizes = [each.size for each in reader.inputs]
    return None if None in sizes else sum(sizes)


def _empty(reader: DocumentReader) -> UserError:
    names = ", ".join(each.name for each in reader.inputs[:3])
    return UserError(f"{names}: no text in it, the input is empty")
