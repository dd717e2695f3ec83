"""How to continue a prompt: flags, rows of a file and the checkpoint's own defaults, laid over each other. No torch here."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmctl.errors import CalledWrongly, UserError

MIN_TEMPERATURE = 1e-5  # below it logits overflow before the likeliest token's share differs from 1
LIMITS = {
    "at_least": (operator.ge, "at least"),
    "at_most": (operator.le, "at most"),
    "above": (operator.gt, "more than"),
}


def _setting(help: str, default: str | bool = True, **metadata: Any) -> Any:
    return field(default=None, metadata={"help": help, "show_default": default, "group": "Sampling", **metadata})


def _checked_stops(stops: Any) -> tuple[str, ...]:
    stops = tuple(stops) if isinstance(stops, (list, tuple)) else (stops,)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise CalledWrongly(f"stop is {text!r}; expected a text of at least one character")
    return stops


def _flag(item: dataclasses.Field) -> str:
    return item.name.replace("_", "-")


def _check_type(item: dataclasses.Field, value: Any) -> None:
    expected = item.type.removesuffix(" | None")
    kinds = {"int": int, "float": (int, float), "bool": bool}[expected]
    is_right = isinstance(value, kinds) and isinstance(value, bool) == (expected == "bool") and math.isfinite(value)
    if not is_right:
        names = {"int": "a whole number", "float": "a number", "bool": "true or false"}
        raise CalledWrongly(f"{_flag(item)} is {value!r}; expected {names[expected]}")


@dataclass(frozen=True)
class Sampling:
    """The settings of one sequence. None means that this layer says nothing; `resolve` fills it from the next one."""

    max_new_tokens: int | None = _setting(
        "Stop after this many tokens.", "256", flags=["-n"], type="count", at_least=1, group="Length"
    )
    stop: tuple[str, ...] | None = _setting(
        "Stop where this text would appear, and leave it out; repeatable.", False, metavar="TEXT", group="Length"
    )
    ignore_eos: bool | None = _setting("Go on past the end-of-text token.", False, group="Length")
    temperature: float | None = _setting(
        "Divide logits by this; 0 always takes the likeliest token.", "0.8", flags=["--temp"], at_least=0
    )
    top_k: int | None = _setting("Draw from the K likeliest tokens; 0 is no limit.", "0", at_least=0)
    top_p: float | None = _setting(
        "Of what top-k left, draw from the likeliest that together reach this probability.", "1", above=0, at_most=1
    )
    min_p: float | None = _setting(
        "Drop tokens less likely than this share of the likeliest.", "0", at_least=0, at_most=1
    )
    repetition_penalty: float | None = _setting(
        "Divide positive and multiply negative logits of tokens in the prompt or the text so far.", "1", above=0
    )
    presence_penalty: float | None = _setting("Subtract from logits of tokens generated before.", "0")
    frequency_penalty: float | None = _setting("Subtract for each time that a token was generated.", "0")
    seed: int | None = _setting(
        "The same seed gives the same text, in float32 at any batch size.",
        "a random one",
        at_least=0,
        at_most=2**64 - 1,
    )
    logprobs: int | None = _setting(
        "Report the log-probability of each token, and of the N likeliest beside it.", False, metavar="N", at_least=0
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None:
                continue
            if item.name == "stop":
                object.__setattr__(self, "stop", _checked_stops(value))
                continue
            _check_type(item, value)
            for name, (holds, words) in LIMITS.items():
                if name in item.metadata and not holds(value, item.metadata[name]):
                    raise CalledWrongly(f"{_flag(item)} is {value}; expected {words} {item.metadata[name]}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1


DEFAULTS = Sampling(
    max_new_tokens=256,
    stop=(),
    ignore_eos=False,
    temperature=0.8,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=0,
)


def resolve(*layers: Sampling) -> Sampling:
    """Every setting from the first layer that has it, and from `DEFAULTS` in the end."""
    values = {}
    for item in dataclasses.fields(Sampling):
        said = (getattr(layer, item.name) for layer in (*layers, DEFAULTS))
        values[item.name] = next((value for value in said if value is not None), None)
    return Sampling(**values)


def read_generation_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The checkpoint's generation_config.json; empty where it has none."""
    path = Path(directory, "generation_config.json")
    if not path.exists():
        return {}
    from llmctl.files import read_json

    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def sampling_from(generation_config: dict[str, Any]) -> Sampling:
    """What a checkpoint recommends. Keys that are no setting here are other programs' business.

    Raises `UserError` for a value that cannot be.
    """
    known = {item.name for item in dataclasses.fields(Sampling)} - {"stop", "seed", "logprobs"}
    values = {name: value for name, value in generation_config.items() if name in known}
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return Sampling(**values)
    except CalledWrongly as error:
        raise UserError(f"generation_config.json: {error.message}") from error


def eos_ids(generation_config: dict[str, Any], config: dict[str, Any], tokenizer_eos_id: int | None) -> frozenset[int]:
    """The ids that end a text: of the first of generation_config.json, config.json and the tokenizer that names any."""
    for named in (generation_config.get("eos_token_id"), config.get("eos_token_id"), tokenizer_eos_id):
        if named is not None:
            return frozenset(named if isinstance(named, list) else [named])
    return frozenset()


def _flag_of(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Run:
    """How `llmctl generate` runs as a whole, whatever the prompts."""

    num_samples: int = _flag_of(1, "Complete each prompt N times.", type="count", at_least=1, metavar="N")
    jsonl: bool = _flag_of(False, "Read and write JSON Lines, many prompts at once.", show_default=False)
    batch_size: int = _flag_of(32, "Sequences that run together.", type="count", at_least=1)
    echo: bool = _flag_of(True, "Print the prompt before its continuation.")
    stats: bool = _flag_of(
        False, "Report seed, time to the first token and tokens/s on standard error.", show_default=False
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag_of("auto", "Weights and cache; auto is as stored.")
    device: str | None = _flag_of(None, "cpu, cuda, cuda:1.", show_default="a GPU where there is one", metavar="NAME")
