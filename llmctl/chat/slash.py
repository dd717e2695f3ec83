"""The slash commands: `slash_NAME(desk, view, words)` is /NAME, and the first line of its docstring is its help.

A function that gives an iterator has it shown as an answer is.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from llmctl.chat import corrections, probing, shortening
from llmctl.chat.conversation import named_branch
from llmctl.chat.desk import Desk, View
from llmctl.chat.events import Event
from llmctl.chat.tools import toolbox
from llmctl.errors import CalledWrongly, UserError, did_you_mean
from llmctl.generation.settings import Sampling

MAX_ATTACHED = 200_000  # bytes; no model here reads more


def names() -> list[str]:
    return [name.removeprefix("slash_") for name in vars(sys.modules[__name__]) if name.startswith("slash_")]


def usage(name: str) -> str:
    """One line of help."""
    return inspect.getdoc(find(name)).splitlines()[0]


def find(name: str) -> Callable:
    """Raises `UserError` for what is no command."""
    function = getattr(sys.modules[__name__], f"slash_{name}", None)
    if function is None:
        hint = (
            did_you_mean(name, names()) or "/help lists the commands; a space in front of the slash makes it a question"
        )
        raise UserError(f"no such command: /{name}", hint)
    return function


def run(desk: Desk, view: View, line: str) -> None:
    """Do what a line says that begins with a slash."""
    name, _, words = line[1:].strip().partition(" ")
    events = find(name)(desk, view, words.strip())
    if events is not None:
        view.show(events)


def slash_help(desk: Desk, view: View, words: str) -> None:
    """/help  Show this list."""
    view.say("\n".join(usage(name) for name in sorted(names())))


def slash_system(desk: Desk, view: View, words: str) -> None:
    """/system [TEXT]  Show or set the system message; /system - takes it away."""
    if words:
        desk.conversation.set_system(None if words == "-" else words)
    view.say(f"system: {desk.conversation.system or 'none'}")


def slash_reset(desk: Desk, view: View, words: str) -> None:
    """/reset  Forget all turns; the system message stays."""
    desk.conversation.reset()
    view.say("forgotten; the system message stays" if desk.conversation.system else "forgotten")


def slash_undo(desk: Desk, view: View, words: str) -> None:
    """/undo  Take back the last question and its answer."""
    gone = desk.conversation.undo()
    desk.save()
    view.say(f"taken back: {_shown(gone[0])}")


def slash_retry(desk: Desk, view: View, words: str) -> Iterator[Event]:
    """/retry  Answer the last question again, by another draw."""
    before = list(desk.conversation.messages)
    desk.conversation.drop_answer()
    return desk.answer_again(before)


def slash_edit(desk: Desk, view: View, words: str) -> Iterator[Event] | None:
    """/edit [TEXT]  Put the last question in other words and answer it."""
    at = desk.conversation.last("user")
    message = desk.conversation.messages[at]
    text = words or view.edit("question", message.get("question", message["content"]))
    if not text:
        return None
    if desk.talk.index is not None:  # other words find other passages
        desk.conversation.undo()
        return desk.ask(text)
    before = list(desk.conversation.messages)
    desk.conversation.replace_question(text)
    return desk.answer_again(before)


def slash_branch(desk: Desk, view: View, words: str) -> None:
    """/branch [NAME]  List the branches, go to one, or begin a new one here."""
    if words:
        name = named_branch(desk.conversation, words)
        is_new = desk.conversation.switch(name)
        desk.save()
        view.say(f"{'a new branch' if is_new else 'now on'} {name}: {len(desk.conversation.messages)} messages")
        return
    view.say("  ".join(f"*{name}" if name == desk.conversation.branch else name for name in desk.conversation.names()))


def slash_save(desk: Desk, view: View, words: str) -> None:
    """/save [FILE]  Keep the conversation in a file, from now on after every turn."""
    if not desk.conversation.messages:
        raise UserError("nothing was said yet")
    if words:
        desk.session_path = Path(words).expanduser()
    if desk.session_path is None:
        raise UserError("no file is named", hint="/save FILE")
    desk.save()
    view.say(f"saved in {desk.session_path}")


def slash_load(desk: Desk, view: View, words: str) -> None:
    """/load FILE  Go on with a kept conversation."""
    for remark in desk.load(Path(_needed(words, "/load FILE")).expanduser()):
        view.say(remark)
    view.say(f"{len(desk.conversation.messages)} messages, branch {desk.conversation.branch}")


def slash_params(desk: Desk, view: View, words: str) -> None:
    """/params [temperature=0.2 …]  Show or change settings of sampling."""
    fields = {field.name: field for field in dataclasses.fields(Sampling)}
    changes = {}
    for word in words.replace(",", " ").split():
        key, equals, text = word.partition("=")
        name = key.replace("-", "_")
        name = {"temp": "temperature", "n": "max_new_tokens"}.get(name, name)
        if not equals or name not in fields:
            raise UserError(
                f"/params: no setting {key!r}", did_you_mean(name, fields) or f"known are {', '.join(fields)}"
            )
        changes[name] = _value(name, text, fields[name].type)
    if (changes.get("num_beams") or 1) > 1:
        raise UserError("/params: num_beams searches; a chat draws its answers", "llmctl generate --num-beams")
    desk.change_sampling(changes)
    said = [f"{name}={value}" for name, value in vars(desk.talk.sampling).items() if value not in (None, ())]
    view.say(f"{' '.join(said)}; the rest is as the checkpoint says")


def slash_model(desk: Desk, view: View, words: str) -> None:
    """/model [PATH]  Show the model, or go on with another one."""
    if words:
        desk.use(desk.open(str(Path(words).expanduser())))
        desk.adapters = []
    view.say(_described(desk))


def slash_adapter(desk: Desk, view: View, words: str) -> None:
    """/adapter [PATH[:WEIGHT] | -]  Show the adapters, put one more beside the model, or take all away."""
    if words:
        wanted = [] if words == "-" else [*desk.adapters, str(Path(words).expanduser())]
        desk.use(desk.open(desk.engine.name, wanted))
        desk.adapters = wanted
    view.say(f"adapters: {', '.join(desk.adapters) or 'none'}")


def slash_attach(desk: Desk, view: View, words: str) -> None:
    """/attach FILE  Add a text file to the next question, as data."""
    path = Path(_needed(words, "/attach FILE")).expanduser()
    try:
        content = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if content is None:
        raise UserError(f"{path}: no such file")
    if b"\0" in content:
        raise UserError(f"{path}: no text file")
    if len(content) > MAX_ATTACHED:
        raise UserError(f"{path}: {len(content)} bytes; {MAX_ATTACHED} at most can be attached")
    desk.attached.append((path.name, content.decode("utf-8-sig", "replace")))
    view.say(f"{path.name}: {len(content)} bytes, goes with the next question")


def slash_tokens(desk: Desk, view: View, words: str) -> None:
    """/tokens  Show how many tokens each message and the context have."""
    for line in probing.token_counts(desk.talk):
        view.say(line)


def slash_logprobs(desk: Desk, view: View, words: str) -> None:
    """/logprobs [N]  Show how likely each token of the last answer was, and the N likeliest beside it."""
    n_top = int(words) if words.isdecimal() else 3
    for line in probing.logprob_lines(desk.talk, n_top):
        view.say(line)


def slash_compact(desk: Desk, view: View, words: str) -> None:
    """/compact  Put a summary by the model in the place of all but the last turn."""
    view.say(shortening.compact(desk.talk))
    desk.save()


def slash_fix(desk: Desk, view: View, words: str) -> None:
    """/fix [TEXT]  Say what the last answer should have been; it is kept for finetune."""
    conversation = desk.conversation
    answer = conversation.messages[conversation.last("assistant")]["content"]
    text = words or view.edit("answer", answer)
    if text is None:
        return
    told, preferred = corrections.append(
        desk.settings.fixes, _plain(conversation.prompt_of_last_answer()), answer, text
    )
    conversation.replace_answer(text)
    desk.save()
    view.say(f"kept in {told} and {preferred}; llmctl finetune {desk.engine.name} {told}")


def slash_compare(desk: Desk, view: View, words: str) -> None:
    """/compare MODEL2  Answer the last question by another model too, blind, and vote."""
    from llmctl.arena.comparing import compare

    compare(desk, view, _needed(words, "/compare MODEL2"))


def slash_tools(desk: Desk, view: View, words: str) -> None:
    """/tools [NAMES | -]  Show the tools, or say which the model may call: calculator,python,files."""
    settings = desk.settings
    if words:
        limits = (settings.files_dir, settings.tool_seconds, settings.tool_megabytes)
        try:
            desk.use_tools(None if words == "-" else toolbox.named([words], *limits))
        except CalledWrongly as error:
            raise UserError(error.message.removeprefix("--tools: "), error.hint) from error
    layer = desk.talk.tools
    if layer is None:
        view.say("tools: none")
        return
    how = "the chat template tells the model" if layer.format.is_known else "described in the system message"
    view.say(f"tools: {', '.join(layer.toolbox.tools)}; {how}, calls are in the form of {layer.format.name}")


def _needed(words: str, form: str) -> str:
    if not words:
        raise UserError(f"{form}: the name is missing")
    return words


def _value(name: str, text: str, annotation: str):
    kind = annotation.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        return {"int": int, "float": float}[kind](text) if kind in ("int", "float") else (text,)
    except (KeyError, ValueError):
        raise UserError(f"/params: {name} is {text!r}; expected a value of type {kind}") from None


def _described(desk: Desk) -> str:
    config, engine = desk.engine.session.model.config, desk.engine
    room = f"a context of {engine.room} tokens" if engine.room else "no limit to its context"
    plain = "; it has no chat template, so it reads a plain transcript" if engine.prompt.is_plain else ""
    return f"{engine.name}: {config.family}, {room}{plain}"


def _shown(message: dict) -> str:
    text = " ".join(message.get("question", message["content"]).split())
    return text if len(text) <= 60 else f"{text[:60]}…"


def _plain(messages: list[dict]) -> list[dict]:
    """Without what only this program keeps beside a message."""
    own = ("question", "is_result", "from_elsewhere")
    return [{key: value for key, value in message.items() if key not in own} for message in messages]
