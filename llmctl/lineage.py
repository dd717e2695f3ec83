"""llmctl.json: where a checkpoint comes from, and the sha256 of every file in it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llmctl
from llmctl.errors import UserError
from llmctl.files import read_json, write_atomic

FILE_NAME = "llmctl.json"
COVERED_SUFFIXES = {".json", ".safetensors", ".model", ".jinja", ".onnx", ".data", ".c", ".bin"}


def versions() -> dict[str, str]:
    """Of what shapes a result, without importing it."""
    found = {"llmctl": llmctl.__version__, "code": code_sha256()[:12], "python": platform.python_version()}
    for package in ("torch", "tokenizers"):
        found[package] = importlib.metadata.version(package)
    return found


def code_sha256() -> str:
    """The identity of this package's own code, which changes more often than its version."""
    total = hashlib.sha256(llmctl.__version__.encode())
    for file in sorted(Path(llmctl.__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


@dataclass
class Lineage:
    """What made a checkpoint: the command, its resolved flags, and the identity of everything that went in."""

    command: str
    recipe: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    data_sha256: str | None = None
    tokenizer_sha256: str | None = None
    parent_sha256: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)
    files: dict[str, str] = field(default_factory=dict)


def write(directory: str | os.PathLike, lineage: Lineage, known: Mapping[str, str] | None = None) -> None:
    """Hash the checkpoint's files as they now lie in `directory` and write llmctl.json: the last step of a save.

    `known` are the sha256 of files that were hashed while they were written.
    """
    known = known or {}
    files = {path.name: known.get(path.name) or file_sha256(path) for path in _covered_files(Path(directory))}
    content = dataclasses.asdict(dataclasses.replace(lineage, files=files))
    write_atomic(Path(directory, FILE_NAME), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read(directory: str | os.PathLike) -> Lineage | None:
    """The lineage of a checkpoint; None where another program wrote it."""
    path = Path(directory, FILE_NAME)
    if not path.exists():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or "command" not in content:
        raise UserError(f"{path}: not a lineage file: it names no command")
    known = {item.name for item in dataclasses.fields(Lineage)}
    return Lineage(**{name: value for name, value in content.items() if name in known})


def verify(directory: str | os.PathLike) -> list[str]:
    """One line for each file that is missing or is not the one that was saved; empty when all are, or none is listed."""
    lineage = read(directory)
    problems = []
    for name, expected in (lineage.files if lineage else {}).items():
        path = Path(directory, name)
        if not path.exists():
            problems.append(f"{name}: missing")
        elif (found := file_sha256(path)) != expected:
            problems.append(f"{name}: sha256 {found[:16]}…, {expected[:16]}… was saved")
    return problems


def weights_sha256(checkpoint: str | os.PathLike) -> str:
    """The identity of a parent: over the names and contents of a directory's weight files, or the contents of a .gguf file."""
    if os.path.isfile(checkpoint):
        return file_sha256(checkpoint)
    total = hashlib.sha256()
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        total.update(f"{path.name} {file_sha256(path)}\n".encode())
    return total.hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _covered_files(directory: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix in COVERED_SUFFIXES and path.name != FILE_NAME
    )
