"""Tools of a chat: the calls as families write them, what tools may do, and what becomes of those that fail or hang."""

from __future__ import annotations

import io
import json
import math
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("prompt_toolkit")
from rich.console import Console
from test_chat import GREEDY, save_model

from llmctl.chat.conversation import Conversation
from llmctl.chat.engine import Answer, Engine
from llmctl.chat.events import Called
from llmctl.chat.talk import MAX_ROUNDS, Talk
from llmctl.chat.tool_turns import REFUSED, ToolLayer
from llmctl.chat.tools import calculator, calls
from llmctl.chat.tools.files import Directory
from llmctl.chat.tools.toolbox import Call, named
from llmctl.chat_view.markdown import MarkdownStream
from llmctl.chat_view.terminal import Terminal
from llmctl.errors import CalledWrongly, UserError
from llmctl.finetune.data.template import with_template
from llmctl.model_settings import EngineSettings
from llmctl.tokenizer import Tokenizer

# What each family's template says of tools, as far as it matters here: how a call and a result are written.
_TURNS = "<|{{ m.role }}|>{{ m.content }}"
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}{% for m in messages %}" + _TURNS
    + "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}",
    "llama3": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}<|ipython|>"
    "{{ m.content }}{% else %}" + _TURNS + "{% for c in m.tool_calls or [] %}{{ {'name': c.function.name, 'parameters': "
    "c.function.arguments} | tojson }}{% endfor %}{% endif %}{% endfor %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}" + _TURNS
    + "{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}{% endfor %}",
}  # fmt: skip


def written(form: str, name: str, arguments: dict) -> str:
    """A call as a model of this family says it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return {
        "hermes": f"<tool_call>\n{call}\n</tool_call>",
        "llama3": json.dumps({"name": name, "parameters": arguments}),
        "mistral": f"[TOOL_CALLS] [{call}]",
    }[form]


class Scripted(Engine):
    """A model that says what it is told to, one answer after another; the last one again and again."""

    script: tuple[str, ...] = ()

    def answer(self, messages, sampling, tools=None, should_stop=lambda: False, sequence=0):
        self.prompts = [*getattr(self, "prompts", []), self.prompt.text(messages, tools)]
        said = self.script[min(len(self.prompts), len(self.script)) - 1]
        answer = Answer(1, text=said, raw=said, ids=[1], finish_reason="stop")
        yield said, answer


@pytest.fixture(scope="module", params=TEMPLATES)
def form(request):
    return request.param


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """One engine for each family's template, over one small model."""
    path = save_model(tmp_path_factory.mktemp("model") / "llama", positions=4096)
    found = {}
    for name, template in TEMPLATES.items():
        with_template(Tokenizer.bytes(), template).save(path)
        found[name] = Scripted.open(path, EngineSettings(device="cpu"))
    return found


def talk_with(engine, script, tools="calculator", approve=None, directory="."):
    engine.script, engine.prompts = tuple(script), []
    layer = ToolLayer(named([tools], str(directory), 1.0, 256), engine.tokenizer, approve, engine.room // 4)
    return Talk(engine, Conversation(), GREEDY, tools=layer)


def called(events):
    return [event for event in events if isinstance(event, Called)]


# --- a turn with calls ---


def test_a_call_is_run_and_its_result_answered(engines, form):
    engine = engines[form]
    talk = talk_with(engine, [written(form, "calculator", {"expression": "17*23"}), "It is 391."])
    (happened,) = called(talk.ask("what is 17*23?"))
    assert (happened.call, happened.result) == (Call("calculator", {"expression": "17*23"}), "391")
    assert talk.tools.format.name == form and talk.tools.format.is_known
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert talk.conversation.messages[-1]["content"] == "It is 391."
    assert (
        written(form, "calculator", {"expression": "17*23"}).split("{")[1] in engine.prompts[1]
        and "391" in engine.prompts[1]
    )
    assert '"parameters"' in engine.prompts[0]  # the template told the model of the tool


def test_several_calls_and_a_text_around_them(engines):
    talk = talk_with(engines["hermes"], ["Let me see. " + "".join(written("hermes", "calculator", {"expression": e}) for e in ("1+1", "2+2")), "2, 4"])  # fmt: skip
    assert [happened.result for happened in called(talk.ask("?"))] == ["2", "4"]
    assert talk.conversation.messages[1]["content"] == "Let me see."


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ('<tool_call>{"name": "calculator", </tool_call>', "no JSON"),
        ('<tool_call>["calculator"]</tool_call>', "an object with name and arguments"),
        ('<tool_call>{"name": "shell", "arguments": {}}</tool_call>', "there is no tool 'shell'; there are calculator"),
        ('<tool_call>{"name": "calculator", "arguments": {}}</tool_call>', "calculator needs expression"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1", "x": 1}}</tool_call>', "not x"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call>', "division by zero"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": [1]}}</tool_call>', "an expression is text"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(engines, raw, problem):
    talk = talk_with(engines["hermes"], [raw, "sorry"])
    (happened,) = called(talk.ask("?"))
    assert happened.result.startswith("error: ") and problem in happened.result
    assert talk.conversation.messages[2]["content"] == happened.result


