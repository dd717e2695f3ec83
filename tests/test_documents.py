"""From bytes to documents to rows of ids: however the work is cut into pieces, the result is that of the whole."""

from __future__ import annotations

import gzip
import io
import json
import re
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.data import chunks, documents, encoding, text
from llmctl.data.chunks import chunked, held_out, whole_documents
from llmctl.data.documents import DocumentReader
from llmctl.data.encoding import ChunkEncoder
from llmctl.data.inputs import find_inputs
from llmctl.data.prefetch import Prefetch
from llmctl.data.text import SEPARATORS, Group, split_text, valid_utf8
from llmctl.errors import CalledWrongly, UserError
from llmctl.stream_source import SequentialSource
from llmctl.tokenizer import Tokenizer

TEXTS = st.text(st.sampled_from("ab é字😀 \t\n\r\ufeff"), max_size=60)
BLOCKS = st.integers(1, 20)


def blocks_of(data, block, errors="strict"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", block)
        yield from valid_utf8(SequentialSource(io.BytesIO(data)), "x.txt", errors)


def documents_of(groups):
    """Whole documents as characters: parts are joined."""
    found, is_open = [], False
    for group in groups:
        texts = list(group.texts)
        assert group.continues == is_open
        if group.continues:
            found[-1] += texts.pop(0)
        found += texts
        is_open = group.unfinished
    assert not is_open
    return [each.decode() for each in found]


@given(content=TEXTS, block=BLOCKS)
def test_text_is_decoded_in_blocks_of_any_size(content, block):
    blocks = list(blocks_of(content.encode(), block))
    assert "".join(each.decode() for each in blocks) == content.removeprefix("\ufeff")


@given(before=TEXTS, after=TEXTS, block=BLOCKS)
def test_the_first_byte_that_is_not_utf8_is_named(before, after, block):
    data = before.encode() + b"\xff" + after.encode()
    with pytest.raises(UserError, match=f"x.txt: the byte 0xff at offset {len(before.encode())} is not UTF-8"):
        list(blocks_of(data, block))
    for errors in ("replace", "ignore"):
        expected = data.removeprefix(b"\xef\xbb\xbf").decode(errors=errors)
        assert b"".join(blocks_of(data, block, errors)).decode() == expected


def test_a_character_cut_off_by_the_end_is_not_utf8():
    with pytest.raises(UserError, match="the byte 0xe5 at offset 2"):
        list(blocks_of(b"ab\xe5\xad", 100))


def test_utf16_is_recognized():
    with pytest.raises(UserError) as raised:
        list(blocks_of("hello".encode("utf-16"), 100))
    assert "iconv -f UTF-16" in raised.value.hint


@given(content=TEXTS, block=BLOCKS, longest=st.integers(2, 30), kind=st.sampled_from(["file", "line", "blank-line"]))
def test_documents_do_not_depend_on_blocks(content, block, longest, kind):
    content = content.replace("\ufeff", "")
    separator = SEPARATORS[kind]
    whole = [content] if separator is None else re.split(separator.pattern.decode(), content)
    expected = [part.strip("\r\n") if separator else part for part in whole]
    expected = [part for part in expected if part if kind == "file" or not part.isspace()]
    blocks = list(blocks_of(content.encode(), block))
    assert documents_of(split_text(iter(blocks), separator)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK", block)
        patch.setattr(text, "LONGEST", longest)
        parts = documents_of(split_text(iter(blocks), separator))
    if kind == "file":
        assert parts == expected
    else:  # white space where a long document was cut may have looked like a separator's
        assert re.sub(r"\s", "", "".join(parts)) == re.sub(r"\s", "", "".join(expected))


WHITE = st.text(
    st.sampled_from("ab字é\x00\x7f \n\r\t\x0b\x1c\x1f\x85\xa0\u1680\u2003\u2028\u202f\u205f\u3000"), max_size=30
)


@given(content=WHITE)
def test_a_safe_cut_is_beside_a_lone_newline_or_space_between_words(content):
    safe = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
    places = [len(content[: match.start()].encode()) for match in safe.finditer(content)]
    data = content.encode()
    assert [match.start() for match in text._SAFE.finditer(data)] == places
    assert text.last_safe_cut(data) == (places[-1] if places else None)
    for start in range(len(data)):
        assert text.next_safe_cut(data, start) == next((place for place in places if place >= start), None)


def test_blank_lines_separate_and_inner_space_stays():
    content = "\n\na\n b\n\n\nc\r\n\r\n  d  \n \t\n\ne\n"
    assert documents_of(split_text(iter([content.encode()]), SEPARATORS["blank-line"])) == ["a\n b", "c", "  d  ", "e"]


GROUPS = st.lists(st.lists(st.text(st.sampled_from("aé字😀\n "), min_size=1, max_size=8), min_size=1, max_size=4))


@given(texts=GROUPS, share=st.floats(0.01, 0.99), joined=st.booleans())
def test_exactly_the_tail_is_held_out(texts, share, joined):
    """With `joined`, all groups are parts of one document: the cut may fall between two of them."""
    encoded = [[each.encode() for each in part] for part in texts]
    groups = [Group(part, joined and i > 0, joined and i + 1 < len(texts)) for i, part in enumerate(encoded)]
    if joined:
        groups = [Group(group.texts[:1], group.continues, group.unfinished) for group in groups]
    content = b"".join(text for group in groups for text in group.texts).decode()
    n_bytes = len(content.encode())
    start = n_bytes - round(n_bytes * share)
    if not 0 < start < n_bytes:
        return
    parts = list(held_out(groups, start))
    train = documents_of(group for group, split in parts if split == "train")
    val = documents_of(group for group, split in parts if split == "val")
    assert "".join(train) + "".join(val) == content
    # The cut is moved to the end of the character there, of at most four bytes.
    assert 0 <= len("".join(train).encode()) - start <= 3
    if joined:
        assert (len(train), len(val)) == (1, 1 if "".join(val) else len(val))


SENTENCES = (
    "It's 1999: the quick brown fox, naïve — 東京 and 🦊.\nNext line\n\n  indented\tcode()  \r\nend  of it. " * 40
)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe([SENTENCES], 400)


def groups_of(contents, block, monkeypatch):
    """The documents as they come from files that are read in blocks of so many bytes, all of whole characters."""
    monkeypatch.setattr(text, "BLOCK", block)
    return [group for each in contents for group in split_text(blocks_of(each.encode(), block), None)]


def rows_of(encoder, chunks_):
    found = []
    for chunk in chunks_:
        rows = encoder.encode(chunk)
        assert rows.sizes.sum() == chunk.n_bytes
        lists = [rows.ids[rows.offsets[i] : rows.offsets[i + 1]].tolist() for i in range(len(rows))]
        if rows.continues:
            found[-1] += lists.pop(0)
        found += lists
    return found


CONTENT = [SENTENCES, "short", SENTENCES * 2]


@pytest.mark.parametrize("piece", [1, 7, 64])
@pytest.mark.parametrize("block", [50, 400, 10**6])
def test_a_document_in_pieces_has_the_ids_of_the_whole(bpe, piece, block, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 900)
    monkeypatch.setattr(encoding, "PIECE", piece)
    monkeypatch.setattr(text, "_SEARCHED", 40)
    encoder = ChunkEncoder(bpe)
    assert encoder.cuts_exactly
    found = rows_of(encoder, chunked(groups_of(CONTENT, block, monkeypatch)))
    ids, offsets = bpe.encode_documents(CONTENT)
    assert found == [part.tolist() for part in np.split(ids, offsets[1:-1])]


@pytest.mark.parametrize("block", [50, 400, 10**6])
def test_a_tokenizer_that_minds_cuts_gets_documents_whole(data, block, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 900)
    llama = Tokenizer.load(data / "models" / "stories260K")
    encoder = ChunkEncoder(llama)
    ids, offsets = llama.encode_documents(CONTENT)
    groups = groups_of(CONTENT, block, monkeypatch)
    assert rows_of(encoder, whole_documents(chunked(groups))) == [
        part.tolist() for part in np.split(ids, offsets[1:-1])
    ]
    monkeypatch.setattr(chunks, "LONGEST", 1000)
    parts = list(whole_documents(chunked(groups)))
    assert (
        all(each.n_bytes for each in parts) and max(len(part) for each in parts for part in each.texts) < 1000 + block
    )
    groups = [Group([part], joined) for each in parts for part, joined in zip(each.texts, each.joined)]
    for group, after in zip(groups, groups[1:]):
        group.unfinished = after.continues
    assert documents_of(groups) == CONTENT


def test_a_tokenizer_that_marks_the_start_of_a_text_is_known_to_mind_cuts(data):
    llama = Tokenizer.load(data / "models" / "stories260K")
    encoder = ChunkEncoder(llama)
    assert not encoder.cuts_exactly


def test_bos_and_eos_stand_around_documents_and_not_around_pieces(data):
    llama = Tokenizer.load(data / "models" / "stories260K")
    encoder = ChunkEncoder(llama)
    (chunk,) = chunked([Group([b"once upon", b"a time"], unfinished=True), Group([b" there", b"was"], continues=True)])
    rows = encoder.encode(chunk)
    around, _ = llama.encode_documents([""])
    assert len(rows) == 3
    for number in range(3):
        row = rows.ids[rows.offsets[number] : rows.offsets[number + 1]].tolist()
        assert sum(row.count(token) for token in around) == len(around)


def reader_of(path, **options):
    return DocumentReader(find_inputs([str(path)]), **options)


def texts_of(path, **options):
    return documents_of(reader_of(path, **options))


def jsonl(texts, **more):
    return "".join(json.dumps({"id": i, "text": each, **more}) + "\n" for i, each in enumerate(texts)).encode()


STORIES = ["Once upon a time", "a\nb\n\nc", "naïve 🦊", "x" * 1000]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_every_form_is_read_compressed_or_not(tmp_path, kind, compress, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 100)
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": STORIES}), sink, row_group_size=3)
    data = {"txt": "\n".join(STORIES).encode(), "jsonl": jsonl(STORIES), "parquet": sink.getvalue()}[kind]
    suffix = {bytes: "", gzip.compress: ".gz"}.get(compress, ".zst")
    path = tmp_path / f"corpus.{kind}{suffix}"
    path.write_bytes(compress(data))
    reader = reader_of(path)
    assert documents_of(reader) == (["\n".join(STORIES)] if kind == "txt" else STORIES)
    assert reader.bytes_read >= (path.stat().st_size if kind != "parquet" else 1)
    assert documents_of(reader) == documents_of(reader)


def test_compressed_members_follow_each_other(tmp_path):
    path = tmp_path / "log.gz"
    path.write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))
    assert texts_of(path, split="line") == ["one", "two"]


