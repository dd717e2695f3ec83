"""`llmctl chat`: a conversation with a model."""

from __future__ import annotations

import dataclasses
import os
import sys

from llmctl import options, ui
from llmctl.chat.settings import ChatSettings
from llmctl.errors import CalledWrongly
from llmctl.generation.settings import Sampling


@options.command(
    examples="""
    llmctl chat runs/tuned
    llmctl chat runs/base --adapter runs/lora --system "You are terse." --temperature 0.2
    llmctl chat runs/tuned --tools calculator,python --docs notes --embed-model runs/encoder
    llmctl chat runs/tuned --samples 8 --vote
    cat questions.txt | llmctl chat runs/tuned > answers.txt
    """
)
@options.model_argument
@options.settings(ChatSettings, into="chat")
@options.settings(Sampling, into="sampling")
def command(model, chat, sampling):
    """Talk with a model.

    MODEL is a checkpoint directory, or that of an adapter, which names its base. At a terminal: Enter sends, Alt-Enter
    is a new line, Ctrl-R searches what was typed before, Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands.

    Without a terminal every line of standard input is a question, or a JSON message if it begins with a brace; answers
    go to standard output in the same form. Tools that do more than compute are not run there once text of documents is
    in the conversation.
    """
    from llmctl.chat import desk as desks
    from llmctl.checkpoint import resolve_model

    desks.check(chat)
    if model == "-" and not sys.stdin.isatty():
        raise CalledWrongly("standard input holds the turns, so MODEL cannot be -", hint="give its path")
    path = resolve_model(model)
    if sampling.seed is None:
        sampling = dataclasses.replace(sampling, seed=int.from_bytes(os.urandom(4), "little"))
    if sampling.searches:
        raise CalledWrongly("--num-beams searches; a chat draws its answers", hint="llmctl generate --num-beams")

    engine = desks.engine_of(path, chat, chat.adapter)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _at_terminal(engine, chat, sampling)
        return
    from llmctl.chat_view import lines

    if engine.prompt.is_plain:
        ui.note(f"{path} has no chat template: it reads a plain transcript")
    lines.run(desks.Desk(engine, chat, sampling), sys.stdin.buffer, ui.print_data, ui.note)


def _at_terminal(engine, chat, sampling):
    from llmctl.chat import sessions
    from llmctl.chat.desk import Desk
    from llmctl.chat_view.repl import Repl
    from llmctl.chat_view.terminal import Terminal

    terminal = Terminal()
    with ui.late_progress("index", unit="passages") as report:
        desk = Desk(engine, chat, sampling, terminal.approve, report)
    if desk.session_path is None:
        desk.session_path = sessions.new_session_path()
    Repl(desk, terminal).run()