def test_a_result_can_be_refused(engines, form):
    asked = []
    talk = talk_with(engines[form], [written(form, "calculator", {"expression": "6*7"}), "ok"],
                     approve=lambda call, result, tainted: asked.append(result) or False)  # fmt: skip
    (happened,) = called(talk.ask("?"))
    assert asked == ["42"] and not happened.was_given
    assert talk.conversation.messages[2]["content"] == REFUSED and "42" not in engines[form].prompts[1]


def test_a_program_runs_only_when_a_person_agrees(engines):
    ran = []
    talk = talk_with(engines["hermes"], [written("hermes", "python", {"code": "print(6*7)"}), "ok"], "python",
                     approve=lambda call, result, tainted: ran.append(result) or result is None)  # fmt: skip
    list(talk.ask("?"))
    assert ran == [None, "42"]
    no = talk_with(engines["hermes"], [written("hermes", "python", {"code": "print(6*7)"}), "ok"], "python",
                   approve=lambda call, result, tainted: False)  # fmt: skip
    assert called(no.ask("?"))[0].result == REFUSED


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("while True: pass", "[stopped: it ran longer than 1 seconds]"),
        ("print('x' * 5_000_000)", "characters more]"),
        ("raise ValueError('no')", "ValueError: no"),
        ("import os; os.fork()", "PermissionError"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("", "[it printed nothing]"),
    ],
)
def test_programs_that_hang_fail_or_print_megabytes(engines, code, result):
    talk = talk_with(engines["hermes"], [written("hermes", "python", {"code": code}), "ok"], "python")
    (happened,) = called(talk.ask("?"))
    assert result in happened.result and len(happened.result) < 3000


def test_nothing_is_drawn_while_a_person_is_asked(engines, monkeypatch):
    """A text that is still drawn anew would write over the question."""
    drawn = []

    class Watched(MarkdownStream):
        def __enter__(self):
            drawn.append(self)
            return super().__enter__()

        def __exit__(self, *failure):
            super().__exit__(*failure)
            drawn.remove(self)

    monkeypatch.setattr("llmctl.chat_view.terminal.MarkdownStream", Watched)
    output, asked = io.StringIO(), []
    terminal = Terminal(Console(file=output, force_terminal=True, width=100))
    talk = talk_with(engines["hermes"], [written("hermes", "python", {"code": "print(6*7)"}), "It is 42."], "python",
                     approve=lambda *call: asked.append(len(drawn)) or True)  # fmt: skip
    terminal.show(talk.ask("?"))
    assert asked == [0, 0] and output.getvalue().count("It is 42.") == 1


def test_a_model_that_never_stops_calling_is_stopped(engines):
    talk = talk_with(engines["hermes"], [written("hermes", "calculator", {"expression": "1"})])
    events = list(talk.ask("?"))
    assert len(called(events)) == MAX_ROUNDS
    assert any("without an answer" in getattr(event, "text", "") for event in events)


