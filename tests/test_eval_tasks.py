"""The tasks that come along: public formats, prompts as lm-evaluation-harness makes them, and bad input."""

from __future__ import annotations

import dataclasses
import gzip
import json

import pytest
from eval_reference import SHIPPED, evaluate, hellaswag_rows, hugging_face, write_task

from llmctl.errors import UserError
from llmctl.evaluate import answers, rows, task
from llmctl.evaluate.judge import LanguageModelJudge
from llmctl.evaluate.prompts import Prompter, Style
from llmctl.evaluate.results import ResultsFile
from llmctl.evaluate.run import Evaluation
from llmctl.evaluate.settings import EvalSettings
from llmctl.evaluate.task import Extraction
from llmctl.generation.session import Session
from llmctl.tokenizer import Tokenizer

LETTERS = "ABCDE"
WORDS = "the cat sat on a mat and saw two dogs run by his red house".split()


def sentence(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(count))


def invented(name: str) -> list[dict]:
    """Rows as the public set has them on the Hugging Face hub, which is the form that the harness reads."""
    found = []
    for i in range(8):
        texts = [sentence(i + k, 3 + (i + k) % 4) for k in range(4)]
        found.append(
            {
                "hellaswag": {
                    "activity_label": "Sport",
                    "ctx_a": f"{sentence(i, 6)} [title] x.",
                    "ctx_b": "then HE",
                    "label": i % 4,
                    "endings": [f"{text}. [step] go  on" for text in texts],
                },
                "mmlu": {
                    "question": f" {sentence(i, 5)}? ",
                    "choices": texts,
                    "answer": i % 4,
                    "subject": "high_school_art",
                },
                "arc": {
                    "question": sentence(i, 5),
                    "answerKey": LETTERS[i % 4],
                    "choices": {"text": texts, "label": list("ABCD")},
                },
                "piqa": {"goal": sentence(i, 5), "sol1": texts[0], "sol2": texts[1], "label": i % 2},
                "winogrande": {
                    "sentence": f"{sentence(i, 4)} _ {texts[0]}.",
                    "option1": "Ann",
                    "option2": "Bob",
                    "answer": str(1 + i % 2),
                },
                "boolq": {"passage": sentence(i, 9), "question": sentence(i, 4), "label": i % 2},
                "gsm8k": {"question": sentence(i, 6) + "?", "answer": f"{texts[0]} <<1+1=2>>\n#### {i}"},
                "truthfulqa_mc1": {
                    "question": sentence(i, 5),
                    "mc1_targets": {"choices": texts, "labels": [1, 0, 0, 0]},
                },
                "truthfulqa_mc2": {
                    "question": sentence(i, 5),
                    "mc2_targets": {"choices": texts, "labels": [1, 0, 1, 0]},
                },
                "lambada": {"text": sentence(i, 12)},
                "sst2": {"sentence": sentence(i, 5) + " ", "label": i % 2},
            }[name]
        )
    return found


OVERRIDES = {
    "mmlu": {
        "description": "The following are multiple choice questions (with answers) about high school art.\n\n",
        "fewshot_config": {"sampler": "first_n"},
    }
}


@pytest.mark.parametrize("num_fewshot", [0, 2])
@pytest.mark.parametrize("name", SHIPPED)
def test_prompts_are_those_of_the_harness(name, num_fewshot, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    if name == "lambada" and num_fewshot:
        pytest.skip("the harness puts two spaces in front of an example's last word")
    content = invented(name)
    theirs = write_task(tmp_path, name, content, **OVERRIDES.get(name, {}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    reference = manager.load([theirs])["tasks"][theirs]
    reference.set_config("num_fewshot", num_fewshot)
    reference.set_fewshot_seed(1234)
    reference.build_all_requests()
    expected: dict[int, list[tuple]] = {}
    for request in reference.instances:
        expected.setdefault(request.doc_id, []).append(request.args)
    one = task.find(f"{name}={tmp_path / name}.jsonl")
    if one.form.lines:
        one = dataclasses.replace(one, form=rows.Form())
    # the harness leaves the asked row out of the examples only where both come from its test split
    is_test = SHIPPED[name][1] == "test"
    data = rows.read(one.data, one.form)
    items = list(Prompter(one, Style(num_fewshot), None, None if is_test else data).items(data))
    for item in items:
        if one.kind == "generation":
            assert item.contexts == [expected[item.number][0][0]]
        else:
            assert list(zip(item.contexts, item.continuations)) == [tuple(each) for each in expected[item.number]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hellaswag", "mmlu"])
def test_likelihoods_are_those_of_the_harness(name, data, tmp_path):
    pytest.importorskip("lm_eval")
    file = data / "eval" / {"hellaswag": "hellaswag-200.jsonl", "mmlu": "mmlu-dev.jsonl"}[name]
    content = hellaswag_rows(file) if name == "hellaswag" else [json.loads(line) for line in file.open()]
    content = [{**row, "answer": int(row["answer"])} if "answer" in row else row for row in content][:40]
    path = data / "models" / "stories260K"
    theirs = write_task(tmp_path, name, content, description=_MMLU_HEADER if name == "mmlu" else "")
    samples = evaluate(hugging_face(path), tmp_path, [theirs])["samples"][theirs]
    evaluation = Evaluation(path, EvalSettings(on_long="truncate"))
    one = task.find(f"{name}={tmp_path / name}.jsonl")
    ours = evaluation.run(one, ResultsFile(None), print, lambda done, note: None)
    for record, sample in zip(ours.records, samples, strict=True):
        assert record["scores"]["acc"] == sample["acc"]
        assert record["logprobs"] == pytest.approx([float(each[0][0]) for each in sample["resps"]], abs=1e-3)


_MMLU_HEADER = "The following are multiple choice questions (with answers) about {{ subject.replace('_', ' ') }}.\n\n"


def items_of(name: str, path, **style):
    one = task.find(f"{name}={path}")
    return list(Prompter(one, Style(num_fewshot=0, **style), None).items(rows.read(one.data, one.form)))


def test_the_original_files_of_the_sets(tmp_path):
    """The forms that their authors publish, where these are not those of the hub."""

    def write(name: str, text: str):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    (folder := tmp_path / "test").mkdir()
    (folder / "high_school_art_test.csv").write_text('"What, then?",one,two,three,four,C\n')
    (item,) = items_of("mmlu", folder)
    assert item.answer == 2 and item.group == "high_school_art" and "about high school art." in item.contexts[0]
    stem = {"stem": "Why?", "choices": [{"text": "so", "label": "1"}, {"text": "no", "label": "2"}]}
    (item,) = items_of("arc", write("arc.jsonl", json.dumps({"question": stem, "answerKey": "2"})))
    assert (item.choices, item.answer) == (["so", "no"], 1)
    write("valid-labels.lst", "1\n0\n")
    solutions = "".join(json.dumps({"goal": "g", "sol1": "a", "sol2": f"b{i}"}) + "\n" for i in range(2))
    assert [item.answer for item in items_of("piqa", write("valid.jsonl", solutions))] == [1, 0]
    (item,) = items_of("boolq", write("b.jsonl", '{"question": "q", "title": "t", "answer": true, "passage": "p"}'))
    assert item.answer == 1
    targets = {"mc1_targets": {"x": 0, "y": 1}, "mc2_targets": {"x": 0, "y": 1, "z": 1}, "question": "q"}
    path = write("mc_task.json", json.dumps([targets]))
    assert items_of("truthfulqa_mc1", path)[0].answer == 1 and items_of("truthfulqa_mc2", path)[0].answer == [0, 1, 1]
    (item,) = items_of("lambada", write("lambada.txt", "it was the very end\n"))
    assert (item.contexts, item.continuations) == (["it was the very"], [" end"])
    assert [item.answer for item in items_of("sst2", write("dev.tsv", "sentence\tlabel\nfine \t1\nbad \t0\n"))] == [
        1,
        0,
    ]
    qas = [{"question": "who?", "id": "1", "answers": [{"text": "Ann", "answer_start": 0}]}]
    squad = {"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "Ann came.", "qas": qas}]}]}
    (item,) = items_of("squad", write("dev-v1.1.json", json.dumps(squad)))
    assert item.answer == ["Ann"] and item.contexts == [
        "Title: T\n\nBackground: Ann came.\n\nQuestion: who?\n\nAnswer:"
    ]
    problem = {
        "task_id": "1",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(g): pass",
        "canonical_solution": "",
    }
    assert items_of("humaneval", write("HumanEval.jsonl.gz", json.dumps(problem)))[0].contexts == ["def f():\n"]


def test_every_shipped_task_is_a_task():
    assert {each.name for each in task.shipped()} >= {*SHIPPED, "squad", "humaneval"}


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"ctx": "a", "ending": ["b"], "label": 0}\n')
    with pytest.raises(UserError, match="rows.jsonl:1: there is no column 'endings'") as raised:
        items_of("hellaswag", tmp_path / "rows.jsonl")
    assert raised.value.hint == "its columns are ctx, ending, label"


@pytest.mark.parametrize("label", [4, "5", "none", None])
def test_an_answer_outside_the_choices(tmp_path, label):
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "q", "choices": list("abcd"), "answer": label, "subject": "s"})
    )
    with pytest.raises(UserError, match="is none of the choices"):
        items_of("mmlu", tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"prompt": "x"}, "kind is None"),
        ({"kind": "generation"}, "needs 'prompt'"),
        ({"kind": "multiple_choice", "prompt": "x", "answer": 1}, "needs 'choices'"),
        ({"kind": "generation", "prompt": "x", "stops": []}, "unknown key 'stops'"),
        ({"kind": "generation", "prompt": "x", "fewshot": {"sampler": "last"}}, "expected random or first"),
        ({"kind": "generation", "prompt": "x", "extract": {"a": {"pattern": "."}}}, "unknown key 'pattern'"),
        ([1], "expected keys and values"),
        ({"kind": ["generation"], "prompt": "x"}, r"kind is \['generation'\]"),
        ({"kind": "generation", "prompt": 3}, "prompt is 3; expected text"),
        ({"kind": "generation", "prompt": "x", "data": 4}, "data is 4; expected text"),
        ({"kind": "generation", "prompt": "x", "fewshot": 3}, "fewshot: expected keys and values, got 3"),
        ({"kind": "generation", "prompt": "x", "extract": 3}, "extract is 3; expected keys and values"),
        ({"kind": "generation", "prompt": "x", "extract": {"a": {}}}, "extract a: there is no 'regex'"),
        ({"kind": "generation", "prompt": "x", "extract": {"a": {"regex": "("}}}, "'[(]' is no regular expression"),
        ({"kind": "generation", "prompt": "x", "ignore": ["("]}, "'[(]' is no regular expression"),
        ({"kind": "generation", "prompt": "x", "num_fewshot": "2"}, "num_fewshot is '2'; expected a whole number"),
        ({"kind": "generation", "prompt": "x", "num_fewshot": True}, "num_fewshot is True; expected a whole number"),
        ({"kind": "generation", "prompt": "x", "num_fewshot": -1}, "num_fewshot is at least 0"),
        ({"kind": "generation", "prompt": "x", "seconds": "2"}, "seconds is '2'; expected a number"),
        ({"kind": "generation", "prompt": "x", "stop": 3}, "stop is 3; expected a list of texts"),
        ({"kind": "generation", "prompt": "x", "form": {"columns": 3}}, "form: columns is 3; expected a list of texts"),
        ({"kind": "generation", "prompt": "x", "metrics": ["acc"]}, "no metric 'acc' of a task of kind generation"),
        ({"kind": "generation", "prompt": "x", "metrics": ["pass@1"]}, "pass@1 needs 'code'"),
    ],
)
def test_a_task_file_that_is_wrong(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        task.load(tmp_path / "mine.yaml")


def test_one_text_is_a_list_of_one(tmp_path):
    content = {"kind": "generation", "prompt": "x", "stop": "Question", "metrics": "f1"}
    (tmp_path / "mine.yaml").write_text(json.dumps(content))
    one = task.load(tmp_path / "mine.yaml")
    assert (one.stop, one.metrics) == (("Question",), ("f1",))


@pytest.mark.parametrize(
    ("choices", "answer", "message"),
    [
        ("{{ text }}", 0, "the choices are 'left right'"),
        ("{{ both }}", 0, r"the choices are {'text': \['left'\]}"),
        ([], 0, r"the choices are \[\]"),
        (["a", "b"], 0.5, "the answer 0.5 is none of the choices"),
        (["a", "b"], "{{ [0, 0] }}", r"the labels \[0, 0\] mark no choice as right"),
    ],
)
def test_choices_that_are_none(choices, answer, message):
    one = task.Task(name="mine", kind="multiple_choice", prompt="{{ text }}", choices=choices, answer=answer)
    row = rows.DataRow(0, "rows:1", {"text": "left right", "both": {"text": ["left"]}})
    with pytest.raises(UserError, match=f"rows:1: {message}"):
        list(Prompter(one, Style(), None).items([row]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"kind": "regression", "answer": "abc"}, "rows:1: the answer 'abc' is no number"),
        ({"kind": "classification", "answer": "a"}, "has no 'choices', of which a language model takes the likeliest"),
    ],
)
def test_answers_that_cannot_be_judged(content, message, data):
    session = Session.open(data / "models" / "stories260K")
    one = task.Task(name="mine", prompt="x", **content)
    items = Prompter(one, Style(), None).items([rows.DataRow(0, "rows:1", {})])
    with pytest.raises(UserError, match=message):
        list(LanguageModelJudge(session).run(one, items))


def test_a_table_without_a_header(tmp_path):
    (tmp_path / "art_test.csv.gz").write_bytes(gzip.compress(b'[Which?],a,b,c,d,B\n"{x}",a,b,c,d,A\n'))
    assert [item.answer for item in items_of("mmlu", tmp_path / "art_test.csv.gz")] == [1, 0]
    (tmp_path / "bad.csv").write_bytes(b"q,a,b,c,d,A\nq,a\n")
    with pytest.raises(UserError, match="bad.csv:2: 2 cells, expected 6"):
        items_of("mmlu", tmp_path / "bad.csv")
    (tmp_path / "latin.csv").write_bytes(b"q,a,b,c,d,A\n\xff,a,b,c,d,A\n")
    with pytest.raises(UserError, match="latin.csv:2: the byte 0xff is not UTF-8"):
        items_of("mmlu", tmp_path / "latin.csv")


def test_examples_are_drawn_by_their_seed_and_are_never_the_question(tmp_path):
    lines = [json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    one = task.find(f"gsm8k={tmp_path / 'rows.jsonl'}")
    data = rows.read(one.data, one.form)

    def contexts(seed):
        return [item.contexts[0] for item in Prompter(one, Style(4, seed), None).items(data)]

    assert contexts(1) == contexts(1) != contexts(2)
    assert all(context.count(f"Question: q{i}\n") == 1 for i, context in enumerate(contexts(3)))
    with pytest.raises(UserError, match="9 examples were asked for, there are 8"):
        list(Prompter(one, Style(9), None).items(data))


def test_questions_as_a_chat(tmp_path):
    tokenizer = Tokenizer.bytes()
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
    )
    tokenizer = Tokenizer.from_json(tokenizer.json, {**tokenizer.config, "chat_template": template})
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"sentence": f"s{i}", "label": i % 2}) for i in range(3)))
    one = task.find(f"sst2={tmp_path / 'r.jsonl'}")
    data = rows.read(one.data, one.form)
    item = next(Prompter(one, Style(1, chat=True, system="Be brief."), tokenizer).items(data))
    assert item.contexts[0].startswith("<system>Be brief.<user>s") and item.contexts[0].endswith("Answer:<me>")
    assert "<assistant>" in item.contexts[0] and item.continuations == ["negative", "positive"]
    single = next(Prompter(one, Style(1, chat=True, multiturn=False), tokenizer).items(data)).contexts[0]
    assert single.count("<user>") == 1 and "<assistant>" not in single


def test_answers_are_extracted_and_compared():
    gsm = task.find("gsm8k")
    text = "So it is 3 + 4 = 7.\n#### 1,234\nThen 9 more"
    found = answers.rated(text, ["work\n#### 1234"], gsm)
    assert found == {"exact_match,strict-match": 1.0, "exact_match,flexible-extract": 0.0}
    assert answers.extracted("nothing", gsm.extract["strict-match"]) == "[invalid]"
    assert answers.extracted("a 1 b 2", Extraction(r"(x)|(\d)", -1)) == "2"
    assert (
        answers.f1("the big Cat.", ["a cat"]) == pytest.approx(2 / 3) and answers.squad_exact("The cat!", ["cat"]) == 1
    )
    assert answers.squad_exact("", []) == 1 and answers.f1("word", []) == 0


def test_generated_code_runs_in_the_sandbox():
    assert answers.passes("assert 1 + 1 == 2", 10)[0] == 1
    assert answers.passes("assert 1 + 1 == 3, 'no'", 10) == (0.0, "AssertionError: no")
    assert answers.passes("while True: pass", 0.5) == (0.0, "ran longer than 0.5 s")
