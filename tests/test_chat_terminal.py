"""llmctl chat at a terminal, driven through a pty."""

from __future__ import annotations

import json
import signal
import termios

import pytest

pytest.importorskip("prompt_toolkit")
from terminal import Terminal

TRAINING = ("--method", "full", "--steps", 60, "--batch-size", 2, "--lr", "2e-3", "--seed", 0)


@pytest.fixture
def chat(data, tmp_path):
    """`chat(*flags)` starts a chat with stories260K in `tmp_path`; a fixed seed, answers of 12 tokens."""
    running = []

    def start(*flags, model=data / "models" / "stories260K", length=12):
        env = {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
        terminal = Terminal("chat", model, "-n", length, "--seed", 1, *flags, cwd=tmp_path, env=env)
        running.append(terminal)
        terminal.expect("Ctrl-D leaves")
        terminal.expect(r"\n>")
        return terminal

    yield start
    for terminal in running:
        if terminal.process.poll() is None:
            terminal.process.kill()


def test_a_chat_from_the_first_word_to_ctrl_d(chat, tmp_path):
    terminal = chat("--temperature", 0)
    assert "no chat template" in terminal.seen
    terminal.line("Once upon a time")
    terminal.expect(r"12 tokens, [\d.]+ tokens/s, first after [\d.]+ s")
    terminal.expect(r"context \d+/512 · 12 tokens")  # the status line
    terminal.line("/tokens")
    terminal.expect(r"1 user .*\n +2 assistant .*\ncontext: \d+ of 512 tokens")
    terminal.line("/undo")
    terminal.expect("taken back: Once upon a time")
    terminal.line("two")
    terminal.expect("12 tokens,")
    terminal.line("/branch side")
    terminal.expect("a new branch side: 2 messages")
    terminal.line("/params temperature=0.5 top-k=3")
    terminal.expect(r"temperature=0.5 top_k=3")
    terminal.line("/nosuch")
    terminal.expect("no such command: /nosuch")
    terminal.line("/save kept.jsonl")
    terminal.expect("saved in kept.jsonl")
    assert terminal.leave() == 0
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [row["branch"] for row in rows] == ["main", "side"]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]


