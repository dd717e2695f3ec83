"""Recipes: how they are read, and `llmctl run`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from llmctl.errors import CalledWrongly
from llmctl.recipe import load_mapping, load_steps

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def runs(path: Path) -> list[str]:
    """What the `copy` steps noted since the last look, in no order that concurrency would promise."""
    lines = sorted(path.read_text().splitlines()) if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_scalars_stay_as_written(write):
    path = write("lr: 1e-5\ncompile: on\nname: no\nn: 010\nnothing: null\nempty:\ntext: 'null'\nstop: [a, ~]\n")
    assert load_mapping(path) == {
        "lr": "1e-5",
        "compile": "on",
        "name": "no",
        "n": "010",
        "nothing": None,
        "empty": None,
        "text": "null",
        "stop": ["a", None],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\nsteps: 3\nlr: 2\n", ":3: duplicate key 'lr'"),
        ("lr: [1\n", ":2: "),
        ("- lr\n", ": expected keys, got a list"),
        ("", ": expected keys, got nothing"),
        ("just words", ": expected keys, got 'just words'"),
        ("? [a, b]\n: 1\n", ":1: a key must be a plain word"),
    ],
)
def test_what_is_no_mapping_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(CalledWrongly) as error:
        load_mapping(path)
    assert error.value.message.startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("lrr: 1\n", "unknown key 'lrr'", "did you mean lr?"),
        ("learning-rate: 1\nlearning_rate: 2\n", "'learning_rate' is given twice", None),
        ("lr: {a: 1}\n", "'lr' expects a value, got keys and values", None),
        ("lr: [1, 2]\n", "'learning_rate' expects one value, got 2", None),
        ("steps: []\n", "unknown key 'steps'", "a recipe of steps is run by: llmctl run r.yaml"),
    ],
)
def test_a_wrong_key_is_refused(llmctl, programs, write, text, message, hint):
    write(text)
    lines = llmctl("show", "--recipe", "r.yaml", code=2).stderr.splitlines()
    assert lines == [f"error: r.yaml: {message}"] + ([f"hint: {hint}"] if hint else [])


def test_a_flag_that_takes_several_takes_one(llmctl, programs, write):
    write("stop: a b")
    assert json.loads(llmctl("show", "--recipe", "r.yaml").stdout)["stop"] == ["a b"]


def test_a_recipe_that_is_not_there(llmctl, programs):
    assert llmctl("show", "--recipe", "r.yaml", code=1).stderr == "error: r.yaml: no such file or directory\n"


def test_variables(write, monkeypatch):
    monkeypatch.setenv("CORPUS", "/data/corpus")
    path = write(
        "vars: {out: runs/a, model: '${out}/model'}\n"
        "steps:\n"
        "  - copy: {files: ['${CORPUS}/x', '${python:stdlib}/*.py'], output: '${model}', label: '$5 {x}'}\n"
    )
    (step,) = load_steps(path)
    stdlib = sysconfig.get_path("stdlib")
    assert step.flags == {"files": ["/data/corpus/x", f"{stdlib}/*.py"], "output": "runs/a/model", "label": "$5 {x}"}
    (step,) = load_steps(path, ["vars.out=b", "copy.label=[p, 'q r']"])
    assert (step.flags["output"], step.flags["label"]) == ("b/model", ["p", "q r"])


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("steps: [copy: {mark: '${nope}'}]", [], "no variable ${nope}"),
        ("steps: [copy: {mark: '${python:nope}'}]", [], "no variable ${python:nope}"),
        ("steps: []", [], "expected a list of steps, got an empty list"),
        ("steps: [copy]", [], "step 1: expected a command and its flags, got 'copy'"),
        ("steps: [{copy: {}, show: {}}]", [], "step 1: expected one command, got copy, show"),
        ("steps: [copy: fast]", [], "step 1: expected the flags of 'copy', got 'fast'"),
        ("stepz: []", [], "unknown key 'stepz'"),
        ("steps: [copy: ]", ["copy"], "--set copy: expected step.flag=value"),
        ("steps: [copy: ]", ["show.lr=1"], "--set show.lr=1: no such step"),
        ("steps: [{copy: , copy: }]", [], "duplicate key 'copy'"),
        ("steps: [{copy: }, {copy: }]", ["copy.mark=1"], "--set copy.mark=1: several steps have that name"),
    ],
)
def test_wrong_steps_are_refused(write, recipe, overrides, message):
    with pytest.raises(CalledWrongly) as error:
        load_steps(write(recipe), overrides)
    assert message in error.value.message


def test_steps_are_joined_as_a_pipe(llmctl, programs, write, tmp_path):
    write(
        "steps:\n"
        "  - copy: {files: ['a*.txt', 'b c.txt'], label: [1, '2 3']}\n"
        "  - name: last\n"
        "    copy: {files: '-', label: -end}\n"
    )
    for name in ("a1.txt", "a2.txt", "b c.txt"):
        (tmp_path / name).write_text(name)
    assert llmctl("run", "r.yaml").stdout == "a1.txta2.txtb c.txt12 3-end"
    line = llmctl("run", "r.yaml", "--dry-run").stdout
    assert line == "llmctl copy --label 1 --label '2 3' a*.txt 'b c.txt' | llmctl copy --label=-end -\n"
    assert llmctl("run", "r.yaml", "--set", "last.label=!", "--set", "1.label=x").stdout == "a1.txta2.txtb c.txtx!"


def test_the_dry_run_line_does_what_run_does(llmctl, programs, write, tmp_path):
    write(
        "steps:\n  - copy: {files: a.txt, output: made}\n  - copy: {files: made, label: $HOME}\n  - copy: {label: '`x`'}\n"
    )
    (tmp_path / "a.txt").write_text("A")
    line = llmctl("run", "r.yaml", "--dry-run").stdout
    assert " > /dev/null && " in line and not (tmp_path / "made").exists()
    shell = f'llmctl() {{ "{sys.executable}" -m llmctl "$@"; }}; {line}'
    by_hand = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    (tmp_path / "made").unlink()
    assert llmctl("run", "r.yaml").stdout == by_hand == "A$HOME`x`"


def test_standard_input_reaches_the_first_step(llmctl, programs, write):
    write("steps: [copy: {label: '!'}]")
    assert llmctl("run", "r.yaml", input="typed").stdout == "typed!"


def test_flags_of_a_recipe_yield_to_the_environment_and_to_set(llmctl, programs, write):
    write("steps: [show: {lr: 1e-5, tokens: 10M, bf16: off}]")
    environment = {"LLMCTL_SHOW_LEARNING_RATE": "2e-5"}
    values = json.loads(llmctl("run", "r.yaml", env=environment).stdout)
    assert (values["learning-rate"], values["tokens"], values["bf16"]) == (2e-5, 10**7, False)
    values = json.loads(llmctl("run", "r.yaml", "--set", "show.lr=3e-5", env=environment).stdout)
    assert values["learning-rate"] == 3e-5


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("show: {lr: fast}", "--learning-rate: expected a number, got 'fast'"),
        ("show: {lrr: 1}", "r.yaml: step 2: unknown key 'lrr'"),
        ("show: {lr: [1, 2]}", "r.yaml: step 2: 'learning_rate' expects one value, got 2"),
        ("show: {bf16: maybe}", "r.yaml: step 2: --bf16: expected on or off, got 'maybe'"),
        ("shwo: {}", "r.yaml: step 2: no such command: shwo\nhint: did you mean show?"),
        ("copy: {files: '*.nothing'}", "*.nothing: no file matches"),
    ],
)
def test_a_wrong_step_is_found_before_any_runs(llmctl, programs, write, step, message):
    write(f"steps:\n  - copy: {{mark: first}}\n  - {step}\n")
    assert llmctl("run", "r.yaml", code=None).stderr.startswith(f"error: {message}")
    assert runs(programs) == []


def test_the_failing_step_is_named_and_its_code_kept(llmctl, programs, write):
    write("steps:\n  - copy: {}\n  - {name: second, copy: {fail: 3}}\n  - copy: {}\n")
    assert llmctl("run", "r.yaml", code=3).stderr == "error: step 2 (second) failed with exit code 3\n"


def test_a_failure_stops_what_waits_for_it(llmctl, programs, write):
    write("steps:\n  - copy: {fail: 1, mark: a, output: made}\n  - copy: {files: made, mark: b}\n")
    assert "step 1 (copy)" in llmctl("run", "r.yaml", code=1).stderr
    assert runs(programs) == ["a"]


TRAINING = """
steps:
  - copy: {files: a.txt, mark: tokens}
  - {name: train, copy: {output: out, directory: on, mark: train}}
  - {name: use, copy: {mark: use}}
"""


def test_what_is_up_to_date_is_skipped(llmctl, programs, write, tmp_path):
    write(TRAINING)
    (tmp_path / "a.txt").write_text("A")
    path = f"{tmp_path / 'out'}\n"
    assert llmctl("run", "r.yaml").stdout == path
    assert runs(programs) == ["tokens", "train", "use"]
    again = llmctl("run", "r.yaml")
    assert again.stdout == path, "an output that is there prints its path into the pipe"
    assert runs(programs) == ["use"]
    assert "step 1 (copy) is up to date" in again.stderr and "step 2 (train) is up to date: out" in again.stderr


@pytest.mark.parametrize("change", ["input", "flag", "output"])
def test_what_has_changed_runs_again(llmctl, programs, write, tmp_path, change):
    write(TRAINING)
    (tmp_path / "a.txt").write_text("A")
    llmctl("run", "r.yaml")
    runs(programs)
    if change == "input":
        (tmp_path / "a.txt").write_text("B")
    elif change == "output":
        (tmp_path / "out" / "text").write_text("other")
    overrides = ["--set", "1.label=x"] if change == "flag" else []
    result = llmctl("run", "r.yaml", *overrides, code=1)
    assert "out: file exists" in result.stderr and "step 2 (train) failed" in result.stderr
    assert runs(programs) == ["tokens", "train", "use"]


def test_a_finished_file_is_read_by_the_step_that_names_it(llmctl, programs, write, tmp_path):
    write("steps:\n  - copy: {files: a.txt, output: o/b, mark: 1}\n  - copy: {files: o/b, output: o/c, mark: 2}\n")
    (tmp_path / "o").mkdir()
    (tmp_path / "a.txt").write_text("A")
    assert llmctl("run", "r.yaml").stdout == f"{tmp_path}/o/c\n"
    assert (tmp_path / "o" / "c").read_text() == "A" and runs(programs) == ["1", "2"]
    llmctl("run", "r.yaml")
    assert runs(programs) == []
    (tmp_path / "o" / "c").unlink()
    llmctl("run", "r.yaml")
    assert runs(programs) == ["2"]


def test_standard_input_is_never_up_to_date(llmctl, programs, write, tmp_path):
    write("steps: [copy: {output: b, mark: 1, recipe: flags.yaml}]")
    (tmp_path / "flags.yaml").write_text("label: '!'")
    llmctl("run", "r.yaml", input="x")
    (tmp_path / "b").unlink()
    llmctl("run", "r.yaml", input="y")
    assert (tmp_path / "b").read_text() == "y!"


def test_a_pipe_goes_on_behind_a_file_that_is_complete(llmctl, programs, write, tmp_path):
    """The third step reads the second's output through the pipe, and a file that the first has long finished."""
    write(
        "steps:\n  - copy: {files: a.txt, output: b}\n  - copy: {files: b, label: '+'}\n"
        "  - copy: {files: [b, '-'], label: '!'}\n"
    )
    (tmp_path / "a.txt").write_text("A")
    assert llmctl("run", "r.yaml", "--dry-run").stdout.count("|") == 1
    assert llmctl("run", "r.yaml").stdout == "AA+!"