def test_a_template_without_tools_gets_them_in_the_system_message(tmp_path):
    engine = Scripted.open(save_model(tmp_path / "m", positions=4096), EngineSettings(device="cpu"))
    talk = talk_with(engine, [written("hermes", "calculator", {"expression": "6*7"}), "42"])
    assert [happened.result for happened in called(talk.ask("hi"))] == ["42"]
    assert not talk.tools.format.is_known and "You may call these functions" in engine.prompts[0]
    assert "<tool_call>" in engine.prompts[1] and "<tool_response>" in engine.prompts[1]
    assert talk.conversation.system is None
    talk.conversation.undo()  # the result is no question
    assert talk.conversation.messages == []
    assert calls.parse_text('{"name": "f", "arguments": {"a": 1}}').calls == [Call("f", {"a": 1})]


def test_names_that_are_no_tools():
    with pytest.raises(CalledWrongly, match="no tool 'pyton'") as raised:
        named(["calculator,pyton"], ".", 1, 64)
    assert "python" in raised.value.hint
    assert named([], ".", 1, 64) is None


# --- calls as they are written ---


def test_llama3_takes_only_a_whole_answer_for_a_call():
    assert calls.parse_llama3('Here: {"name": "f", "parameters": {}}').calls == []
    assert calls.parse_llama3('<|python_tag|>{"name": "f", "parameters": {"a": 1}}').calls == [Call("f", {"a": 1})]
    two = calls.parse_llama3('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}').calls
    assert [call.name for call in two] == ["f", "g"]
    assert calls.parse_llama3('{"answer": 3}').text == '{"answer": 3}'


def test_mistral_writes_names_in_front_too():
    assert calls.parse_mistral('[TOOL_CALLS]f[ARGS]{"a": 1}').calls == [Call("f", {"a": 1})]
    assert calls.parse_mistral('[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}').calls == [Call("f", {"a": 1})]
    assert calls.parse_mistral('hm [TOOL_CALLS] [{"name": "f", "arguments": "{\\"a\\": 1}"}]') == (
        "hm",
        [Call("f", {"a": 1})],
    )
    assert calls.parse_mistral("[TOOL_CALLS] oops").calls[0].problem
    ids = [call["id"] for call in calls.as_message("", [Call("f", {})] * 2, 7)["tool_calls"]]
    assert ids == ["000000007", "000000008"]


# --- the tools ---


@pytest.mark.parametrize(
    "expression",
    ["1+2*3", "(17*23+4)/5", "-2**2", "7//2 + 7%3", "sqrt(2)*2", "round(pi, 3)", "2**100", "max(1, 2.5)", "1e3"],
)
def test_arithmetic_is_pythons(expression):
    assert calculator.compute(expression) == str(eval(expression, vars(math) | {"max": max, "round": round}))


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "2**-99999", "factorial(100000)", "__import__('os')", "().__class__", "'a'*9", "x", "1 if 1 else 2",
     "[1]*9", "(-8)**0.5", "", "1" * 2000, "lambda: 1", "sqrt(-1)", "exp(9999)", "(" * 300 + ")" * 300],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(expression):
    with pytest.raises(UserError):
        calculator.compute(expression)


def test_files_are_read_within_their_directory(tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (inside / "a.txt").write_text("one\ntwo\nthree\n")
    (inside / "link").symlink_to(tmp_path / "secret.txt")
    (inside / "binary").write_bytes(b"a\0b")
    os.mkfifo(inside / "pipe")
    place = Directory(inside)
    assert place.read("a.txt", first_line=2, lines=1) == "2: two"
    assert place.list().splitlines() == ["a.txt", "binary", "link", "pipe", "sub/"]
    for path in ("../secret.txt", "link", str(tmp_path / "secret.txt"), "sub/../../secret.txt"):
        with pytest.raises(UserError, match="outside"):
            place.read(path)
    (inside / "long.txt").write_text("x" * 100_000 + "\n" + "é" * 9_000 + "\nend\n")  # lines are cut as they are read
    first, second, third = place.read("long.txt").split("\n")
    assert (len(first), len(second), third) == (2003, 2003, "3: end")
    for path in ("pipe", "none", "sub", "binary"):
        with pytest.raises(UserError):
            place.read(path)
    with pytest.raises(UserError, match="no line 9"):
        place.read("a.txt", first_line=9)
