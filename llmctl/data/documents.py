"""The documents of a corpus, whatever form its files have: plain text, JSON Lines or parquet."""

from __future__ import annotations

import codecs
import contextlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath
from typing import BinaryIO

from llmctl.data.inputs import CountedFile, Input, damage_named, decompressed, temporary_copy
from llmctl.data.text import BLOCK, ERRORS_HINT, SEPARATORS, Group, split_text, valid_utf8
from llmctl.errors import CalledWrongly, UserError
from llmctl.stream_source import SequentialSource

_PARQUET = b"PAR1"
# Distinguishes parquet's first page from text that begins with its marker.
_PARQUET_PAGE = b"PAR1\x15"
_ROWS = 256
_parse_json = json.JSONDecoder().decode  # what json.loads comes to, without its checks for each line
_FIELD = "--field names the one that holds the text"


class DocumentReader:
    """Iterating yields `Group`s of documents, from the beginning each time.

    `split` is auto, file, blank-line, line or jsonl; `field` names the text in JSON Lines and parquet; `errors` is what
    becomes of bytes that are not UTF-8. `bytes_read` counts input bytes, before decompression, of the last iteration.
    """

    def __init__(self, inputs: list[Input], split: str = "auto", field: str = "text", errors: str = "strict"):
        self.inputs, self.split, self.field, self.errors = inputs, split, field, errors
        self.bytes_read = 0
        self.n_empty = 0

    def __iter__(self) -> Iterator[Group]:
        self.bytes_read = self.n_empty = 0
        for each in self.inputs:
            before = self.bytes_read
            with each.open() as file, damage_named(each.name):
                for group in self._groups(file, each.name):
                    self.bytes_read = before + file.n_read
                    yield self._without_empty(group)
                self.bytes_read = before + file.n_read

    def _without_empty(self, group: Group) -> Group:
        if all(group.texts):
            return group
        texts = [text for i, text in enumerate(group.texts) if text or (i == 0 and group.continues)]
        self.n_empty += len(group.texts) - len(texts)
        return Group(texts, group.continues, group.unfinished)

    def known_size(self) -> int | None:
        """Bytes of text where the sizes of the inputs tell: each is plain text and one document."""
        sizes = [self._plain_size(each) for each in self.inputs]
        return None if None in sizes else sum(sizes)

    def _plain_size(self, each: Input) -> int | None:
        if not each.size or self.errors != "strict":
            return None
        with each.open() as file:
            raw = SequentialSource(file)
            source = decompressed(raw)
            if source is not raw or self._form(source, each.name) != "file":
                return None
            return each.size - len(codecs.BOM_UTF8) * (source.peek(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8)

    def _groups(self, file: CountedFile, name: str) -> Iterator[Group]:
        raw = SequentialSource(file)
        source = decompressed(raw)
        form = self._form(source, name)
        if form == "jsonl":
            yield from json_lines(valid_utf8(source, name, self.errors), name, self.field, self.errors)
        elif form != "parquet":
            yield from split_text(valid_utf8(source, name, self.errors), SEPARATORS[form])
        else:
            is_plain = source is raw and file.seekable()
            with contextlib.nullcontext(file) if is_plain else temporary_copy(source) as seekable:
                yield from parquet_rows(seekable, name, self.field, self.errors)

    def _form(self, source: SequentialSource, name: str) -> str:
        """ "parquet", "jsonl" or what separates the documents of a text."""
        head, suffix = source.peek(len(_PARQUET_PAGE)), _suffix(name)
        if head == _PARQUET_PAGE or suffix == ".parquet":
            if self.split != "auto":
                raise CalledWrongly(f"{name}: --split {self.split} is for text; the documents of parquet are its rows")
            if not head.startswith(_PARQUET):
                raise UserError(f"{name}: not a parquet file, it starts with {head!r}")
            return "parquet"
        if self.split != "auto":
            return self.split
        is_json = suffix in (".jsonl", ".ndjson") or not suffix and self._is_json_line(source.peek(BLOCK))
        return "jsonl" if is_json else "file"

    def _is_json_line(self, block: bytes) -> bool:
        line, _, _ = block.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
        try:
            value = json.loads(line)
        except ValueError:
            return False
        return isinstance(value, dict) and self.field in value


def json_lines(blocks: Iterator[bytes], name: str, field: str, errors: str) -> Iterator[Group]:
    """The `field` of each line's object. Raises `UserError` naming the line that has none."""
    begun, number = [], 1
    for block in chain(blocks, [b"\n"]):
        first, *lines = block.decode().split("\n")
        begun.append(first)
        if not lines:
            continue
        lines = ["".join(begun), *lines]
        begun = [lines.pop()]
        texts = [_field_of(line, f"{name}:{i}", field, errors) for i, line in enumerate(lines, number) if line.strip()]
        number += len(lines)
        if texts:
            yield Group(texts)


def _field_of(line: str, place: str, field: str, errors: str) -> bytes:
    try:
        value = _parse_json(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not JSON: {error.msg} at column {error.colno}", hint="--split line takes each line as text"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected a JSON object, got {type(value).__name__}")
    if field not in value:
        raise UserError(
            f"{place}: no field {field!r}; the keys are {', '.join(map(repr, value)) or 'none'}", hint=_FIELD
        )
    text = value[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: the field {field!r} is {type(text).__name__}, expected text", hint=_FIELD)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        # Only an escape can bring half of a surrogate pair, which no UTF-8 can hold.
        if errors == "strict":
            raise UserError(
                f"{place}: half of a surrogate pair at character {error.start}", hint=ERRORS_HINT
            ) from error
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors).encode()


def parquet_rows(file: BinaryIO, name: str, field: str, errors: str) -> Iterator[Group]:
    """The column `field` of each row, a few rows at a time. Raises `UserError` naming the row that has no text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{name}: not a parquet file: {error}", hint="copy or download it again") from error
    if field not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise UserError(f"{name}: no column {field!r}; the columns are {columns}", hint=_FIELD)
    column_type = table.schema_arrow.field(field).type
    if not _holds_text(column_type):
        raise UserError(f"{name}: the column {field!r} is {column_type}, expected text", hint=_FIELD)
    row = 0
    for batch in table.iter_batches(_ROWS, columns=[field]):
        values = batch.column(0).cast(pa.large_binary()).to_pylist()
        yield Group([_row_text(value, f"{name}: row {i}", errors) for i, value in enumerate(values, row)])
        row += len(values)


def _row_text(value: bytes | None, place: str, errors: str) -> bytes:
    if value is None:
        raise UserError(f"{place} holds no text")
    if value.isascii():
        return value
    try:
        return value.decode("utf-8", errors).encode()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the byte at offset {error.start} is not UTF-8", hint=ERRORS_HINT) from error


def _suffix(name: str) -> str:
    """The last suffix that does not name a compression, in lower case."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")


def _holds_text(column_type) -> bool:
    from pyarrow import types

    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return any(
        test(column_type) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )
