"""Rows of every form and format to batches: nothing lost, nothing twice, and errors that name the place."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.data.inputs import find_inputs
from llmctl.data.masking import Masking
from llmctl.data.masking_settings import MaskingSettings
from llmctl.data.packing import IGNORE
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.data import json_array, rows
from llmctl.finetune.data.batches import ExampleBatch, PackedExamples, PaddedExamples, Seq2SeqBatch
from llmctl.finetune.data.fitting import best_fit
from llmctl.finetune.data.forms import Chat, Completion, Preference, Rated, default_objective, recognize, renamed
from llmctl.finetune.data.mixing import Mixture
from llmctl.finetune.data.prepare import prepare
from llmctl.finetune.data.settings import DataSettings
from llmctl.finetune.data.sources import Source, parse_sources
from llmctl.finetune.data.store import ExampleSet
from llmctl.models.initialization import new_model
from llmctl.models.shapes import for_parameters
from llmctl.streams import TokenStreamWriter
from llmctl.tokenizer import Tokenizer
from llmctl.train.feed import Feed
from llmctl.train.objectives import NextToken

BYTES = Tokenizer.bytes()
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}


def read(path):
    (source,) = find_inputs([str(path)])
    return list(rows.read_rows(source))


def write_jsonl(path, items):
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    return path


def prepared(tmp_path, items, seq_len=128, name="rows.jsonl", **options) -> ExampleSet:
    """The set of the rows `items`; files for --val-data come as lists too."""
    path = write_jsonl(tmp_path / name, items)
    held_out = []
    for number, each in enumerate(options.pop("val_data", ())):
        held_out.append(str(write_jsonl(tmp_path / f"val-{number}.jsonl", each)))
    options = {"val_fraction": None if held_out else 0.0, "val_data": tuple(held_out), **options}
    sources = parse_sources([str(path)], options["val_data"])
    return prepare(sources, DataSettings(**options), BYTES, tmp_path / f"set-{name}", seq_len=seq_len)


# --- formats ---

FIELDS = st.fixed_dictionaries({"prompt": st.text(max_size=20), "completion": st.text(max_size=20)})
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")


def encoded(items, format_name) -> bytes:
    if format_name == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(items), sink)
        return sink.getvalue()
    if format_name in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(items[0]), delimiter=",\t"[format_name == "tsv"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(items)
        return text.getvalue().encode()
    if format_name == "json":
        return json.dumps(items, indent=1, ensure_ascii=False).encode()
    return "".join(json.dumps(item) + "\n" for item in items).encode()


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(FIELDS, min_size=1, max_size=12),
    format_name=st.sampled_from(FORMATS),
    block=st.sampled_from([7, 64, 1 << 18]),
    compression=st.sampled_from(["", "gz", "zst"]),
)
def test_rows_come_back_from_every_format(tmp_path_factory, items, format_name, block, compression):
    if format_name in ("csv", "tsv"):  # the csv module cannot tell these ends of lines apart
        items = [{key: text.replace("\r", " ").replace("\0", "") for key, text in item.items()} for item in items]
    data = encoded(items, format_name)
    data = gzip.compress(data) if compression == "gz" else data
    data = pa.compress(data, "zstd", asbytes=True) if compression == "zst" else data
    path = tmp_path_factory.mktemp("rows") / f"rows.{format_name}{'.' if compression else ''}{compression}"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", max(block, 64))
        patch.setattr(json_array, "BLOCK", block)
        assert [row.fields for row in read(path)] == items


def test_an_array_larger_than_the_window_needs_no_more_memory(tmp_path):
    item = json.dumps({"text": "x" * 1000})
    path = tmp_path / "big.json"
    path.write_text("[" + ",\n".join([item] * 20_000) + "]")
    (source,) = find_inputs([str(path)])
    tracemalloc.start()
    n_rows = sum(1 for _ in rows.read_rows(source))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_rows == 20_000 and peak < path.stat().st_size / 4


def test_a_parquet_row_has_no_nulls(tmp_path):
    table = pa.Table.from_pylist([{"text": "a", "label": None}, {"text": "b", "label": 1}])
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row.fields for row in read(tmp_path / "rows.parquet")] == [{"text": "a"}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(
    ("name", "data", "place", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl:3", "not JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl:2", "expected a JSON object, got list"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1", "the byte 0xff at column 11 is not UTF-8"),
        ("a.csv", b"text,label\na,1\nb\n", "a.csv:3", "1 cells, the header has 2"),
        ("a.csv", b'text\n"a\nb"\n"c"x\n', "a.csv:4", "not a row of CSV"),
        ("a.csv", b"text\na\nb\xe9\n", "a.csv:3", "the byte 0xe9 is not UTF-8"),
        ("a.json", b'[{"text": "a"},\n 5]', "a.json:2", "expected a JSON object, got int"),
    ],
)
def test_a_row_that_does_not_parse_names_its_place(tmp_path, name, data, place, message):
    (tmp_path / name).write_bytes(data)
    (bad,) = [row for row in read(tmp_path / name) if row.error]
    assert bad.place.endswith(place) and message in bad.error.message


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "a.json:2: not JSON: Expecting ':'"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "a.json:2: the array does not end"),
        ("a.json", b'[{"text": "a"}]\nx', "a.json:2: something follows the array"),
        ("a.json", b'[{"text": "a"} {}]', "a.json:1: expected a comma"),
        ("a.txt", b"some words\n", "neither JSON, CSV, TSV, parquet nor a token stream"),
        ("a.csv", b"text,label,text\na,b,c\n", "a.csv:1: the header has 'text' twice"),
        ("a.csv", b"te\xe9t\na\n", "a.csv:1: the byte 0xe9 is not UTF-8"),
        ("a.parquet", b"PAR1nothing", "not a parquet file"),
        ("a.arrow", b"\xff\xff\xff\xff\x00", "truncated stream"),
    ],
)
def test_a_file_that_cannot_be_read_on(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert message in caught.value.message


# --- forms ---


def value_of(row, objective=None):
    return recognize(row, objective).build(row)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi", "input": "", "output": "Hello."},
    ],
)  # fmt: skip
def test_forms_of_one_conversation_agree(row):
    assert value_of(row) == Chat([USER, ASSISTANT]) and default_objective(row) == "sft"


def test_instructions_carry_their_input_and_system():
    row = {"instruction": "Translate.", "input": "Hi", "output": "Salut", "system": "Be brief."}
    system, user, _ = value_of(row).messages
    assert system == {"role": "system", "content": "Be brief."} and user["content"] == "Translate.\n\nHi"


def test_comparisons_of_answers():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert value_of(plain) == Preference(Completion("a", "b"), Completion("a", "c"))
    assert default_objective(plain) == "dpo"
    turns = Preference(
        Chat([USER, ASSISTANT], n_prompt=1), Chat([USER, {"role": "assistant", "content": "No."}], n_prompt=1)
    )
    assert value_of({"prompt": [USER], "chosen": [ASSISTANT], "rejected": "No."}).chosen == turns.chosen
    assert value_of({"instruction": "Hi", "output": "x", "chosen": "Hello.", "rejected": "No."}) == turns
    assert value_of({"chosen": turns.chosen.messages, "rejected": turns.rejected.messages}) == turns
    rated = value_of({"prompt": "a", "completion": "b", "label": "False"})
    assert rated == Rated(Completion("a", "b"), False)


def test_an_objective_chooses_among_the_forms_of_a_row():
    row = {"instruction": "Hi", "output": "Hello.", "chosen": "a", "rejected": "b"}
    assert recognize(row, "sft").name == "instruction + output" and recognize(row, None).name == "chosen + rejected"
    assert recognize({"text": "a", "label": 1}, "mlm").name == "text"
    assert default_objective({"text": "a", "label": 1}) == "classify"
    assert (
        default_objective({"text": "a", "label": 1.5}) == default_objective({"text": "a", "label": "1.5"}) == "regress"
    )
    assert default_objective({"prompt": "a", "completion": "b", "label": True}) == "kto"
    with pytest.raises(UserError, match="'text'; the objective dpo needs chosen \\+ rejected"):
        recognize({"text": "a"}, "dpo")


def test_tool_calls_have_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "1", "content": "2"}, ASSISTANT],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }  # fmt: skip
    chat = value_of(row)
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert chat.tools[0]["function"]["name"] == "add"
    shared = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
              {"from": "observation", "value": "2"}, {"from": "gpt", "value": "Hello."}]  # fmt: skip
    calls = value_of({"conversations": shared}).messages[1]["tool_calls"]
    assert calls == [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASSISTANT, USER]}, r"roles out of order: turn 1 \(assistant\) comes first"),
        ({"messages": [USER, USER]}, r"roles out of order: turn 2 \(user\) follows user"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, r"turn 2 \(system\) follows user"),
        ({"messages": [USER, ASSISTANT, {"role": "tool", "content": "x"}]}, "answers no tool call"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": []}, "an empty list"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the assistant's turn is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "part of type 'image_url'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
        ({"instruction": "a", "output": " "}, "output: is empty"),
        ({"prompt": 3, "completion": "a"}, "expected a list of turns, got int"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "expected true or false, got 'maybe'"),
        ({"question": "a"}, "the keys are 'question'; no known form"),
    ],
)  # fmt: skip
def test_rows_that_are_no_examples(row, message):
    with pytest.raises(UserError, match=message):
        value_of(row)


def test_columns_are_renamed():
    row = {"question": "a", "answer": "b", "id": 1}
    columns = {"prompt": "question", "completion": "answer"}
    assert renamed(row, columns) == {"prompt": "a", "completion": "b", "id": 1}
    with pytest.raises(UserError, match="no column 'quest'") as caught:
        renamed(row, {"prompt": "quest"})
    assert "did you mean question" in caught.value.hint


# --- sets ---

LETTERS = [{"prompt": f"{number:03} is", "completion": " " + "x" * (number % 50 + 1)} for number in range(100)]


def test_a_set_holds_all_rows_and_opens_again(tmp_path):
    examples = prepared(tmp_path, LETTERS)
    again = ExampleSet(tmp_path / "set-rows.jsonl")
    assert len(examples) == len(again) == 100 and examples.sha256 == again.sha256
    for number, row in enumerate(LETTERS):
        (tokens,) = again.read(number)
        assert BYTES.decode(tokens.ids, skip_special_tokens=False) == f"{row['prompt']}{row['completion']}<|endoftext|>"
        assert BYTES.decode(tokens.ids[tokens.learned]) == row["completion"] and tokens.learned[-1]
    assert again.tokenizer.chat_template is None  # no row needed one


def test_another_order_or_content_is_another_set(tmp_path):
    prints = {
        prepared(tmp_path, items, name=f"{i}.jsonl").sha256
        for i, items in enumerate([LETTERS, LETTERS[::-1], LETTERS[:-1]])
    }
    assert len(prints) == 3


def test_the_plain_template_is_saved_with_a_set_that_needs_it(tmp_path):
    assert "Assistant:" in prepared(tmp_path, [{"messages": [USER, ASSISTANT]}]).tokenizer.chat_template


def test_long_examples(tmp_path):
    skipped = prepared(tmp_path, LETTERS, seq_len=40, name="skip.jsonl")
    assert 0 < len(skipped) < 100 and skipped.lengths(skipped.train[0]).max() <= 40
    assert skipped.summary["files"][0]["long"] == 100 - len(skipped)
    cut = prepared(tmp_path, LETTERS, seq_len=40, on_long="truncate", name="cut.jsonl")
    assert len(cut) == 100 and cut.lengths(cut.train[0]).max() == 40
    with pytest.raises(UserError, match=r"error.jsonl:33: 41 tokens, the limit is 40"):
        prepared(tmp_path, LETTERS, seq_len=40, on_long="error", name="error.jsonl")
    with pytest.raises(UserError, match="no example to train on in 100 rows: 100 too long"):
        prepared(tmp_path, LETTERS, seq_len=5, name="none.jsonl")
    # of a long prompt nothing is left to learn
    only_prompt = [{"prompt": "x" * 50, "completion": "y"}, *LETTERS[:1]]
    assert len(prepared(tmp_path, only_prompt, seq_len=20, on_long="truncate", name="prompt.jsonl")) == 1


def test_bad_rows_end_it_or_are_counted(tmp_path, caplog):
    items = [LETTERS[0], {"messages": [USER, USER]}, {"nothing": 1}, {"messages": [USER]}]
    with pytest.raises(UserError, match=r"rows.jsonl:2: roles out of order") as caught:
        prepared(tmp_path, items)
    assert "--skip-bad" in caught.value.hint
    with pytest.raises(UserError, match=r"rows.jsonl:2: no token of it is learned"):
        prepared(tmp_path, [items[0], items[3]])
    examples = prepared(tmp_path, items, skip_bad=True)
    assert len(examples) == 1 and "2 of 4 rows cannot be used; the first: " in caplog.text
    assert "1 examples have no learned token" in caplog.text
    with pytest.raises(UserError, match="no example to train on in 2 rows: 2 cannot be used"):
        prepared(tmp_path, items[1:3], skip_bad=True, name="bad.jsonl")
    with pytest.raises(UserError, match="rows.jsonl:1: the keys are 'nothing'"):
        prepared(tmp_path, items[2:], objective=None)
    assert prepared(tmp_path, items[::-1], objective=None, skip_bad=True, name="last.jsonl").objective == "sft"
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no example to train on in 0 rows"):
        prepared(tmp_path, [], name="empty.jsonl")


def test_held_out_rows_and_their_duplicates(tmp_path, caplog):
    examples = prepared(tmp_path, LETTERS[:50] * 2, val_fraction=0.2, name="twice.jsonl")
    texts = [bytes(examples.read(number)[0].ids.astype(np.uint16)) for number in range(100)]
    train, val = ({texts[i] for i in numbers} for numbers in (examples.train[0], examples.val))
    assert len(examples.val) == 20 and not train & val and examples.summary["duplicates"] == 50
    other = prepared(tmp_path, LETTERS[:50], val_fraction=0.2, name="once.jsonl")
    assert {bytes(other.read(i)[0].ids.astype(np.uint16)) for i in other.val} == val  # whatever else is there
    given_rows = prepared(tmp_path, LETTERS[:50], val_data=[LETTERS[50:60]], name="given.jsonl")
    assert given_rows.val.tolist() == list(range(50, 60))
    assert len(prepared(tmp_path, LETTERS, val_fraction=None, name="default.jsonl").val) == 10
    assert "also trained on" not in caplog.text
    with pytest.raises(UserError, match="20 rows: 20 held out") as caught:
        prepared(tmp_path, LETTERS[:1] * 20, val_fraction=None, name="same.jsonl")
    assert "--val-fraction 0" in caught.value.hint
    prepared(tmp_path, LETTERS[:50], val_data=[LETTERS[48:52]], name="leak.jsonl")
    assert "2 of the 4 held-out examples are also trained on" in caplog.text


def test_a_template_that_fails_names_the_row(tmp_path):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"rows.jsonl:2: the chat template leaves out turn 2 \(assistant\)"):
        prepared(tmp_path, [LETTERS[0], {"messages": [USER, ASSISTANT]}], chat_template=template)
    with pytest.raises(UserError, match="rows.jsonl:1: the chat template is broken") as caught:
        prepared(tmp_path, [{"messages": [USER, ASSISTANT]}], chat_template="{% for m in messages %}")
    assert "--chat-template" in caught.value.hint


def test_classes(tmp_path):
    items = [{"text": f"text {i}", "label": label} for i, label in enumerate(["10", "9", "10", "2"])]
    examples = prepared(tmp_path, items, name="numbers.jsonl")
    assert (examples.objective, examples.label_names) == ("classify", ["2", "9", "10"])
    assert examples.labels.tolist() == [2, 1, 2, 0]
    sets = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["z"]}]
    assert prepared(tmp_path, sets, name="sets.jsonl").labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    with pytest.raises(
        UserError, match=r"val-0.jsonl:1: the label '7' is unseen in training, which has '10', '9', '2'"
    ):
        prepared(tmp_path, items, val_data=[[{"text": "t", "label": 7}]], name="unseen.jsonl")
    some = [{"text": "t", "label": 7}, {"text": "u", "label": 9}]
    assert len(prepared(tmp_path, items, val_data=[some], skip_bad=True, name="skipped.jsonl").val) == 1
    # of one row of a class none is held out
    rare = [{"text": f"t{i}", "label": "rare" if i == 5 else "usual"} for i in range(20)]
    examples = prepared(tmp_path, rare, val_fraction=0.9, name="rare.jsonl")
    assert set(examples.labels[examples.val]) <= set(examples.labels[examples.train[0]])


def test_measures(tmp_path):
    items = [{"text": "a", "label": 1.5}, {"text": "b", "label": "-2"}]
    assert prepared(tmp_path, items).labels.tolist() == [1.5, -2.0]
    for label in ("high", "nan"):
        with pytest.raises(UserError, match=f"more.jsonl:3: label: expected a (finite )?number, got '{label}'"):
            prepared(tmp_path, [*items, {"text": "c", "label": label}], name="more.jsonl")


def test_a_token_stream_keeps_its_documents_masks_and_split(tmp_path, monkeypatch):
    monkeypatch.setattr("llmctl.streams.BATCH_TOKENS", 10)
    random = np.random.default_rng(0)
    documents = [random.integers(0, 256, length) for length in (3, 25, 1, 12, 8)]
    masks = [random.random(len(document)) < 0.7 for document in documents]
    path = tmp_path / "tokens.arrow"
    with open(path, "wb") as sink:
        writer = TokenStreamWriter(sink, BYTES, loss_mask=True, split=True)
        for number, (ids, mask) in enumerate(zip(documents, masks)):
            for start in range(0, len(ids), 7):  # parts of a document that stream in one after the other
                part = slice(start, start + 7)
                offsets = np.array([0, len(ids[part])])
                split = "val" if number == 4 else "train"
                writer.write(ids[part], offsets, loss_mask=mask[part], continues=start > 0, split=split)
        writer.close()
    examples = prepare([Source(str(path))], DataSettings(skip_bad=True), BYTES, tmp_path / "set", seq_len=64)
    kept = [i for i, mask in enumerate(masks) if mask[1:].any()]
    assert examples.objective == "causal" and examples.val.tolist() == [len(kept) - 1]
    for number, i in enumerate(kept):
        (tokens,) = examples.read(number)
        assert tokens.ids.tolist() == documents[i].tolist()
        assert tokens.learned.tolist() == [False, *masks[i][1:].tolist()]
    other = Tokenizer.train_bpe(["some text"], 260)
    with pytest.raises(UserError, match="made with another tokenizer"):
        prepare([Source(str(path))], DataSettings(), other, tmp_path / "other", seq_len=64)


def test_weights_are_for_all_files_or_none(tmp_path):
    (tmp_path / "a:2").write_text("")
    assert parse_sources(["a:0.7", "b.jsonl:3"]) == [Source("a", 0.7), Source("b.jsonl", 3.0)]
    assert parse_sources([str(tmp_path / "a:2")], ("v",)) == [Source(str(tmp_path / "a:2")), Source("v", None, True)]
    for words in (["a:0.7", "b"], ["a:0"], ["a:nan"], ["-", "-"]):
        with pytest.raises(CalledWrongly):
            parse_sources(words)


# --- order and batches ---


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5))
def test_without_weights_an_epoch_visits_everything_once(sizes, seed):
    mixture = Mixture(sizes, None, seed)
    everything = sorted((source, index) for source, size in enumerate(sizes) for index in range(size))
    for epoch in range(3):
        assert sorted(mixture.at(epoch * mixture.size + i) for i in range(mixture.size)) == everything


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 9)), min_size=2, max_size=4), st.integers(0, 5))
def test_weights_are_kept_everywhere_and_each_source_has_its_own_epochs(sources, seed):
    sizes, weights = zip(*sources)
    mixture = Mixture(sizes, weights, seed)
    drawn = [mixture.at(number) for number in range(200)]
    for source, (size, weight) in enumerate(sources):
        mine = [index for which, index in drawn if which == source]
        for length in (10, 50, 200):
            number = sum(which == source for which, _ in drawn[:length])
            assert abs(number - length * weight / sum(weights)) <= len(sources) / 2 + 0.01
        for epoch in range(len(mine) // size):
            assert sorted(mine[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=60))
def test_best_fit_loses_nothing_and_wastes_little(lengths):
    packed = [row.tolist() for row in best_fit(np.array(lengths, np.int64), 20)]
    assert sorted(item for row in packed for item in row) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in row) for row in packed]
    assert all(total <= 20 for total in sums)
    assert len(packed) <= 11 / 9 * -(-sum(lengths) // 20) + 2 or max(lengths) > 6
    with pytest.raises(ValueError, match="does not fit"):
        best_fit(np.array([21]), 20)


def pairs_learned(batch):
    """(input so far within the document, target) of every learned position."""
    found = []
    for row, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets)):
        documents = getattr(batch, "documents", None)
        documents = np.zeros_like(inputs) if documents is None else documents[row]
        for place in np.flatnonzero(targets != IGNORE):
            own = inputs[: place + 1][documents[: place + 1] == documents[place]]
            found.append((tuple(own.tolist()), int(targets[place])))
    return sorted(found)


def pairs_of(examples, numbers):
    found = []
    for number in numbers:
        for tokens in examples.read(int(number)):
            found += [(tuple(tokens.ids[:i].tolist()), int(tokens.ids[i])) for i in np.flatnonzero(tokens.learned)]
    return sorted(found)


def test_an_epoch_of_packed_rows_learns_every_target_once_from_its_own_example(tmp_path):
    examples = prepared(tmp_path, LETTERS, val_fraction=0.2)
    packed = PackedExamples(examples, "train", 128, seed=3)
    assert pairs_learned(packed.train_batch(0, packed.rows_per_epoch)) == pairs_of(examples, examples.train[0])
    held_out = sum((pairs_learned(batch) for batch in PackedExamples(examples, "val", 128).validation_batches(3)), [])
    assert sorted(held_out) == pairs_of(examples, examples.val)
    whole = packed.train_batch(5, 7)
    again = PackedExamples(ExampleSet(tmp_path / "set-rows.jsonl"), "train", 128, seed=3)
    for number in range(7):
        assert np.array_equal(again.train_batch(5 + number, 1).inputs[0], whole.inputs[number])


def test_padded_batches_are_of_like_length_and_visit_everything(tmp_path):
    examples = prepared(tmp_path, LETTERS[:96])
    padded = PaddedExamples(examples, "train", 6, seed=1)
    batches = [padded.train_batch(step * 6, 6) for step in range(16)]
    assert sorted(sum((pairs_learned(batch) for batch in batches), [])) == pairs_of(examples, examples.train[0])
    widths = [batch.inputs.shape[1] for batch in batches]
    assert sum(widths) * 6 < 1.1 * padded.n_tokens and widths != sorted(widths)
    again = PaddedExamples(examples, "train", 6, seed=1)
    assert np.array_equal(padded.train_batch(20, 3).inputs, again.train_batch(20, 3).inputs)


def test_comparisons_stand_in_the_two_halves_of_a_batch(tmp_path):
    items = [{"prompt": f"{i} ", "chosen": "good" + "d" * i, "rejected": "bad"} for i in range(8)]
    items.append({"prompt": "a", "chosen": "b", "rejected": "b"})
    examples = prepared(tmp_path, items)
    assert len(examples) == 8 and examples.summary["files"][0]["ties"] == 1
    batch = PaddedExamples(examples, "train", 4).train_batch(0, 4)
    texts = [BYTES.decode(row[:n]) for row, n in zip(batch.inputs, batch.lengths)]
    for chosen, rejected in zip(texts[:4], texts[4:]):
        assert chosen.split()[0] == rejected.split()[0] and "good" in chosen and "bad" in rejected
    assert batch.n_targets == 4 and batch.without_targets().n_targets == 0
    assert [tensor is None for tensor in batch.tensors(torch.device("cpu"))] == [False, False, False, True, False]
    assert {target for _, target in pairs_learned(batch)} == {*b"badgo", BYTES.eos_id}


def test_labels_go_with_their_rows(tmp_path):
    items = [{"text": "x" * (i + 1), "label": float(i + 1)} for i in range(20)]
    batch = PaddedExamples(prepared(tmp_path, items), "train", 5, pad_id=7).train_batch(0, 5)
    assert isinstance(batch, ExampleBatch) and batch.n_targets == 5 and (batch.targets == IGNORE).all()
    assert (batch.lengths == batch.labels).all()  # what a text ends with is learned only where it is written
    assert all((row[n:] == 7).all() for row, n in zip(batch.inputs, batch.lengths))
    rated = [{"prompt": "a", "completion": "b" * (i + 1), "label": i % 2 == 0} for i in range(6)]
    batch = PaddedExamples(prepared(tmp_path, rated, name="kto.jsonl"), "train", 3).train_batch(0, 3)
    assert [n % 2 for n in batch.lengths - 1] == batch.labels.tolist() and batch.n_targets == 3
    assert (batch.targets != IGNORE).sum() == batch.lengths.sum()


def test_seq2seq_rows(tmp_path):
    examples = prepared(tmp_path, LETTERS[:10], objective="seq2seq")
    batch = PaddedExamples(examples, "train", 10, decoder_start=9).train_batch(0, 10)
    assert isinstance(batch, Seq2SeqBatch) and (batch.inputs[:, 0] == 9).all()
    for row in range(10):
        source = BYTES.decode(batch.sources[row, : batch.source_lengths[row]])
        target = BYTES.decode(batch.targets[row][batch.targets[row] != IGNORE])
        assert {"prompt": source, "completion": target} in LETTERS[:10]
        n = (batch.targets[row] != IGNORE).sum()
        assert np.array_equal(batch.inputs[row, 1:n], batch.targets[row, : n - 1])


ATTENTION_PATHS = {
    "llama": ("llama", {}, True),
    "gpt2": ("gpt2", {}, True),
    "torch's own kernel": ("llama", {}, False),
    "capped scores": ("llama", {"softcap": 5.0}, True),
    "a window": ("llama", {"window": 16}, True),
}


@pytest.mark.parametrize("path", ATTENTION_PATHS)
def test_packed_loss_is_unpacked_loss(tmp_path, monkeypatch, path):
    family, mixer, is_blocked = ATTENTION_PATHS[path]
    if not is_blocked:
        monkeypatch.setattr("llmctl.ops.blocked_attention.applies", lambda *_: False)
    config = dataclasses.replace(for_parameters(family, 40_000, BYTES.vocab_size, 128), dropout=0.0)
    blocks = [dataclasses.replace(each, mixer=dataclasses.replace(each.mixer, **mixer)) for each in config.blocks]
    objective = NextToken(new_model(dataclasses.replace(config, blocks=tuple(blocks)), seed=0), z_loss=0.0)
    torch.manual_seed(0)
    for parameter in objective.parameters():  # those that start at zero would hide what flows through them
        torch.nn.init.normal_(parameter, 0, 0.1)

    def loss(rows_of_examples, n_rows):
        batch = rows_of_examples.train_batch(0, n_rows)
        with torch.no_grad():
            return float(objective(*batch.tensors(torch.device("cpu")))) / batch.n_targets

    examples = prepared(tmp_path, LETTERS[:24], seq_len=128)
    packed = PackedExamples(examples, "train", 128)
    assert packed.rows_per_epoch < 12
    alone = loss(PaddedExamples(examples, "train", 24), 24)
    assert loss(packed, packed.rows_per_epoch) == pytest.approx(alone, abs=1e-5)


def test_masked_rows_hold_whole_examples(tmp_path):
    tokenizer = Tokenizer.train_bpe([row["prompt"] for row in LETTERS], 300)
    special = {"id": 300, "content": "<mask>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
               "normalized": False}  # fmt: skip
    content = json.loads(tokenizer.json)
    content["added_tokens"].append(special)
    tokenizer = Tokenizer.from_json(json.dumps(content), {**tokenizer.config, "mask_token": "<mask>"})
    path = write_jsonl(tmp_path / "texts.jsonl", [{"text": row["prompt"] + row["completion"]} for row in LETTERS])
    examples = prepare([Source(str(path))], DataSettings(objective="mlm"), tokenizer, tmp_path / "set", seq_len=64)
    how = {"seed": 1, "masking": Masking(tokenizer, MaskingSettings())}
    rows_of_examples = PackedExamples(examples, "train", 64, **how)
    batch = rows_of_examples.train_batch(0, 8)
    again = PackedExamples(examples, "train", 64, **how).train_batch(3, 1)
    assert np.array_equal(again.inputs[0], batch.inputs[3]) and (batch.inputs == tokenizer.mask_id).any()
    learned = batch.targets != IGNORE
    assert 0.05 < learned.mean() < 0.3
    assert not np.array_equal(rows_of_examples.train_batch(rows_of_examples.rows_per_epoch, 8).inputs, batch.inputs)
    (first, *_), (second, *_) = ([b.inputs for b in rows_of_examples.validation_batches(4)] for _ in range(2))
    assert np.array_equal(first, second)


def test_rows_are_what_a_feed_takes(tmp_path):
    examples = prepared(tmp_path, LETTERS, val_fraction=0.2)
    plan = SimpleNamespace(batch_size=4, micro_batch_size=2)
    for make in (lambda split: PackedExamples(examples, split, 128), lambda split: PaddedExamples(examples, split, 4)):
        feed = Feed(make("train"), make("val"), plan)
        batches, n_targets = feed.micro_batches(3)
        assert len(batches) == 2 and n_targets == sum(batch.n_targets for batch in batches) > 0
        assert feed.n_val_tokens == sum(len(examples.read(number)[0].ids) for number in examples.val)
        assert sum(batch.n_targets for batch in feed.validation_batches()) == len(pairs_of(examples, examples.val))


# --- the command ---


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    BYTES.save(tmp_path / "model")
    return "model"


def test_inspect_data_shows_what_is_learned(llmctl, tmp_path, model):
    items = [{"messages": [USER, ASSISTANT]}] * 2 + [{"messages": [USER]}]
    path = write_jsonl(tmp_path / "chats.jsonl", items)
    path.write_text(path.read_text() + "{broken\n")
    result = llmctl("inspect-data", "chats.jsonl", "--model", model, "--show", 1)
    assert "User:\nHi\n\nAssistant:\n⟦Hello.<|endoftext|>⟧\n" in result.stdout
    assert "--- chats.jsonl:1 (messages): 30 tokens, 7 of them learned" in result.stdout
    assert "note: chats.jsonl:4: not JSON" in result.stderr
    records = [json.loads(line) for line in llmctl("inspect-data", "-", "--model", model, "--json",
                                                   input=path.read_text()).stdout.splitlines()]  # fmt: skip
    shown, summary = records[0], records[-1]
    assert (
        "".join(text for text, _ in shown["sequences"][0]["pieces"])
        == "User:\nHi\n\nAssistant:\nHello.<|endoftext|>\n\n"
    )
    expected = {"rows": 4, "examples": 3, "bad": 1, "untrained": 1, "duplicates": 1, "forms": {"messages": 3}}
    assert {key: summary[key] for key in expected} == expected
    assert sum(number for _, _, number in summary["lengths"]["histogram"]) == 3


def test_inspect_data_of_real_rows(llmctl, data):
    model = data / "models" / "stories260K"
    result = llmctl("inspect-data", data / "sft" / "preferences.jsonl", "--model", model, "--show", 1)
    assert "chosen): 128 tokens" in result.stdout and "dpo" in result.stderr
    fitness = data / "eval" / "avgfp-2000.jsonl"
    (summary,) = llmctl("inspect-data", fitness, "--model", model, "--show", 0, "--json").stdout.splitlines()
    summary = json.loads(summary)
    assert (summary["objective"], summary["rows"], summary["lengths"]["longest"]) == ("regress", 2000, 239)


def test_inspect_data_errors(llmctl, tmp_path, model):
    (tmp_path / "words.txt").write_text("some words")
    assert "neither JSON" in llmctl("inspect-data", "words.txt", "--model", model, code=1).stderr
    write_jsonl(tmp_path / "a.jsonl", LETTERS[:1])
    wrong = llmctl("inspect-data", "a.jsonl", "--model", model, "--columns", "promt=question", code=2)
    assert "did you mean prompt" in wrong.stderr
    assert "no known form" not in llmctl("inspect-data", "a.jsonl", "--model", model).stderr
    nothing = llmctl("inspect-data", "a.jsonl", "--model", model, "--objective", "dpo", code=1)
    assert "a.jsonl: no example in 1 rows" in nothing.stderr and "needs chosen + rejected" in nothing.stderr
