"""Texts and token streams in windows, each token predicted once."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmctl.data.corpus import Corpus, TokenView
from llmctl.data.documents import DocumentReader
from llmctl.data.inputs import find_inputs
from llmctl.errors import CalledWrongly, UserError
from llmctl.evaluate.encoding import PairEncoder
from llmctl.evaluate.likelihood import Fork
from llmctl.evaluate.prompts import Item
from llmctl.evaluate.task import Task
from llmctl.stream_source import MARKER
from llmctl.tokenizer import Tokenizer

TASK = Task(
    name="perplexity", kind="perplexity", prompt="{{ text }}", about="Nats per token and bits per byte of texts"
)
_WINDOWS_PER_ITEM = 32
_DEFAULT_WINDOW = 1024  # of models without a limit


@dataclass(frozen=True)
class Document:
    """`ids` begin with the token that the first one is predicted from; `n_bytes` of its text in UTF-8."""

    name: str
    ids: Sequence[int]
    n_bytes: int


def windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Fork]:
    """Windows of `window` tokens that move by `stride`: each predicts those that the one before did not.

    The first predicts as many as it reads; any other `stride` at most, after `window - stride` of context or more.
    """
    predicted = 1
    while predicted < len(ids):
        end = min(len(ids), predicted + (window if predicted == 1 else stride))
        start = max(0, end - 1 - window)
        yield Fork(ids[start:predicted], [ids[predicted:end]])
        predicted = end


def items(documents: Iterator[Document], window: int, stride: int, tokenizer: Tokenizer) -> Iterator[Item]:
    """A document's windows, some at a time, each with the bytes of its own part; together they have the document's."""
    number = itertools.count()
    for document in documents:
        left, forks = document.n_bytes, windows(document.ids, window, stride)
        part = list(itertools.islice(forks, _WINDOWS_PER_ITEM))
        while part:
            following = list(itertools.islice(forks, _WINDOWS_PER_ITEM))
            ids = [token for fork in part for token in fork.continuations[0]]
            n_bytes = min(left, len(tokenizer.decode(ids).encode())) if following else left
            yield Item(next(number), document.name, [], fields={"_forks": part, "_bytes": n_bytes})
            left, part = left - n_bytes, following


def sizes(room: int | None, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride. Raises CalledWrongly for a window beyond the context or a stride beyond the window."""
    window = window or room or _DEFAULT_WINDOW
    if room is not None and window > room:
        raise CalledWrongly(f"--window {window}: the model's context is {room}")
    stride = stride or window
    if stride > window:
        raise CalledWrongly(f"--stride {stride}: tokens between windows of {window} would not be predicted")
    return window, stride


def documents(paths: Sequence[str], encoder: PairEncoder) -> Iterator[Document]:
    """Of texts (files, JSON Lines, parquet, standard input), or of token streams: the held-out part where there is one."""
    with tempfile.TemporaryDirectory(prefix="llmctl-") as place:
        paths = [_spooled(place) if path == "-" else path for path in paths]
        if any(map(_is_stream, paths)):
            yield from _of_stream(Corpus.open(paths, tokenizer_sha256=encoder.tokenizer.sha256), encoder)
        else:
            with _advice_for_eval():
                yield from _of_texts(DocumentReader(find_inputs(list(paths))), encoder)


@contextlib.contextmanager
def _advice_for_eval() -> Iterator[None]:
    """Texts that are no UTF-8 are a tokenizer's business: `eval` has no flags for them."""
    try:
        yield
    except UserError as error:
        if "--errors" not in (error.hint or ""):
            raise
        hint = "llmctl tokenize FILE --tokenizer MODEL --errors replace | llmctl eval MODEL -"
        raise UserError(error.message, hint=hint) from error


def _of_texts(groups: DocumentReader, encoder: PairEncoder) -> Iterator[Document]:
    whole, number = b"", itertools.count(1)
    for group in groups:
        for place, text in enumerate(group.texts):
            if whole and not (place == 0 and group.continues):
                yield _of_text(whole, next(number), encoder)
                whole = b""
            whole += text
    if whole:
        yield _of_text(whole, next(number), encoder)


def _of_text(text: bytes, number: int, encoder: PairEncoder) -> Document:
    return Document(f"document {number}", encoder.behind_prefix(text.decode()), len(text))


def _of_stream(corpus: Corpus, encoder: PairEncoder) -> Iterator[Document]:
    view: TokenView | None = corpus.split("val") or corpus.split("train")
    if view is None:
        raise UserError("the token stream holds no tokens")
    for number in range(view.n_documents):
        ids = view.document(number).tolist()
        n_bytes = len(encoder.tokenizer.decode(ids).encode())
        before = [] if ids[:1] == [encoder.prefix_id] or encoder.prefix_id is None else [encoder.prefix_id]
        yield Document(f"document {number + 1}", before + ids, n_bytes)


def _spooled(place: str) -> str:
    """Standard input in a file, which can be looked at twice."""
    path = os.path.join(place, "standard input")
    with open(0, "rb", closefd=False) as source, open(path, "wb") as copy:
        shutil.copyfileobj(source, copy)
    return path


def _is_stream(path: str) -> bool:
    if os.path.isdir(path):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(MARKER)) == MARKER
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error
