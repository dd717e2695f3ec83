"""Results as JSON Lines: what was run, then each item as soon as it is done, so that a stopped run can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmctl.errors import UserError
from llmctl.files import refuse_existing

Record = dict[str, Any]


@dataclass
class Section:
    """What one task left: `run` says what was asked of what, `records` are its items by number."""

    run: Record
    records: list[Record]

    @property
    def task(self) -> str:
        return self.run["task"]


def read(path: str | os.PathLike) -> list[Section]:
    """The tasks of a results file. Raises UserError for what is none; a line cut off by a crash is not there."""
    sections: dict[str, Section] = {}
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                _add(sections, json.loads(line), f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:
        raise UserError(f"{path}:{number}: not a line of results: {error}") from error
    if not sections:
        raise UserError(f"{path}: no results in it", hint="llmctl eval MODEL --task NAME -o FILE writes such a file")
    for section in sections.values():
        section.records.sort(key=lambda record: record["id"])
    return list(sections.values())


def _add(sections: dict[str, Section], content: Any, place: str) -> None:
    if not isinstance(content, dict) or content.get("kind") not in ("run", "item"):
        raise UserError(f"{place}: not a line of results", hint="llmctl eval MODEL --task NAME -o FILE writes them")
    needed = ("task", "task_kind", "metrics", "model") if content["kind"] == "run" else ("task", "id")
    if missing := next((key for key in needed if key not in content), None):
        raise UserError(f"{place}: a line of results without {missing!r}")
    if content["kind"] == "run":
        sections[content["task"]] = Section(content, [])
    elif content["task"] not in sections:
        raise UserError(f"{place}: an item of {content['task']}, which the file does not say how it was run")
    else:
        del content["kind"]
        sections[content["task"]].records.append(content)


class ResultsFile:
    """Appends to a file; with `path` None it keeps nothing. `resume` goes on with what is there."""

    def __init__(self, path: str | None, resume: bool = False, overwrite: bool = False):
        self.path = path
        self._before: dict[str, Section] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        if resume and os.path.exists(path) and os.path.getsize(path):
            _cut_off_half_line(path)
            self._before = {section.task: section for section in read(path)}
        else:
            refuse_existing(path, overwrite)
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab" if resume else "wb", buffering=0)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, failure: type | None, *_) -> None:
        if self._file is None:
            return
        try:
            if failure is None:  # else what went wrong is the news, not that a full disk cannot be flushed
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def begin(self, run: Record) -> list[Record]:
        """Note what is run now, and give what is done of it already, which is more than is asked for where that run had a
        higher limit. Raises UserError where it was something else."""
        before = self._before.get(run["task"])
        if before is None:
            self._write({"kind": "run", **run})
            return []
        for key, value in run.items():
            if key not in ("model", "parameters", "limit") and before.run.get(key) != value:
                raise UserError(
                    f"{self.path}: holds {run['task']} with another {key.replace('_', ' ')}: "
                    f"{str(before.run.get(key))[:60]}, now {str(value)[:60]}",
                    hint="choose another --output, or add --overwrite to begin again",
                )
        return before.records

    def append(self, record: Record) -> None:
        self._write({"kind": "item", **record})

    def _write(self, record: Record) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _cut_off_half_line(path: str) -> None:
    """What a crash left behind the last line break."""
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def items(section: Section) -> Iterator[Record]:
    """Those with scores."""
    return (record for record in section.records if "scores" in record)