@pytest.mark.parametrize("compress", [gzip.compress, lambda data: pa.compress(data, "zstd", asbytes=True)])
def test_a_damaged_compressed_file_is_named(tmp_path, compress):
    path = tmp_path / "corpus.txt.packed"
    path.write_bytes(compress(np.random.default_rng(0).bytes(1000).hex().encode())[:-30])
    with pytest.raises(UserError, match="corpus.txt.packed: truncated"):
        texts_of(path)


def test_a_line_without_the_field_is_named_with_its_keys(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["a"]) + b"\n" + b'{"body": 1, "title": 2}\n')
    with pytest.raises(UserError, match="corpus.jsonl:3: no field 'text'; the keys are 'body', 'title'"):
        texts_of(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "corpus.jsonl:2: not JSON: .* at column 13"),
        ('["text"]', "corpus.jsonl:2: expected a JSON object, got list"),
        ('{"text": 7}', "corpus.jsonl:2: the field 'text' is int, expected text"),
        ('{"text": null}', "corpus.jsonl:2: the field 'text' is NoneType"),
        ('{"text": "a\\ud83d"}', "corpus.jsonl:2: half of a surrogate pair at character 1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message, monkeypatch):
    monkeypatch.setattr(text, "BLOCK", 5)
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(jsonl(["a"]) + line.encode())
    with pytest.raises(UserError, match=message):
        texts_of(path)


def test_half_a_surrogate_pair_is_replaced_where_asked(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a\\ud83d!"}\n{"text": "\\ud83d\\ude00"}\n')
    assert texts_of(path, errors="replace") == ["a\ufffd!", "😀"]
    assert texts_of(path, errors="ignore") == ["a!", "😀"]


def test_another_field_and_empty_documents(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"body": "a"}\n{"body": ""}\n{"body": "b"}\n')
    reader = reader_of(path, field="body")
    assert documents_of(reader) == ["a", "b"]
    assert reader.n_empty == 1


def test_json_lines_are_recognized_in_a_file_without_a_suffix(tmp_path):
    (tmp_path / "pipe").write_bytes(jsonl(["a", "b"]))
    (tmp_path / "other").write_bytes(b'{"body": "a"}\n')
    (tmp_path / "corpus.txt").write_bytes(jsonl(["a"]))
    assert texts_of(tmp_path / "pipe") == ["a", "b"]
    assert texts_of(tmp_path / "other") == ['{"body": "a"}\n']
    assert texts_of(tmp_path / "corpus.txt") == [jsonl(["a"]).decode()]
    assert texts_of(tmp_path / "corpus.txt", split="jsonl") == ["a"]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"body": ["a"]}, {}, "no column 'text'; the columns are body"),
        ({"text": [1]}, {}, "the column 'text' is int64, expected text"),
        ({"text": ["a", None]}, {}, "row 1 holds no text"),
        ({"text": pa.array([b"a", b"\xff"])}, {}, "row 1: the byte at offset 0 is not UTF-8"),
    ],
)
def test_a_parquet_file_that_holds_no_text_is_named(tmp_path, table, options, message):
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table(table), path)
    with pytest.raises(UserError, match=f"corpus.parquet.*{message}"):
        texts_of(path, **options)


