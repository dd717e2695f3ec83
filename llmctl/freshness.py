"""Whether a recipe's step may be left out, because its finished output is still what it would make.

A finished step leaves `.NAME.step.json` beside its output NAME: the key of everything that shaped the output, and the
sizes and times of its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llmctl.files import write_atomic
from llmctl.lineage import code_sha256

if TYPE_CHECKING:
    from llmctl.pipeline import CommandLine, Stage


def keys(stages: list[Stage]) -> dict[Stage, str | None]:
    """The identity of what each stage makes: code, flags, and the contents of its inputs, or the keys of their makers.

    None for one that reads the pipeline's own standard input, which nobody can foresee, and for what follows it.
    """
    code = code_sha256()
    known: dict[Stage, str | None] = {}
    for stage in stages:
        sources = [known[maker] if maker else _sha256(path) for path, maker in stage.makers.items()]
        if stage.feeder:
            sources.append(known[stage.feeder])
        elif stage.line.reads_stdin:
            sources.append(None)
        content = json.dumps([code, stage.line.arguments, sources])
        known[stage] = None if None in sources else hashlib.sha256(content.encode()).hexdigest()
    return known


def fresh(stages: list[Stage], keys: Mapping[Stage, str | None]) -> set[Stage]:
    """The stages that need not run: their output is there, or all they do is feed one whose output is."""
    done = {stage for stage in stages if keys[stage] and _recorded(stage.line) == _state(stage.line, keys[stage])}
    for stage in reversed(stages):
        if stage in done and stage.feeder and not stage.feeder.line.outputs:
            done.add(stage.feeder)
    return done


def record(stage: Stage, key: str | None) -> None:
    """Note that a stage has finished its output."""
    if key and stage.line.main_output:
        write_atomic(_record_path(stage.line), json.dumps(_state(stage.line, key)).encode())


def _record_path(line: CommandLine) -> Path:
    output = Path(line.main_output)
    return output.with_name(f".{output.name}.step.json")


def _recorded(line: CommandLine) -> dict | None:
    try:
        return json.loads(_record_path(line).read_bytes()) if line.main_output else None
    except (OSError, ValueError):
        return None


def _state(line: CommandLine, key: str) -> dict:
    files = {
        str(file): [file.stat().st_size, file.stat().st_mtime_ns] for path in line.outputs for file in _files(path)
    }
    return {"key": key, "files": files}


def _files(path: str | Path) -> list[Path]:
    """The file, or those of a directory at any depth; none where nothing is there."""
    path = Path(path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.exists() else []


def _sha256(path: str | Path) -> str:
    """Over the names and contents of a file or directory; a path that is not there has an identity too."""
    total = hashlib.sha256()
    for file in _files(path):
        total.update(f"{file.relative_to(path)}\0".encode(errors="surrogateescape"))
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                total.update(block)
    return total.hexdigest()
