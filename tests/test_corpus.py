"""A corpus over files, shards and pipes reads as one sequence."""

from __future__ import annotations

import io
import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import streams
from llmctl.data.corpus import Corpus
from llmctl.errors import UserError
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer

TOKENIZER = Tokenizer.bytes()


def write(path, calls, tokenizer=TOKENIZER, loss_mask=False, n_bytes=None, **end):
    """A stream file of `calls`: (documents, split, continues)."""
    with open(path, "wb") as file:
        writer = TokenStreamWriter(file, tokenizer, loss_mask=loss_mask, split=True)
        for documents, split, continues in calls:
            ids = np.array([token for document in documents for token in document], np.uint32)
            offsets = np.cumsum([0, *map(len, documents)])
            mask = ids % 2 == 0 if loss_mask else None
            writer.write(ids, offsets, split=split, continues=continues, loss_mask=mask)
        writer.close(n_bytes, **end)
    return path


def simple(path, text="hello", **options):
    ids = list(text.encode())
    return write(path, [([ids], "train", False)], n_bytes={"train": len(ids)}, **options)


DOCUMENTS = st.lists(st.lists(st.integers(0, 256), max_size=7), min_size=1, max_size=4)
FILES = st.lists(
    st.lists(st.tuples(DOCUMENTS, st.sampled_from(["train", "val"]), st.just(False)), max_size=4),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(files=FILES, batch_tokens=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_corpus_reads_as_the_sequence_of_its_documents(tmp_path_factory, files, batch_tokens, seed):
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH_TOKENS", batch_tokens)
        paths = [write(folder / f"{i}.arrow", calls, loss_mask=True) for i, calls in enumerate(files)]
    corpus = Corpus.open(paths)
    for split in ("train", "val"):
        documents = [document for calls in files for call in calls if call[1] == split for document in call[0]]
        tokens = [token for document in documents for token in document]
        view = corpus.split(split)
        if not tokens:
            assert view is None
            continue
        assert view.n_tokens == len(tokens)
        assert view.n_documents == len(documents)
        assert view.starts.tolist() == np.cumsum([0, *map(len, documents)])[:-1].tolist()
        assert [view.document(i).tolist() for i in range(len(documents))] == documents
        for start, stop in np.sort(np.random.default_rng(seed).integers(0, len(tokens) + 1, (8, 2)), axis=1):
            assert view.read(start, stop).tolist() == tokens[start:stop]
            assert view.loss_mask(start, stop).tolist() == [token % 2 == 0 for token in tokens[start:stop]]


def test_a_document_that_goes_on_in_the_next_batch_starts_once(tmp_path):
    calls = [([[1], [2, 3]], "train", False), ([[4], [5]], "train", True), ([[6]], "val", False)]
    view = Corpus.open([write(tmp_path / "a.arrow", calls)]).split("train")
    assert view.n_documents == 3
    assert view.starts.tolist() == [0, 1, 4]
    assert view.document(1).tolist() == [2, 3, 4]


def test_reading_past_the_end_is_an_error(tmp_path):
    view = Corpus.open([simple(tmp_path / "a.arrow")]).split("train")
    for start, stop in ((-1, 2), (0, 6), (3, 2)):
        with pytest.raises(IndexError):
            view.read(start, stop)


def test_bytes_are_known_where_every_file_knows_them(tmp_path):
    known = simple(tmp_path / "a.arrow")
    unknown = write(tmp_path / "b.arrow", [([[1]], "train", False)])
    assert Corpus.open([known, known]).split("train").n_bytes == 10
    assert Corpus.open([known, unknown]).split("train").n_bytes is None
    assert Corpus.open([known]).split("train").loss_mask(0, 1) is None


def test_the_identity_is_that_of_contents_and_tokenizer(tmp_path):
    one = simple(tmp_path / "a.arrow", "one")
    other_tokenizer = Tokenizer.train_bpe(["aa bb"], 260)
    files = {
        "again": simple(tmp_path / "b.arrow", "one"),
        "other": simple(tmp_path / "c.arrow", "two"),
        "tokenizer": simple(tmp_path / "d.arrow", "one", tokenizer=other_tokenizer),
    }
    identity = Corpus.open([one]).sha256
    assert Corpus.open([files["again"]]).sha256 == identity
    assert Corpus.open([files["other"]]).sha256 != identity
    assert Corpus.open([files["tokenizer"]]).sha256 != identity


def test_files_of_two_tokenizers_do_not_mix(tmp_path):
    other = Tokenizer.train_bpe(["aa bb"], 260)
    paths = [simple(tmp_path / "a.arrow"), simple(tmp_path / "b.arrow", tokenizer=other)]
    with pytest.raises(
        UserError, match=f"b.arrow: made by the tokenizer {other.sha256[:12]}, not by that of .*a.arrow"
    ):
        Corpus.open(paths)
    with pytest.raises(UserError, match="not by the one expected"):
        Corpus.open(paths[:1], tokenizer_sha256=other.sha256)
    assert Corpus.open(paths[1:], tokenizer_sha256=other.sha256).tokenizer.sha256 == other.sha256


class Understated:
    """A tokenizer that claims fewer ids than it has."""

    def __init__(self, vocab_size):
        self.json, self.config, self.sha256 = TOKENIZER.json, TOKENIZER.config, TOKENIZER.sha256
        self.vocab_size = vocab_size


def with_id_beyond_the_vocabulary(path):
    """The stream of an older, larger vocabulary under a header that names a smaller one."""
    sink = io.BytesIO()
    writer = TokenStreamWriter(sink, Understated(99))
    writer._vocab_size = 65536  # whatever wrote such a file did not check
    writer.write(np.array([5, 99], np.uint32), np.array([0, 2]))
    writer.close()
    path.write_bytes(sink.getvalue())
    return path


def test_ids_beyond_the_vocabulary_are_found_when_the_file_is_opened(tmp_path):
    path = with_id_beyond_the_vocabulary(tmp_path / "a.arrow")
    with pytest.raises(UserError, match="a.arrow: token id 99 is beyond its tokenizer's vocabulary of 99"):
        Corpus.open([path])


def test_ids_beyond_the_vocabulary_are_found_when_the_totals_hide_them(tmp_path):
    path = with_id_beyond_the_vocabulary(tmp_path / "a.arrow")
    data = path.read_bytes()
    assert data.count(b'"max_id": 99') == 1
    path.write_bytes(data.replace(b'"max_id": 99', b'"max_id": 98'))
    view = Corpus.open([path]).split("train")
    with pytest.raises(UserError, match="a.arrow: token id 99 is beyond its tokenizer's vocabulary of 99"):
        view.read(0, 1)


def test_a_directory_of_shards_is_whole_or_refused(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    for number, text in enumerate(["ab", "cd", "ef"]):
        simple(folder / f"shard-{number:05}.arrow", text, shard=number, last=number == 2)
    view = Corpus.open([folder]).split("train")
    assert bytes(view.read(0, view.n_tokens).tolist()) == b"abcdef"
    (folder / "shard-00002.arrow").rename(tmp_path / "elsewhere.arrow")
    with pytest.raises(UserError, match="shards are missing: 2 of at least 3"):
        Corpus.open([folder])
    (tmp_path / "elsewhere.arrow").rename(folder / "shard-00002.arrow")
    (folder / "shard-00000.arrow").unlink()
    with pytest.raises(UserError, match="shards are missing: 2 of at least 3"):
        Corpus.open([folder])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "no such file"),
        ("empty", "holds no shard"),
        ("text.txt", "not a llmctl token stream"),
        ("cut.arrow", "truncated stream"),
    ],
)
def test_what_is_no_corpus_is_refused_by_name(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("First Citizen:\n")
    (tmp_path / "cut.arrow").write_bytes(simple(tmp_path / "a.arrow").read_bytes()[:-40])
    with pytest.raises(UserError, match=f"(?i){name}.*{message}"):
        Corpus.open([tmp_path / name])


def open_through_a_pipe(tmp_path, data, **options):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    try:
        return Corpus.open([pipe], **options)
    finally:
        writer.join()


@pytest.mark.parametrize("keep", [True, False])
def test_a_pipe_is_spooled_so_that_it_can_be_read_at_random(tmp_path, keep):
    path = simple(tmp_path / "a.arrow", "some text")
    spool = tmp_path / "spool" / "tokens.arrow" if keep else None
    corpus = open_through_a_pipe(tmp_path, path.read_bytes(), spool_to=spool)
    assert corpus.sha256 == Corpus.open([path]).sha256
    assert bytes(corpus.split("train").read(0, 9).tolist()) == b"some text"
    if keep:
        assert spool.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("length", [0, 3, 500, -20])
def test_a_pipe_that_breaks_off_leaves_no_spool(tmp_path, length):
    data = simple(tmp_path / "a.arrow").read_bytes()
    spool = tmp_path / "spool" / "tokens.arrow"
    with pytest.raises(UserError, match="truncated stream"):
        open_through_a_pipe(tmp_path, data[:length], spool_to=spool)
    assert not any(spool.parent.iterdir())


def test_opening_no_path_is_an_error():
    with pytest.raises(UserError, match="no token stream"):
        Corpus.open([])
