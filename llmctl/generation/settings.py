"""How to continue a prompt: flags, rows of a file and the checkpoint's own defaults, laid over each other. No torch here."""

from __future__ import annotations

import dataclasses
import math
import operator
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmctl.errors import CalledWrongly, UserError
from llmctl.model_settings import ModelSettings, flag

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


_DRAWING = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Settings of a random draw, and at which value each has no part in a search."""


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
    min_new_tokens: int | None = _setting(
        "No end-of-text token before this many others.", "0", type="count", at_least=0, group="Length"
    )
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
    no_repeat_ngram_size: int | None = _setting(
        "No run of N tokens occurs twice in prompt and text; 0 is no limit.", "0", metavar="N", at_least=0
    )
    num_beams: int | None = _setting(
        "Search for the likeliest text with N candidates at a time, in place of drawing one.",
        "1",
        type="count",
        metavar="N",
        at_least=1,
        group="Beam search",
    )
    length_penalty: float | None = _setting(
        "A text's score is its log-probability over its length to this power: more favours longer texts.",
        "1",
        group="Beam search",
    )
    early_stopping: bool | None = _setting(
        "Stop at as many complete texts as there are beams, without looking for better ones.",
        False,
        group="Beam search",
    )
    seed: int | None = _setting(
        "The same seed gives the same text, at any batch size.",
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
        drawing = [name for name, neutral in _DRAWING.items() if getattr(self, name) not in (None, neutral)]
        if self.searches and drawing:
            raise CalledWrongly(
                f"num-beams {self.num_beams} is a search, which draws nothing: {drawing[0].replace('_', '-')} has no part",
                hint="leave one of them out",
            )

    @property
    def searches(self) -> bool:
        """Whether it looks for the likeliest text rather than choosing token by token."""
        return self.num_beams is not None and self.num_beams > 1

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
    no_repeat_ngram_size=0,
    min_new_tokens=0,
    num_beams=1,
    length_penalty=1.0,
    early_stopping=False,
    seed=0,
)


def resolve(*layers: Sampling) -> Sampling:
    """Every setting from the first layer that has it, and from `DEFAULTS` in the end.

    Between a search with beams and a draw with a temperature the first layer decides that asks for either.
    """
    values = {}
    for item in dataclasses.fields(Sampling):
        said = (getattr(layer, item.name) for layer in (*layers, DEFAULTS))
        values[item.name] = next((value for value in said if value is not None), None)
    asking = next(layer for layer in (*layers, DEFAULTS) if layer.num_beams is not None or layer.temperature)
    values |= _DRAWING if asking.searches else {"num_beams": 1}
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


def sampling_from(generation_config: dict[str, Any], has_source: bool = False) -> Sampling:
    """What a checkpoint recommends. Keys that are no setting here are other programs' business.

    Models that turn a source into another text (`has_source`) draw only where the file says so, and the file's limits
    count the token that such a text begins with. Raises `UserError` for a value that cannot be.
    """
    known = {item.name for item in dataclasses.fields(Sampling)} - {"stop", "seed", "logprobs"}
    values = {name: value for name, value in generation_config.items() if name in known}
    if values.get("early_stopping") == "never":
        del values["early_stopping"]
    searches = (values.get("num_beams") or 1) > 1
    draws = generation_config.get("do_sample")
    if draws is False or draws is None and (has_source or searches):
        values |= _DRAWING if searches else {"temperature": 0.0}
    elif searches:
        del values["num_beams"]
    for name, limit in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if has_source and values.get(name) is None and generation_config.get(limit):
            values[name] = generation_config[limit] - 1
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


@dataclass(frozen=True)
class Marks:
    """The tokens at the edges of the texts that a checkpoint writes.

    Each of `ends` ends one; `start` is what a decoder with a source reads first; `first` is always the first new token of
    such a text, and `last` the last where the length ends it.
    """

    ends: frozenset[int] = frozenset()
    start: int | None = None
    first: int | None = None
    last: int | None = None


NO_MARKS = Marks()


def read_marks(generation_config: dict[str, Any], config: dict[str, Any], tokenizer_eos_id: int | None) -> Marks:
    """From generation_config.json, or else config.json."""
    said = {**config, **{name: value for name, value in generation_config.items() if value is not None}}
    start = said.get("decoder_start_token_id")
    return Marks(
        ends=eos_ids(generation_config, config, tokenizer_eos_id),
        start=said.get("bos_token_id") if start is None else start,
        first=said.get("forced_bos_token_id"),
        last=said.get("forced_eos_token_id"),
    )


@dataclass(frozen=True)
class Run(ModelSettings):
    """How `llmctl generate` runs as a whole, whatever the prompts."""

    num_samples: int = flag(
        1, "Complete each prompt N times; with beams, give the N best.", type="count", at_least=1, metavar="N"
    )
    jsonl: bool = flag(False, "Read and write JSON Lines, many prompts at once.", show_default=False)
    batch_size: int = flag(32, "Sequences that run together.", type="count", at_least=1)
    echo: bool | None = flag(
        None, "Print the prompt before the text.", show_default="where the model continues its prompt"
    )
    stats: bool = flag(
        False, "Report seed, time to the first token and tokens/s on standard error.", show_default=False
    )
