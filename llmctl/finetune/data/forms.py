"""The forms that rows come in, recognized by their keys and turned into the few kinds of example there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmctl.errors import CalledWrongly, UserError, did_you_mean
from llmctl.finetune.data.messages import check_order, from_openai, from_sharegpt, tools_of


@dataclass(frozen=True)
class Chat:
    """Messages for a chat template; the first `n_prompt` of them are given, and nothing of them is learned."""

    messages: list[dict]
    tools: list[dict] | None = None
    n_prompt: int = 0


@dataclass(frozen=True)
class Completion:
    """Text that goes on as it stands, without a template."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Labelled:
    """`label` as the row has it: a name, a number, or a list of names."""

    text: str
    label: Any


@dataclass(frozen=True)
class Preference:
    chosen: Chat | Completion
    rejected: Chat | Completion


@dataclass(frozen=True)
class Rated:
    answer: Chat | Completion
    is_desirable: bool


Value = Chat | Completion | Text | Labelled | Preference | Rated


class Form(NamedTuple):
    """A row has this form when it has all of `keys`; `serves` are its objectives, the first by default."""

    name: str
    keys: frozenset[str]
    serves: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], Value]


PREFERENCES = ("dpo", "orpo", "simpo", "reward")


def recognize(row: Mapping[str, Any], objective: str | None) -> Form:
    """The first form in the list that the row has and the objective takes. Raises `UserError`."""
    having = [form for form in FORMS if form.keys <= row.keys()]
    fitting = next((form for form in having if objective is None or objective in form.serves), None)
    if fitting is not None:
        return fitting
    keys = ", ".join(map(repr, row)) or "none"
    wanted = [form for form in FORMS if objective is None or objective in form.serves]
    known = "; ".join(" + ".join(sorted(form.keys)) for form in wanted)
    needs = f"the objective {objective} needs" if objective else "no known form; one of these is needed:"
    raise UserError(f"the keys are {keys}; {needs} {known}", hint="--columns NEW=OLD,… renames them")


def default_objective(row: Mapping[str, Any]) -> str:
    """What a row is for where nobody says it."""
    form = recognize(row, None)
    if form.name == "text + label" and _is_measure(_label(row)):
        return "regress"
    return form.serves[0]


def parse_columns(pairs: tuple[str, ...]) -> dict[str, str]:
    """{new: old} from "new=old,new=old". Raises `CalledWrongly`."""
    columns = {}
    for pair in ",".join(pairs).split(",") if pairs else ():
        new, equals, old = (part.strip() for part in pair.partition("="))
        if not (new and equals and old):
            raise CalledWrongly(f"--columns: expected NEW=OLD, got {pair!r}")
        if new not in _KNOWN_KEYS:
            raise CalledWrongly(
                f"--columns: no form has a key {new!r}",
                hint=did_you_mean(new, _KNOWN_KEYS) or f"the keys are {', '.join(sorted(_KNOWN_KEYS))}",
            )
        columns[new] = old
    return columns


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """The row under the forms' own keys. Raises `UserError` for a column that it does not have."""
    if not columns:
        return row
    for old in columns.values():
        if old not in row:
            raise UserError(f"no column {old!r}; the row has {', '.join(map(repr, row))}", did_you_mean(old, row))
    rest = {key: value for key, value in row.items() if key not in columns.values()}
    return {**rest, **{new: row[old] for new, old in columns.items()}}


# --- one function per form ---


def _messages(row: Mapping[str, Any]) -> Chat:
    return _chat(from_openai(row["messages"]), row)


def _conversations(row: Mapping[str, Any]) -> Chat:
    messages = from_sharegpt(row["conversations"])
    if row.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return _chat(messages, row)


def _instruction(row: Mapping[str, Any]) -> Chat:
    return _chat([*_instruction_messages(row), {"role": "assistant", "content": _filled(row, "output")}], row)


def _completion(row: Mapping[str, Any]) -> Chat | Completion:
    return _answer(row, "completion")