def test_lines_history_search_and_completion(chat, tmp_path):
    terminal = chat()
    terminal.type("first line")
    terminal.type("\x1b\r")
    terminal.type("second line")
    terminal.line("")
    terminal.expect("12 tokens,")
    terminal.line("/save a.jsonl")
    terminal.expect("saved in a.jsonl")
    terminal.type("/par\t")
    terminal.expect("/params")
    terminal.type("temp\t")
    terminal.wait_for_quiet(0.3)
    terminal.line("0.25")
    terminal.expect("temperature=0.25")
    (tmp_path / "notes-about-it.txt").write_text("some notes\n")
    terminal.type("/attach notes\t")
    terminal.wait_for_quiet(0.5)
    terminal.line("")
    terminal.expect(r"notes-about-it.txt: 11 bytes")
    assert terminal.leave() == 0
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert messages[0]["content"] == "first line\nsecond line"

    again = chat()  # the history is kept between chats
    again.type("\x12second")
    again.wait_for_quiet(0.5)
    again.type("\r")
    again.wait_for_quiet(0.3)
    again.line("")
    again.expect("12 tokens,")
    assert again.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(chat, tmp_path):
    terminal = chat("--session", "s.jsonl", "--temperature", 0, "--ignore-eos", length=480)
    terminal.line("Once upon a time")
    terminal.expect("[a-z]{3}.* ")
    terminal.wait_for_quiet(0.02)
    terminal.interrupt()
    terminal.expect(r"tokens/s.*, stopped")
    terminal.line("/params n=5")
    terminal.expect("max_new_tokens=5")
    terminal.line("and then")
    terminal.expect("5 tokens,")
    terminal.type("half a question\x03")  # at the editor it throws away the line
    terminal.wait_for_quiet(0.2)
    assert terminal.leave() == 0
    messages = json.loads((tmp_path / "s.jsonl").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert messages[1]["content"]


def test_a_signal_leaves_the_terminal_as_it_was(chat):
    terminal = chat()
    as_it_was = termios.ICANON | termios.ECHO
    assert termios.tcgetattr(terminal.fd)[3] & as_it_was == 0
    terminal.wait_for_quiet(0.3)
    terminal.process.send_signal(signal.SIGTERM)
    while terminal.process.poll() is None:
        terminal.wait_for_quiet(0.1)
    assert terminal.process.returncode == 143
    assert termios.tcgetattr(terminal.fd)[3] & as_it_was == as_it_was


def test_going_on_with_the_last_conversation(chat):
    terminal = chat("--temperature", 0)
    terminal.line("Once upon a time")
    terminal.expect("12 tokens,")
    assert terminal.leave() == 0
    again = chat("--continue")
    assert "2 messages so far" in again.seen
    again.line("/retry")
    again.expect("12 tokens,")
    assert again.leave() == 0


def test_an_index_that_is_built_is_shown(chat, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("The ship left Bremen in 1911.\n")
    terminal = chat("--docs", "docs", "--kv-dtype", "int8", "--threads", 1, length=4)
    assert "1 passages" in terminal.seen
    terminal.line("When did the ship leave?")
    terminal.expect("sources: a.txt:1")
    terminal.expect("4 tokens,")
    assert terminal.leave() == 0
    again = chat("--docs", "docs")
    assert "passages" not in again.seen and again.leave() == 0


def test_compare_is_blind_and_keeps_the_vote(chat, data, tmp_path):
    (tmp_path / "other").symlink_to(data / "models" / "stories260K")
    terminal = chat("--votes", "votes.jsonl")
    terminal.line("Once upon a time")
    terminal.expect("12 tokens,")
    terminal.line("/compare other")
    terminal.expect("--- answer 1")
    terminal.expect("which is better")
    assert "1 was" not in terminal.seen
    terminal.line("2")
    terminal.expect(r"1 was [^;]*, 2 was [^;]*; the\s+vote\s+is\s+kept\s+in\s+votes.jsonl")  # long names are wrapped
    assert terminal.leave() == 0
    row = json.loads((tmp_path / "votes.jsonl").read_text())
    assert row["vote"] == "2" and sorted(row["models"])[1] == "other" and len(row["answers"]) == 2


@pytest.mark.slow
def test_attachments_logprobs_and_other_models(chat, data, tmp_path):
    (tmp_path / "note.txt").write_text("The cat is red.\n")
    terminal = chat("--temperature", 0)
    terminal.line("/attach note.txt")
    terminal.expect("goes with the next question")
    terminal.line("Which colour?")
    terminal.expect("12 tokens,")
    terminal.line("/logprobs 2")
    terminal.expect(r"of 12 tokens, -\d+\.\d+ each")
    terminal.line("/model")
    terminal.expect("llama, a context of 512 tokens")
    terminal.line("/model nowhere")
    terminal.expect("error: .*nowhere")
    terminal.line("/system be kind")
    terminal.expect("system: be kind")
    terminal.line("/edit What then?")
    terminal.expect("12 tokens,")
    terminal.line("/tools calculator,python")
    terminal.expect("tools: calculator, python; described in the system message")
    terminal.line("/save a.jsonl")
    terminal.expect("saved in")
    terminal.line("/reset")
    terminal.expect("forgotten")
    terminal.line("/load a.jsonl")
    terminal.expect("3 messages, branch main")
    terminal.line("/help")
    terminal.expect("/undo  Take back")
    assert terminal.leave() == 0
    messages = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert messages[0]["content"] == "be kind"
    question = messages[1]["content"]  # what is attached to a question stays with it when it is edited
    assert "The cat is red." in question and question.endswith("What then?")


@pytest.mark.slow
def test_a_full_context_is_said_and_compacted(chat):
    terminal = chat("--temperature", 0, "--ignore-eos", length=100)
    for _ in range(5):
        terminal.line("Once upon a time there was a little girl who lived in a house")
        found = terminal.expect("100 tokens,|error: the context is full")
        if found[0].startswith("error"):
            break
    else:
        raise AssertionError("it never was full")
    terminal.expect("/compact shortens it")
    terminal.line("/compact")
    terminal.expect(r"messages became a summary: \d+ tokens, now \d+")
    terminal.line("more")
    terminal.expect("100 tokens,")
    assert terminal.leave() == 0


def test_a_fix_is_kept_in_the_forms_that_finetune_takes(chat, llmctl, data, tmp_path):
    fix_an_answer(chat, llmctl, data, tmp_path)


def fix_an_answer(chat, llmctl, data, tmp_path):
    model = data / "models" / "stories260K"
    terminal = chat("--temperature", 0)
    terminal.line("Who are you?")
    terminal.expect("12 tokens,")
    terminal.line("/fix")
    terminal.expect("answer:")
    terminal.wait_for_quiet(0.2)
    terminal.type("\x15")  # Ctrl-U: all of the old answer goes
    terminal.line("I am Ada.")
    terminal.expect(r"kept in fixes.messages.jsonl and fixes.pairs.jsonl")
    terminal.line("/save talk.jsonl")
    terminal.expect("saved in talk.jsonl")
    assert terminal.leave() == 0
    assert json.loads((tmp_path / "talk.jsonl").read_text())["messages"][1]["content"] == "I am Ada."

    pairs = llmctl("inspect-data", "fixes.pairs.jsonl", "--model", model, "--objective", "dpo")
    assert "I am Ada." in pairs.stdout + pairs.stderr
    return model


@pytest.mark.slow
def test_a_fix_is_learned(chat, llmctl, data, tmp_path):
    """The loop of a chat: look, correct, fine-tune on the correction, and see the corrected answer."""
    model = fix_an_answer(chat, llmctl, data, tmp_path)
    llmctl("finetune", model, "fixes.messages.jsonl", *TRAINING, "-o", "tuned")
    tuned = chat("--temperature", 0, model=tmp_path / "tuned")
    assert "no chat template" not in tuned.seen
    tuned.line("Who are you?")
    tuned.expect(r"I am Ada\.")
    assert tuned.leave() == 0


# What begins an answer ends in no space: the answer's first word would have its own space in it, in a token that the model
# learns and that no prompt of the chat leaves room for.
TOOL_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tool_call>\n{% endif %}{% for m in messages %}{{ m.role }}:"
    "{{ ' ' + m.content if m.content else '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.slow
def test_tools_at_a_terminal(chat, llmctl, data, tmp_path):
    """A small model learns to call the calculator; its result is shown, given, and refused."""
    call = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "2+3"}}}
    asked = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = [
        {"messages": [*asked, {"role": "tool", "content": result}, {"role": "assistant", "content": answer}]}
        for result, answer in (("5", "It is 5."), ("refused by the user", "Then not."))
    ]
    tools = [{"type": "function", "function": {"name": "calculator"}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "tools": tools}) + "\n" for row in rows))
    (tmp_path / "template.jinja").write_text(TOOL_TEMPLATE)
    model = data / "models" / "stories260K"
    llmctl(
        "finetune", model, "rows.jsonl", *TRAINING, "--steps", 120, "--chat-template", "template.jinja", "-o", "caller"
    )
    terminal = chat("--temperature", 0, "--tools", "calculator", model=tmp_path / "caller", length=80)
    terminal.line("What is 2+3?")
    terminal.expect(r'calculator\(expression="2\+3"\) gives\n5')
    terminal.expect(r"give it to the model\?")
    terminal.line("y")
    terminal.expect(r"It is 5\.")
    terminal.line("/undo")
    terminal.expect("taken back")
    terminal.line("What is 2+3?")
    terminal.expect(r"give it to the model\?")
    terminal.line("n")
    terminal.expect("not given to the model")
    terminal.expect(r"Then not\.")
    assert terminal.leave() == 0
