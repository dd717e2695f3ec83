"""llmctl chat at a terminal, driven through a pty."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("prompt_toolkit")
from terminal import Terminal


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
