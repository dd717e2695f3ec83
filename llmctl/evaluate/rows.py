"""The rows of a task's data, in the forms that the public sets come in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmctl.data import text_rows
from llmctl.data.inputs import find_inputs
from llmctl.errors import UserError
from llmctl.finetune.data import rows as formats

_SPLIT = re.compile(r"[_-](dev|val|valid|validation|test|train)$")


@dataclass(frozen=True)
class Form:
    """How a file is read beyond what it shows itself.

    `lines`: each line is a row with the column text. `columns` names those of a CSV or TSV that has no header. `unnest` are keys
    of lists inside each other, whose innermost items are the rows and have the keys around them too. `labels` is the end of
    the name of a file beside it with a label in each line.
    """

    lines: bool = False
    columns: tuple[str, ...] = ()
    unnest: tuple[str, ...] = ()
    labels: str | None = None


@dataclass(frozen=True)
class DataRow:
    """`number` counts from 0 over all files; `place` names file and line."""

    number: int
    place: str
    fields: dict[str, Any]


def read(path: str, form: Form) -> list[DataRow]:
    """All rows of a file, or of every file in a directory; `_file` is the file's name without its ending and split."""
    target = Path(path)
    files = sorted(p for p in target.iterdir() if p.is_file() and p.name[0] != ".") if target.is_dir() else [target]
    found = []
    for file in files:
        name = _SPLIT.sub("", file.name.partition(".")[0])
        for place, fields in _labelled(str(file) if path != "-" else "-", form):
            found += [DataRow(len(found), place, {"_file": name, **fields})]
    if not found:
        raise UserError(f"{path}: no rows in it")
    return found


def _labelled(path: str, form: Form) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = (item for place, fields in _plain(path, form) for item in _unnested(place, fields, form.unnest))
    beside = None if form.labels is None else Path(re.sub(r"\.\w+$", "", path) + form.labels)
    if beside is None or not beside.exists():
        yield from rows
        return
    labels = beside.read_text(encoding="utf-8", errors="replace").split()
    count = 0
    for count, (place, fields) in enumerate(rows, 1):
        if count > len(labels):
            break
        yield place, {"label": labels[count - 1], **fields}
    if count != len(labels):
        raise UserError(f"{beside}: {len(labels)} labels; {path} has {'more' if count > len(labels) else count} rows")


def _plain(path: str, form: Form) -> Iterator[tuple[str, dict[str, Any]]]:
    if form.lines:
        for row in text_rows.read_rows([path]):
            if row.text.strip():
                yield row.name, {"text": row.text, **row.rest}
    else:
        for row in formats.read_rows(find_inputs([path])[0], form.columns):
            if not isinstance(row, formats.Row):
                raise UserError(f"{path}: a token stream", hint="it has no rows; give JSON Lines, CSV or parquet")
            if row.error is not None:
                raise UserError(f"{row.place}: {row.error.message}", row.error.hint)
            yield row.place, row.fields


def _unnested(place: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A row without the outermost key is one already: sets are passed on flattened too."""
    if not keys or not isinstance(fields.get(keys[0]), list):
        yield place, fields
        return
    around = {name: value for name, value in fields.items() if name != keys[0]}
    for number, item in enumerate(fields[keys[0]], 1):
        yield from _unnested(f"{place}: {keys[0]} {number}", {**around, **item}, keys[1:])
