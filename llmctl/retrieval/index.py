"""A local index of a directory: its passages, and their vectors where a model embeds them, in one file that is replaced whole."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmctl.errors import CalledWrongly, UserError
from llmctl.files import staged_file
from llmctl.retrieval.bm25 import Bm25, words
from llmctl.retrieval.passages import PASSAGE_CHARACTERS, Passage, read_text, split, text_files
from llmctl.retrieval.vectors import Vectorizer, identity

Report = Callable[[int, str], None]
NAME = ".llmctl-index"
_VERSION = 1


@dataclass(frozen=True)
class Changes:
    """What an update did, in files; `skipped` are no text, `passages` are all that the index now holds."""

    added: int
    changed: int
    removed: int
    unchanged: int
    skipped: int
    passages: int


class Index:
    """`embedder` is the identity of the model that made `vectors_ND` (float32, of length 1), None for words alone."""

    def __init__(
        self,
        directory: Path,
        files: dict[str, str],
        passages: list[Passage],
        embedder: str | None,
        vectors_ND: np.ndarray,
        characters: int,
    ):
        self.directory, self.files, self.passages, self.characters = directory, files, passages, characters
        self.embedder, self.vectors_ND = embedder, vectors_ND
        self.vectorizer: Vectorizer | None = None
        self._bm25: Bm25 | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike, embed_model: str | os.PathLike | None) -> Index:
        """Raises `UserError` where there is none, and for one that was built with another model than `embed_model`."""
        directory = Path(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory")
        index = _read(directory)
        if index is None:
            raise UserError(f"{directory}: no index", hint=f"llmctl index {_flags(directory, embed_model)} builds it")
        index._expect(embed_model)
        if embed_model is not None:
            index.vectorizer = Vectorizer(embed_model)
        return index

    def search(self, question: str, n: int) -> list[Passage]:
        """The best passages with their scores, the best first; those that share nothing with the question are left out."""
        if not self.passages:
            return []
        if self.vectorizer is not None:
            scores_N = self.vectors_ND @ self.vectorizer.vectors([question])[0]
        else:
            self._bm25 = self._bm25 or Bm25([words(passage.text) for passage in self.passages])
            scores_N = self._bm25.scores(words(question))
        best = np.argsort(-scores_N, kind="stable")[:n]
        return [
            dataclasses.replace(self.passages[i], score=float(scores_N[i]))
            for i in best
            if self.vectorizer is not None or scores_N[i] > 0
        ]

    def _expect(self, embed_model: str | os.PathLike | None) -> None:
        wanted = None if embed_model is None else identity(embed_model)
        if wanted == self.embedder:
            return
        is_with = "words alone (BM25)" if self.embedder is None else f"the embedding model {self.embedder}"
        asked = "no --embed-model is given" if wanted is None else f"{embed_model} is {wanted}"
        raise UserError(
            f"{self.directory}: its index was built with {is_with}; {asked}",
            hint=f"llmctl index {_flags(self.directory, embed_model)} --rebuild makes it anew",
        )

    def _save(self) -> None:
        header = {
            "version": _VERSION,
            "embedder": self.embedder,
            "characters": self.characters,
            "files": self.files,
            "passages": [[p.path, p.first, p.last, p.text] for p in self.passages],
        }
        content = json.dumps(header, ensure_ascii=False).encode()
        with staged_file(self.directory / NAME, overwrite=True) as file:
            file.write(len(content).to_bytes(8, "little") + content)
            np.save(file, self.vectors_ND, allow_pickle=False)


def update(
    directory: str | os.PathLike,
    embed_model: str | os.PathLike | None = None,
    rebuild: bool = False,
    characters: int | None = None,
    report: Report = lambda n, note: None,
) -> Changes:
    """Build the index of a directory, or bring it up to date: only files whose content changed are read into it again.

    `characters` bound a passage; None is as the index was built. `report` gets the number of passages read so far, then of
    those embedded. Raises `UserError` for an index of another embedding model unless it is to be rebuilt.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CalledWrongly(f"{directory}: no such directory")
    old = None if rebuild else _read(directory)
    if old is not None:
        old._expect(embed_model)
    before = old.files if old else {}
    characters = characters or (old.characters if old else PASSAGE_CHARACTERS)
    files, fresh, n_skipped = _changed(directory, before, characters, report)
    new = [passage for passages in fresh.values() for passage in passages]
    is_kept = [passage.path in files and passage.path not in fresh for passage in (old.passages if old else ())]
    passages = [passage for passage, stays in zip(old.passages if old else (), is_kept) if stays] + new
    vectors_ND = (
        old.vectors_ND[np.array(is_kept)] if old and embed_model and any(is_kept) else np.zeros((0, 0), np.float32)
    )
    if embed_model is not None and new:
        found_MD = Vectorizer(embed_model).vectors([passage.text for passage in new], report)
        vectors_ND = np.concatenate([vectors_ND, found_MD]) if len(vectors_ND) else found_MD
    if old is None or files != before:
        embedder = None if embed_model is None else identity(embed_model)
        Index(directory, files, passages, embedder, vectors_ND, characters)._save()
    n_changed, n_removed = len(before.keys() & fresh.keys()), len(before.keys() - files.keys())
    n_added = len(fresh) - n_changed
    return Changes(n_added, n_changed, n_removed, len(files) - len(fresh), n_skipped, len(passages))


def _changed(
    directory: Path, before: dict[str, str], characters: int, report: Report
) -> tuple[dict, dict[str, list[Passage]], int]:
    """(the identity of every text file, passages of those that are not as before, number of files that are no text)."""
    files, fresh, n_skipped, n_read = {}, {}, 0, 0
    for path in text_files(directory):
        text, name = read_text(path), str(path.relative_to(directory))
        if text is None:
            n_skipped += 1
            continue
        files[name] = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}-{characters}"
        if before.get(name) != files[name]:
            fresh[name] = split(name, text, characters)
            n_read += len(fresh[name])
            report(n_read, "read")
    return files, fresh, n_skipped


def _read(directory: Path) -> Index | None:
    """None where there is no index. Raises `UserError` for a file that is none, or of another version."""
    path = directory / NAME
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        vectors_ND = np.load(io.BytesIO(content[8 + size :]), allow_pickle=False)
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']}, expected {_VERSION}")
        passages = [Passage(*row) for row in header["passages"]]
        if header["embedder"] is not None and len(vectors_ND) != len(passages):
            raise ValueError("its vectors are not those of its passages")
        return Index(directory, header["files"], passages, header["embedder"], vectors_ND, header["characters"])
    except (ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(
            f"{path}: no index that can be read ({error})", hint=f"llmctl index {directory} --rebuild makes it anew"
        ) from error


def _flags(directory: Path, embed_model: str | os.PathLike | None) -> str:
    return str(directory) if embed_model is None else f"{directory} --embed-model {embed_model}"