def test_parquet_takes_no_split_and_must_be_parquet(tmp_path):
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(CalledWrongly, match="--split line is for text"):
        texts_of(path, split="line")
    path.write_text("text\n")
    with pytest.raises(UserError, match="not a parquet file"):
        texts_of(path)
    path.write_bytes(b"PAR1\x15" + bytes(50))
    with pytest.raises(UserError, match="not a parquet file"):
        texts_of(path)


def test_parquet_rows_come_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_ROWS", 2)
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": list("abcde")}), path)
    assert [group.texts for group in reader_of(path)] == [[b"a", b"b"], [b"c", b"d"], [b"e"]]


@settings(deadline=None)
@given(items=st.lists(st.integers()), depth=st.integers(1, 4))
def test_prefetched_items_come_in_order(items, depth):
    with Prefetch(items, depth=depth) as source, Prefetch(source, str, depth, source) as results:
        assert list(results) == [str(item) for item in items]


def test_an_error_in_another_thread_is_raised_where_the_items_are_used():
    def items():
        yield 1
        raise UserError("torn")

    with Prefetch(items()) as source, Prefetch(source, source=source) as results:
        assert next(results) == 1
        with pytest.raises(UserError, match="torn"):
            next(results)


def test_no_work_goes_on_after_the_block():
    running = threading.Event()

    def work(item):
        running.set()
        time.sleep(0.01)
        running.clear()
        return item

    with Prefetch(iter(int, 1)) as source, Prefetch(map(str, source), work, source=source) as results:
        next(results)
    for _ in range(5):
        assert not running.is_set()
        time.sleep(0.01)


def test_a_source_that_never_answers_does_not_hold_up_the_end():
    waiting = threading.Event()
    started = time.monotonic()
    with Prefetch(iter(waiting.wait, False)) as source, Prefetch(map(str, source), str, source=source):
        pass
    assert time.monotonic() - started < 10
    waiting.set()
