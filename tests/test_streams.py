"""The token stream: what is written is read, and nothing else passes for it."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl import streams
from llmctl.errors import UserError
from llmctl.stream_source import SequentialSource
from llmctl.streams import TokenStreamWriter, read_stream
from llmctl.tokenizer import Tokenizer


def tokenizer(vocab_size=300, json="{}"):
    """Stands for a tokenizer where only its description matters, to keep streams short."""
    return SimpleNamespace(
        vocab_size=vocab_size, json=json, config={"a": "ä"}, sha256=hashlib.sha256(json.encode()).hexdigest()
    )


def flat(documents):
    ids = np.array([token for document in documents for token in document], np.uint32)
    return ids, np.cumsum([0, *map(len, documents)])


def stream_of(calls, vocab_size=300, loss_mask=False, split=False, n_bytes=None):
    """The bytes of a stream: `calls` are lists of documents, or (documents, split)."""
    sink = io.BytesIO()
    writer = TokenStreamWriter(sink, tokenizer(vocab_size), loss_mask=loss_mask, split=split)
    for call in calls:
        documents, name = call if isinstance(call, tuple) else (call, "train")
        ids, offsets = flat(documents)
        writer.write(ids, offsets, split=name, loss_mask=ids % 2 == 0 if loss_mask else None)
    writer.close(n_bytes)
    return sink.getvalue()


def rows(stream):
    found = []
    for batch in stream:
        splits = batch.split or ["train"] * len(batch)
        for number in range(len(batch)):
            document = batch.ids[batch.offsets[number] : batch.offsets[number + 1]].tolist()
            found.append((document, splits[number]))
    return found


def sources(data, tmp_path):
    path = tmp_path / "stream.arrow"
    path.write_bytes(data)
    return [io.BytesIO(data), path]


DOCUMENTS = st.lists(st.lists(st.integers(0, 299), max_size=9), max_size=6)
CALLS = st.lists(st.tuples(DOCUMENTS, st.sampled_from(["train", "val"])), max_size=5)


@settings(deadline=None)
@given(calls=CALLS, batch_tokens=st.integers(1, 30), loss_mask=st.booleans())
def test_documents_come_back_as_they_were_written(tmp_path_factory, calls, batch_tokens, loss_mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH_TOKENS", batch_tokens)
        data = stream_of(calls, loss_mask=loss_mask, split=True)
    expected = [(document, split) for documents, split in calls for document in documents]
    for source in sources(data, tmp_path_factory.mktemp("stream")):
        stream = read_stream(source)
        assert rows(stream) == expected
        assert stream.totals.rows == len(expected)
        assert stream.totals.tokens == sum(len(document) for document, _ in expected)
        for split, counts in stream.totals.splits.items():
            lengths = [len(document) for document, name in expected if name == split]
            assert (counts.rows, counts.documents, counts.tokens) == (len(lengths), len(lengths), sum(lengths))
    if loss_mask:
        for batch in read_stream(io.BytesIO(data)):
            assert batch.loss_mask.tolist() == (batch.ids % 2 == 0).tolist()


@settings(deadline=None)
@given(calls=CALLS, batch_tokens=st.integers(1, 30))
def test_the_content_hash_does_not_depend_on_calls_and_batches(calls, batch_tokens):
    def sha256(calls):
        stream = read_stream(io.BytesIO(stream_of(calls, split=True)))
        rows(stream)
        return stream.totals.sha256

    one_by_one = [([document], split) for documents, split in calls for document in documents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BATCH_TOKENS", batch_tokens)
        small = sha256(one_by_one)
    assert small == sha256(calls)
    assert small != sha256([*calls, ([[1]], "train")])


def test_a_stream_cut_at_any_byte_is_truncated_or_complete(tmp_path):
    data = stream_of([([[1, 2], [3]], "train"), ([[4]], "val")], loss_mask=True, split=True)
    whole = rows(read_stream(io.BytesIO(data)))
    path = tmp_path / "stream.arrow"
    path.write_bytes(data)
    complete = 0
    for length in reversed(range(len(data))):
        os.truncate(path, length)
        for source in (io.BytesIO(data[:length]), path):
            try:
                stream = read_stream(source)
                assert rows(stream) == whole
                assert stream.totals is not None
                complete += 1
            except UserError as error:
                assert "truncated stream" in error.message
    assert complete == 2 * 8  # only Arrow's own end marker may be missing, which says nothing that the totals do not


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated stream: it is empty"),
        (b"First Citizen:\n", "not a llmctl token stream"),
        (b"ARROW1\0\0" + bytes(100), "not a llmctl token stream"),
        (b"PAR1", "not a llmctl token stream"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f", "truncated stream"),
        (b"\xff\xff\xff\xff\x00\x00\x00\x00", "truncated stream"),
    ],
)
def test_foreign_bytes_are_refused(data, message, tmp_path):
    for source in sources(data, tmp_path):
        with pytest.raises(UserError, match=message):
            read_stream(source)


def rewritten(data, metadata=None, columns=lambda batch: batch):
    """The same stream with other metadata or columns."""
    reader = pa.ipc.open_stream(data)
    schema = columns(pa.record_batch([[]] * len(reader.schema), schema=reader.schema)).schema
    schema = schema.with_metadata({**reader.schema.metadata, **(metadata or {})})
    sink = io.BytesIO()
    writer = pa.ipc.new_stream(sink, schema)
    while True:
        try:
            batch, custom = reader.read_next_batch_with_custom_metadata()
        except StopIteration:
            return sink.getvalue()
        writer.write_batch(columns(batch).replace_schema_metadata(schema.metadata), custom_metadata=custom)


def test_an_arrow_stream_of_something_else_is_refused():
    sink = io.BytesIO()
    pa.ipc.new_stream(sink, pa.schema([("input_ids", pa.list_(pa.uint16()))])).close()
    with pytest.raises(UserError, match="without llmctl's metadata"):
        read_stream(io.BytesIO(sink.getvalue()))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({b"llmctl.version": b"9"}, "version 9, this llmctl reads version 1"),
        ({b"llmctl.tokenizer_json": b"{ }"}, "its header says"),
        ({b"llmctl.vocab_size": b"70000"}, "column input_ids of type list<item: uint16>"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(metadata, message):
    data = rewritten(stream_of([[[1]]]), metadata)
    with pytest.raises(UserError, match=message):
        read_stream(io.BytesIO(data))


def test_a_column_that_nobody_knows_is_refused():
    data = rewritten(
        stream_of([[[1]]]), columns=lambda batch: batch.append_column("x", pa.array([0] * len(batch), pa.int64()))
    )
    with pytest.raises(UserError, match="column x of type int64"):
        read_stream(io.BytesIO(data))


def test_two_streams_do_not_join(tmp_path):
    data = stream_of([[[1]]])
    for source in sources(data + data, tmp_path):
        with pytest.raises(UserError, match="bytes follow the end"):
            rows(read_stream(source))


def test_a_flipped_token_is_noticed(tmp_path):
    data = stream_of([[[7] * 40]])
    place = data.index(np.full(40, 7, np.uint16).tobytes())
    for source in sources(data[:place] + b"\x08" + data[place + 1 :], tmp_path):
        with pytest.raises(UserError, match="damaged"):
            rows(read_stream(source))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_have_the_narrower_type_that_holds_the_vocabulary(vocab_size, dtype):
    data = stream_of([[[0, vocab_size - 1]]], vocab_size)
    (batch,) = read_stream(io.BytesIO(data))
    assert batch.ids.dtype == dtype
    assert batch.ids.tolist() == [0, vocab_size - 1]


def test_an_id_beyond_the_vocabulary_is_not_written():
    writer = TokenStreamWriter(io.BytesIO(), tokenizer(10))
    with pytest.raises(UserError, match="token id 10 is beyond the tokenizer's vocabulary of 10"):
        writer.write(np.array([3, 10], np.uint32), np.array([0, 2]))


def test_a_document_may_go_on_in_the_next_batch():
    sink = io.BytesIO()
    writer = TokenStreamWriter(sink, tokenizer())
    writer.write(*flat([[1], [2]]))
    writer.write(*flat([[3], [4]]), continues=True)
    totals = writer.close()
    assert (totals.rows, totals.splits["train"].documents) == (4, 3)
    assert [batch.continues for batch in read_stream(io.BytesIO(sink.getvalue()))] == [False, True]


def test_a_file_is_mapped_and_not_copied(tmp_path):
    path = tmp_path / "big.arrow"
    path.write_bytes(stream_of([[[5] * 1_000_000]] * 4))
    before = pa.total_allocated_bytes()
    batches = list(read_stream(path, verify=False))
    assert [int(batch.ids[-1]) for batch in batches] == [5] * 4
    assert not any(batch.ids.flags.owndata for batch in batches)
    assert pa.total_allocated_bytes() - before < 100_000


def test_totals_hold_the_bytes_of_each_split():
    stream = read_stream(io.BytesIO(stream_of([([[1]], "train")], split=True, n_bytes={"train": 12})))
    rows(stream)
    assert stream.totals.splits["train"].bytes == 12


def test_the_stream_carries_its_tokenizer():
    sink = io.BytesIO()
    original = Tokenizer.bytes()
    TokenStreamWriter(sink, original).close()
    stream = read_stream(io.BytesIO(sink.getvalue()))
    assert stream.metadata.vocab_size == original.vocab_size
    assert stream.metadata.tokenizer_config == original.config
    assert stream.tokenizer().sha256 == original.sha256


def test_datasets_opens_the_file_as_it_is(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "stream.arrow"
    path.write_bytes(stream_of([([[1, 2], []], "train"), ([[3]], "val")], loss_mask=True, split=True))
    dataset = datasets.Dataset.from_file(str(path))
    assert dataset["input_ids"][:] == [[1, 2], [], [3]]
    assert dataset["split"][:] == ["train", "train", "val"]
    assert dataset["loss_mask"][:] == [[False, True], [], [False]]


def test_a_disk_that_fills_while_a_pipe_is_copied_is_no_fault_of_the_stream(tmp_path):
    copy = SimpleNamespace(name=str(tmp_path / "copy.arrow"))

    def no_room(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    copy.write = no_room
    source = SequentialSource(io.BytesIO(stream_of([[[1, 2]]])), copy_to=copy)
    with pytest.raises(UserError, match=f"standard input: cannot be copied to {tmp_path}: no space left on device"):
        list(read_stream(source))
