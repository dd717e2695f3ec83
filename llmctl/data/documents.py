"""The documents of a corpus, whatever form its files have: plain text, JSON Lines or parquet."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import PurePath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from llmctl.data.inputs import CountedFile, Input, damage_named, decompressed, temporary_copy
from llmctl.data.text import ERRORS_HINT, LONGEST, SEPARATORS, Group, decoded, split_text
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
        self.longest = LONGEST
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
        texts = [text for i, text in enumerate(group.texts) if text or (i == 0 and group.continues)]
        self.n_empty += len(group.texts) - len(texts)
        return Group(texts, group.continues, group.unfinished)

    def _groups(self, file: CountedFile, name: str) -> Iterator[Group]:
        raw = SequentialSource(file)
        source = decompressed(raw)
        head = source.peek(len(_PARQUET_PAGE))
        suffix = _suffix(name)
        if head != _PARQUET_PAGE and suffix != ".parquet":
            yield from self._text_groups(decoded(source, name, self.errors), name, suffix)
            return
        if self.split != "auto":
            raise CalledWrongly(f"{name}: --split {self.split} is for text; the documents of parquet are its rows")
        if not head.startswith(_PARQUET):
            raise UserError(f"{name}: not a parquet file, it starts with {head!r}")
        is_plain = source is raw and file.seekable()
        with contextlib.nullcontext(file) if is_plain else temporary_copy(source) as seekable:
            yield from parquet_rows(seekable, name, self.field, self.errors)

    def _text_groups(self, blocks: Iterator[str], name: str, suffix: str) -> Iterator[Group]:
        split = self.split
        if split == "auto":
            split = "jsonl" if suffix in (".jsonl", ".ndjson") else "file"
            if not suffix:
                first = next(blocks, "")
                blocks = chain([first], blocks)
                split = "jsonl" if self._is_json_line(first) else "file"
        if split == "jsonl":
            yield from json_lines(blocks, name, self.field, self.errors)
        else:
            yield from split_text(blocks, SEPARATORS[split], self.longest)

    def _is_json_line(self, block: str) -> bool:
        line, _, _ = block.lstrip().partition("\n")
        try:
            value = json.loads(line)
        except ValueError:
            return False
        return isinstance(value, dict) and self.field in value


def json_lines(blocks: Iterator[str], name: str, field: str, errors: str) -> Iterator[Group]:
    """The `field` of each line's object. Raises `UserError` naming the line that has none."""
    begun, number = [], 1
    for block in chain(blocks, ["\n"]):
        first, *lines = block.split("\n")
        begun.append(first)
        if not lines:
            continue
        lines = ["".join(begun), *lines]
        begun = [lines.pop()]
        texts = [_field_of(line, f"{name}:{i}", field, errors) for i, line in enumerate(lines, number) if line.strip()]
        number += len(lines)
        if texts:
            yield Group(texts)


def _field_of(line: str, place: str, field: str, errors: str) -> str:
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
    # Only an escape can bring half of a surrogate pair, which no UTF-8 can hold.
    return _mended(text, place, errors) if "\\ud" in line or "\\uD" in line else text


def _mended(text: str, place: str, errors: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise UserError(
                f"{place}: half of a surrogate pair at character {error.start}", hint=ERRORS_HINT
            ) from error
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", errors)


def parquet_rows(file: BinaryIO, name: str, field: str, errors: str) -> Iterator[Group]:
    """The column `field` of each row, a few rows at a time. Raises `UserError` naming the row that has no text."""
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


def _row_text(value: bytes | None, place: str, errors: str) -> str:
    if value is None:
        raise UserError(f"{place} holds no text")
    try:
        return value.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the byte at offset {error.start} is not UTF-8", hint=ERRORS_HINT) from error


def _suffix(name: str) -> str:
    """The last suffix that does not name a compression, in lower case."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in (".gz", ".zst")), "")


def _holds_text(column_type) -> bool:
    if types.is_dictionary(column_type):
        column_type = column_type.value_type
    return any(
        test(column_type) for test in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )
