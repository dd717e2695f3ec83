"""The chat without a terminal: turns come in lines on standard input, answers go to standard output, nothing is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from llmctl.chat.desk import Desk
from llmctl.chat.events import Called, Done, Found, Remark
from llmctl.chat.turns import Turn, read_turns


def run(desk: Desk, lines: Iterable[bytes], write: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Answer every question; messages of other roles are only read. Raises `UserError` naming the line."""
    for remark in desk.remarks:
        note(remark)
    for turn in read_turns(lines):
        if turn.role == "user":
            _answer(desk, turn, write, note)
        elif turn.role in ("system", "developer"):
            desk.conversation.set_system(turn.content)
        else:
            desk.conversation.messages.append(turn.message)
    desk.save()


def _answer(desk: Desk, turn: Turn, write: Callable[[str], None], note: Callable[[str], None]) -> None:
    sources, called, done = [], [], None
    for event in turn.named(desk.ask(turn.content)):
        if isinstance(event, Remark):
            note(f"{turn.name}: {event.text}")
        elif isinstance(event, Found):
            sources = [passage.source for passage in event.passages]
        elif isinstance(event, Called):
            called.append({"name": event.call.name, "arguments": event.call.arguments, "result": event.result})
        elif isinstance(event, Done):
            done = event.answer
    text = "" if done is None else desk.conversation.messages[-1]["content"]
    if not (turn.is_json or desk.settings.jsonl):
        write(text)
        return
    answer = {"role": "assistant", "content": text}
    if done is not None:
        answer |= {"finish_reason": done.finish_reason, "prompt_tokens": done.prompt_tokens}
        answer |= {"reused_tokens": done.reused_tokens, "completion_tokens": len(done.ids)}
    answer |= {"sources": sources} if desk.talk.index is not None else {}
    answer |= {"tool_calls": called} if called else {}
    write(json.dumps(answer, ensure_ascii=False))
