"""/compare: the last question of a chat, answered by another model too."""

from __future__ import annotations

import os
import random

from llmctl.arena import votes
from llmctl.arena.blind import pair
from llmctl.chat.desk import Desk, View
from llmctl.errors import UserError


def compare(desk: Desk, view: View, path: str) -> None:
    """Show both answers, keep the vote, say who was who; the better answer goes on in the conversation."""
    conversation = desk.conversation
    messages = conversation.messages[: conversation.last("user") + 1]
    if os.path.abspath(path) == os.path.abspath(desk.engine.name):
        raise UserError(f"{path}: the same model", hint="/retry draws another answer of it")
    other = desk.open(path)
    sequence = desk.talk.next_sequence()
    shown = pair([desk.engine, other], messages, desk.talk.sampling, random.SystemRandom(), sequence)
    for number, answer in enumerate(shown.answers, 1):
        view.say(f"--- answer {number}")
        view.say(answer)
    said = view.pick("which is better?", votes.CHOICES)
    if said is None:
        view.say("no vote")
        return
    votes.append(desk.settings.votes, messages, shown.models, shown.answers, said)
    view.say(f"1 was {shown.models[0]}, 2 was {shown.models[1]}; the vote is kept in {desk.settings.votes}")
    if said in ("1", "2"):
        conversation.messages = [*messages, {"role": "assistant", "content": shown.answers[int(said) - 1]}]
        desk.save()
