"""The text of an earlier task: scored to see what is forgotten, and mixed in so that less is."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmctl.data.corpus import Corpus
from llmctl.data.inputs import decompressed, find_inputs
from llmctl.data.masking import MaskedRows, Masking
from llmctl.data.packing import PackedRows
from llmctl.data.tokenize import tokenize
from llmctl.data.tokenize_settings import TokenizeSettings
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.data.sources import Source, parse_sources
from llmctl.finetune.settings import FinetuneSettings
from llmctl.stream_source import MARKER, SequentialSource
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer
from llmctl.train.feed import Rows

SCORED_TOKENS, REPLAYED_TOKENS = 1 << 17, 1 << 24
"""No more of a corpus is read: pieces from all over it."""


def write_pieces(path: str, model: str, file: Path, length: int, most: int) -> None:
    """Write a corpus (text, or a token stream of the model's tokenizer) as a token stream of pieces of `length` at most.

    Raises UserError for tokens of another tokenizer.
    """
    tokenizer = Tokenizer.load(model)
    with _as_tokens(path, model) as stream:
        corpus = Corpus.open([stream], tokenizer_sha256=tokenizer.sha256)
        view = corpus.split("val") or corpus.split("train")
        if view is None or view.n_tokens < 3:
            raise UserError(f"{path}: holds no tokens")
        ends = np.append(view.starts[1:], view.n_tokens)
        pieces = [
            (at, min(at + length, end)) for start, end in zip(view.starts, ends) for at in range(start, end, length)
        ]
        pieces = [(start, end) for start, end in pieces if end - start > 1]
        step = max(1, -(-view.n_tokens // most))
        with open(file, "wb") as sink:
            writer = TokenStreamWriter(sink, tokenizer)
            for start, end in pieces[::step]:
                writer.write(view.read(int(start), int(end)), np.array([0, end - start]))
            writer.close()


def replayed(words: Sequence[str], replay: str, file: Path) -> list[Source]:
    """The sources of `words`, which share what the earlier corpus, in `file` by now, leaves of all that is drawn.

    Raises CalledWrongly where `replay` has no share between 0 and 1.
    """
    (old,) = parse_sources([replay])
    if old.weight is None or old.weight >= 1:
        raise CalledWrongly(f"--replay {replay}: expected a corpus and its share of the rows, as in corpus.txt:0.1")
    sources = parse_sources(list(words))
    if len(sources) > 1 and sources[0].weight is None:
        raise CalledWrongly("--replay with several files needs their weights", hint="a.jsonl:0.7 b.jsonl:0.3")
    total = sum(source.weight or 1.0 for source in sources)
    new = [Source(source.path, (source.weight or 1.0) / total * (1 - old.weight)) for source in sources]
    return [*new, Source(str(file), old.weight, is_earlier=True)]


def scored_rows(file: Path, seq_len: int, kind: str, tokenizer: Tokenizer, settings: FinetuneSettings) -> Rows:
    """What `write_pieces` wrote, as rows to score."""
    view = Corpus.open([file]).split("train")
    seq_len = min(seq_len, view.n_tokens - 1)
    if kind == "masked":
        return MaskedRows(view, seq_len, tokenizer, masking=Masking(tokenizer, settings), seed=settings.seed)
    return PackedRows(view, seq_len, tokenizer, seed=settings.seed)


@contextlib.contextmanager
def _as_tokens(path: str, model: str) -> Iterator[str]:
    (source,) = find_inputs([path])
    with source.open() as file:
        is_stream = decompressed(SequentialSource(file)).peek(len(MARKER)).startswith(MARKER)
    if is_stream:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llmctl-") as directory:
        tokens = f"{directory}/corpus.arrow"
        tokenize([path], tokens, TokenizeSettings(tokenizer=model), lambda progress: None)
        yield tokens
