"""The rows of a file, whatever its format, one at a time and each with the place that an error can name."""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmctl.data.inputs import CountedFile, Input, damage_named, decompressed, temporary_copy
from llmctl.errors import UserError
from llmctl.finetune.data.json_array import array_items
from llmctl.stream_source import MARKER, SequentialSource
from llmctl.streams import TokenStream, read_stream

BLOCK = 1 << 18
_STRANGE_BYTE = re.compile("[\udc80-\udcff]")
"""As which `surrogateescape` shows what is not UTF-8."""
_PARQUET = b"PAR1"
_PARQUET_ROWS = 256
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
# A cell may hold a whole document.
csv.field_size_limit(1 << 30)


@dataclass(frozen=True)
class Row:
    """`fields` by name, or the `error` that stands in their place; `place` is file:line, or the file and the row."""

    place: str
    fields: dict[str, Any] | None = None
    error: UserError | None = None


def read_rows(source: Input, columns: Sequence[str] = ()) -> Iterator[Row | TokenStream]:
    """The rows of a file or pipe; a token stream comes as a whole.

    JSON Lines, a JSON array, CSV, TSV, parquet and token streams are told apart by their first bytes, CSV and TSV by the
    name or the first line; each may be compressed. `columns` are those of a CSV or TSV without a header, which is known by
    its name alone. What ends the file for good (damage, no known format) is raised.
    """
    with source.open() as file, damage_named(source.name):
        raw = SequentialSource(file)
        content = decompressed(raw)
        head = content.peek(BLOCK)
        if head.startswith(MARKER):
            yield read_stream(content)
        elif head.startswith(_PARQUET):
            yield from _parquet(file if content is raw else None, content, source.name)
        else:
            yield from _text_rows(content, head, source.name, columns)


def _text_rows(content: SequentialSource, head: bytes, name: str, columns: Sequence[str]) -> Iterator[Row]:
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if columns and _suffix(name) in _SEPARATORS:
        yield from _table(content, _separator(head, name), name, list(columns))
    elif first == b"[":
        yield from _json_array(content, name)
    elif first == b"{":
        yield from _json_lines(content, name)
    elif first:
        yield from _table(content, _separator(head, name), name)


def _lines(content: SequentialSource) -> Iterator[bytes]:
    """Lines without their newline, of any length."""
    begun: list[bytes] = []
    while block := content.read(BLOCK):
        first, *lines = block.split(b"\n")
        begun.append(first)
        if lines:
            yield b"".join(begun)
            yield from lines[:-1]
            begun = [lines[-1]]
    if any(begun):
        yield b"".join(begun)


def _json_lines(content: SequentialSource, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(content), 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield _json_row(line, f"{name}:{number}")


def _json_row(line: bytes, place: str) -> Row:
    try:
        return _checked(json.loads(line.decode()), place)
    except UnicodeDecodeError as error:
        return Row(
            place, error=UserError(f"the byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8")
        )
    except json.JSONDecodeError as error:
        return Row(place, error=UserError(f"not JSON: {error.msg} at column {error.colno}"))
    except RecursionError:
        return Row(place, error=UserError("not a row: its JSON is nested too deep"))


def _checked(value: Any, place: str) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    return Row(place, error=UserError(f"expected a JSON object, got {type(value).__name__}"))


def _json_array(content: SequentialSource, name: str) -> Iterator[Row]:
    for line, value in array_items(content, name):
        yield _checked(value, f"{name}:{line}")


def _suffix(name: str) -> str:
    """Of a file's name, without that of its compression; empty where there is none."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes if suffix.lower() not in (".gz", ".zst")]
    return suffixes[-1] if suffixes else ""


def _separator(head: bytes, name: str) -> str:
    suffix = _suffix(name)
    if suffix in _SEPARATORS:
        return _SEPARATORS[suffix]
    line = head.partition(b"\n")[0]
    found = next((mark for mark in ("\t", ",") if mark.encode() in line), None)
    if found is None or suffix:
        raise UserError(
            f"{name}: neither JSON, CSV, TSV, parquet nor a token stream; it begins with {head[:20]!r}",
            hint="llmctl tokenize makes a token stream of plain text",
        )
    return found


def _table(content: SequentialSource, separator: str, name: str, header: list[str] | None = None) -> Iterator[Row]:
    def text() -> Iterator[str]:
        for number, line in enumerate(_lines(content), 1):
            # what is no UTF-8 is noticed in the cell that has it
            yield line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape") + "\n"

    reader = csv.reader(text(), delimiter=separator, strict=True)
    expected = "the header has {}" if header is None else f"expected {{}} ({', '.join(header)})"
    while True:
        place = f"{name}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(place, error=UserError(f"not a row of CSV: {error}"))
            continue
        if cells is None:
            return
        if (strange := _STRANGE_BYTE.search("".join(cells))) is not None:
            error = UserError(f"the byte 0x{ord(strange[0]) - 0xDC00:02x} is not UTF-8")
            if header is None:
                raise UserError(f"{place}: {error.message}")
            yield Row(place, error=error)
        elif header is None:
            header = [cell.strip() for cell in cells]
            if twice := [column for column in header if header.count(column) > 1]:
                raise UserError(f"{place}: the header has {twice[0]!r} twice")
        elif len(cells) == len(header):
            yield Row(place, dict(zip(header, cells)))
        elif cells:
            yield Row(place, error=UserError(f"{len(cells)} cells, {expected.format(len(header))}"))


def _parquet(file: CountedFile | None, content: SequentialSource, name: str) -> Iterator[Row]:
    is_plain = file is not None and file.seekable()
    with contextlib.nullcontext(file) if is_plain else temporary_copy(content) as seekable:
        try:
            table = pq.ParquetFile(seekable)
        except pa.ArrowInvalid as error:
            raise UserError(f"{name}: not a parquet file: {error}", hint="copy or download it again") from error
        number = 0
        for batch in table.iter_batches(_PARQUET_ROWS):
            for number, fields in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 - it counts on over batches
                # a column that a row does not use is null there
                yield Row(f"{name}: row {number}", {key: value for key, value in fields.items() if value is not None})
