"""/compact: what was said, in fewer words by the model itself."""

from __future__ import annotations

from dataclasses import replace

from llmctl.chat.conversation import Conversation
from llmctl.chat.engine import ContextFull
from llmctl.chat.talk import Talk
from llmctl.chat.tool_turns import texts_from_elsewhere
from llmctl.errors import UserError

_ASK = "Summarize the conversation above in a few sentences: facts, names, decisions and open questions."


def compact(talk: Talk) -> str:
    """Replace all turns in front of the last question by a summary in the system message; gives a line that says so.

    Where not all of them fit into the context together with the request, the oldest are left out of the summary, which is
    said. Raises `UserError` where there is nothing to shorten, and where no summary comes of it.
    """
    conversation, engine = talk.conversation, talk.engine
    own = conversation.system
    at = conversation.last("user")
    old = conversation.messages[own is not None : at]
    if not old:
        raise UserError("there is only one turn; nothing can be shortened", hint="/reset begins anew")
    before = engine.count(conversation.messages)
    summary, n_left_out = _summary(talk, old)
    note = f"Summary of the conversation so far: {summary}"
    rest = conversation.messages[at:]
    # What a document wanted may have found its way into the summary.
    mark = {"from_elsewhere": True} if texts_from_elsewhere(old) else {}
    conversation.messages = [{"role": "system", "content": f"{own}\n\n{note}" if own else note, **mark}, *rest]
    try:
        engine.prompt.text(conversation.messages)
    except UserError:  # some templates take no system message
        conversation.messages = [{**rest[0], "content": f"{note}\n\n{rest[0]['content']}", **mark}, *rest[1:]]
    left_out = f"; the {n_left_out} oldest did not fit and are lost" if n_left_out else ""
    now = engine.count(conversation.messages)
    return f"{len(old)} messages became a summary: {before} tokens, now {now}{left_out}"


def _summary(talk: Talk, old: list[dict]) -> tuple[str, int]:
    """What the model makes of these turns, and how many messages of the oldest did not fit; a turn goes as a whole."""
    engine = talk.engine
    room = engine.room or 1 << 20
    sampling = replace(talk.sampling, max_new_tokens=max(16, min(256, room // 8)))
    left = Conversation([*old, {"role": "user", "content": _ASK}])
    talk.should_stop = False
    while True:
        try:
            sequence = talk.next_sequence()
            *_, (_, answer) = engine.answer(left.messages, sampling, None, lambda: talk.should_stop, sequence)
            break
        except ContextFull:
            # The last question is the request itself, which never goes; without any turn there is nothing to shorten.
            if not left.drop_oldest() or len(left.messages) == 1:
                raise
    if answer.finish_reason == "interrupted":
        raise UserError("stopped; nothing was shortened")
    if not answer.text.strip():
        raise UserError(
            "the model wrote no summary; nothing was shortened", hint="/compact again draws another, /reset begins anew"
        )
    return answer.text.strip(), len(old) + 1 - len(left.messages)
