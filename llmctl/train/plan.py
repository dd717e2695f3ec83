"""What a run is going to do, decided once and recorded: a run that goes on follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from llmctl import lineage
from llmctl.errors import CalledWrongly, UserError
from llmctl.train.settings import RunSettings

S = TypeVar("S", bound=RunSettings)

_FREE_TO_CHANGE = {"save_every", "keep", "log_every", "log", "validate_every", "resume", "dry_run", "threads"}
"""Flags that may differ when a run goes on, because they do not touch what it computes."""


@dataclass(kw_only=True)
class Plan:
    """The resolved run; `hf_config` is the model's config.json, `total_steps` None until a time budget is turned into steps."""

    settings: dict[str, Any]
    inputs: list[str]
    data_sha256: str
    tokenizer_sha256: str
    hf_config: dict[str, Any]
    seq_len: int
    batch_size: int
    micro_batch_size: int | None
    precision: str
    compile: bool
    learning_rate: float
    embedding_learning_rate: float
    threads: int
    parent_sha256: str | None = None
    versions: dict[str, str] = field(default_factory=lineage.versions)
    rows_per_epoch: int = 1
    total_steps: int | None = None
    length_fixed_at: int = 0
    """The step from which on the schedule knows `total_steps`: a time budget is turned into steps after a few of them."""

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def epochs(self) -> float:
        return (self.total_steps or 0) * self.batch_size / self.rows_per_epoch

    @classmethod
    def read(cls, content: dict[str, Any]) -> Plan:
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in content.items() if key in known})


def fixed_steps(settings: RunSettings, plan: Plan) -> int | None:
    """Steps where a flag fixes them; None where time decides."""
    if settings.steps is not None:
        return settings.steps
    if settings.tokens is not None:
        return max(1, round(settings.tokens / plan.tokens_per_step))
    if settings.epochs is not None:
        return max(1, round(settings.epochs * plan.rows_per_epoch / plan.batch_size))
    return None


def refuse_contradictions(settings: RunSettings, *exclusive: tuple[Sequence[str], str]) -> None:
    """Raise CalledWrongly for flags that exclude each other, before anything is read.

    `exclusive` are the task's own: names of settings of which one at most may be given, and what they all say.
    """
    for names, purpose in (
        (("steps", "tokens", "epochs", "time"), "say how long to train"),
        *exclusive,
        (("resume", "overwrite"), "say what becomes of the output"),
    ):
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(settings, name)]
        if len(given) > 1:
            raise CalledWrongly(f"{given[0]} and {given[1]} both {purpose}", "give one of them")


def resumed_settings(settings: S, plan: Plan, given: frozenset[str]) -> S:
    """The recorded settings. Raises CalledWrongly for a flag given now that would change what the run computes."""
    known = {field.name for field in fields(settings)}
    recorded = {key: tuple(v) if isinstance(v, list) else v for key, v in plan.settings.items() if key in known}
    for name in sorted(given & known - _FREE_TO_CHANGE):
        if getattr(settings, name) != recorded[name]:
            flag, value = "--" + name.replace("_", "-"), recorded[name]
            has = "was started without it" if value is None else f"has {value}"
            raise CalledWrongly(
                f"{flag} {getattr(settings, name)}: the run to resume {has}",
                hint="leave the flag out to go on, or start anew with --overwrite",
            )
    now = {name: getattr(settings, name) for name in given & _FREE_TO_CHANGE}
    return replace(type(settings)(**recorded), **{**now, "resume": True, "overwrite": False})


def refuse_other_data(plan: Plan, data_sha256: str, inputs: list[str]) -> None:
    """Raise UserError where a run to go on with would read other data than it began with."""
    if plan.data_sha256 != data_sha256:
        raise UserError(
            f"the run began with the tokens {plan.data_sha256[:12]}; {' '.join(inputs)} holds {data_sha256[:12]}",
            hint="put the old file back, or start anew with --overwrite",
        )