def test_a_file_named_like_a_pattern(llmctl, programs, write, tmp_path):
    write("steps: [copy: {files: 'a[1].txt'}]")
    (tmp_path / "a[1].txt").write_text("A")
    assert llmctl("run", "r.yaml").stdout == "A"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_step_once(programs, write, tmp_path, number):
    write("steps:\n  - copy: {seconds: 60}\n  - copy: {seconds: 60}\n")
    command = [sys.executable, "-m", "llmctl", "run", "r.yaml"]
    with subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + 30
        while not programs.exists() or programs.read_text().count("asleep") < 2:
            assert time.monotonic() < deadline, "the steps did not start"
            time.sleep(0.02)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert runs(programs).count(f"signal {number}") == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_our_recipes_are_sound(llmctl, path):
    text = path.read_text()
    if "\nsteps:" in text:
        assert llmctl("run", path, "--dry-run").stdout.startswith("llmctl ")
    else:
        load_mapping(path)


def test_the_quickstart_in_small(llmctl, tmp_path):
    """Real commands from text to sample, on a few files and steps."""
    small = ["vars.corpus=${python:stdlib}/a*.py", "tokenize.vocab-size=300", "pretrain.time=null", "pretrain.steps=2"]
    overrides = [word for change in [*small, "generate.max-new-tokens=4"] for word in ("--set", change)]
    first = llmctl("run", ROOT / "recipes" / "quickstart.yaml", *overrides)
    assert first.stdout.startswith("class Reader:") and (tmp_path / "runs" / "quickstart" / "config.json").exists()
    again = llmctl("run", ROOT / "recipes" / "quickstart.yaml", *overrides)
    assert again.stdout == first.stdout and "step 2 (pretrain) is up to date: runs/quickstart" in again.stderr