def _plain_text(row: Mapping[str, Any]) -> Text:
    return Text(_filled(row, "text"))


def _text_and_label(row: Mapping[str, Any]) -> Labelled:
    return Labelled(_filled(row, "text"), _label(row))


def _preference(row: Mapping[str, Any]) -> Preference:
    return Preference(_answer(row, "chosen"), _answer(row, "rejected"))


def _rated(row: Mapping[str, Any]) -> Rated:
    label = row["label"]
    if isinstance(label, str):
        label = {"true": True, "false": False, "1": True, "0": False}.get(label.strip().lower(), label)
    if label not in (True, False):
        raise UserError(f"label: expected true or false, got {label!r}")
    return Rated(_answer(row, "completion"), bool(label))


FORMS = (
    Form("chosen + rejected", frozenset({"chosen", "rejected"}), PREFERENCES, _preference),
    Form("prompt + completion + label", frozenset({"prompt", "completion", "label"}), ("kto",), _rated),
    Form("messages", frozenset({"messages"}), ("sft", "causal", "seq2seq"), _messages),
    Form("conversations", frozenset({"conversations"}), ("sft", "causal", "seq2seq"), _conversations),
    Form("instruction + output", frozenset({"instruction", "output"}), ("sft", "causal", "seq2seq"), _instruction),
    Form("prompt + completion", frozenset({"prompt", "completion"}), ("sft", "causal", "seq2seq"), _completion),
    Form("text + label", frozenset({"text", "label"}), ("classify", "regress"), _text_and_label),
    Form("text + labels", frozenset({"text", "labels"}), ("classify",), _text_and_label),
    Form("text", frozenset({"text"}), ("causal", "mlm", "sft"), _plain_text),
)
_KNOWN_KEYS = {key for form in FORMS for key in form.keys} | {"input", "system", "tools"}


def _answer(row: Mapping[str, Any], key: str) -> Chat | Completion:
    """The prompt of the row with the answer under `key`: turns where either is turns, else plain text."""
    prompt, answer = _prompt(row), row[key]
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(prompt, _filled(row, key))
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": _filled(row, key)}]
    else:
        answer = from_openai(answer, key)
    # a whole conversation may stand under the key, the prompt in front of its last turn
    n_prompt = len(prompt) or len(answer) - 1
    return _chat([*prompt, *answer], row, n_prompt)


def _prompt(row: Mapping[str, Any]) -> str | list[dict]:
    if "instruction" in row and "prompt" not in row:
        return _instruction_messages(row)
    prompt = row.get("prompt", row.get("messages", ""))
    return prompt if isinstance(prompt, str) else from_openai(prompt, "prompt")


def _instruction_messages(row: Mapping[str, Any]) -> list[dict]:
    question = _filled(row, "instruction")
    if row.get("input"):
        question = f"{question}\n\n{_text(row, 'input')}"
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}]


def _chat(messages: list[dict], row: Mapping[str, Any], n_prompt: int = 0) -> Chat:
    check_order(messages)
    return Chat(messages, tools_of(row.get("tools")), n_prompt)


def _label(row: Mapping[str, Any]) -> Any:
    label = row["labels"] if "labels" in row else row["label"]
    if not isinstance(label, (str, int, float, list)):
        raise UserError(f"label: expected a name, a number or a list of names, got {type(label).__name__}")
    return label


def _is_measure(label: Any) -> bool:
    """Whether a label is a measured number rather than a class, which a CSV writes as text too."""
    if isinstance(label, str) and any(mark in label for mark in ".eE"):
        try:
            label = float(label)
        except ValueError:
            return False
    return isinstance(label, float)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise UserError(f"{key}: expected text, got {type(row[key]).__name__}")
    return row[key]


def _filled(row: Mapping[str, Any], key: str) -> str:
    text = _text(row, key)
    if not text.strip():
        raise UserError(f"{key}: is empty")
    return text
