"""Flags of `llmctl quantize` that say nothing to the format or method they stand beside. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from llmctl.errors import CalledWrongly
from llmctl.quantize.scheme import PLAIN
from llmctl.quantize.settings import QuantizeSettings

_INTEGERS, _TABLES = ("int8", "int4"), ("nf4", "fp4")


def refuse(settings: QuantizeSettings, typed: Collection[str] = ()) -> None:
    """Raise CalledWrongly for a field that would change nothing, though its value is not the default or it is among `typed`,
    and for a method without the text that it needs."""
    asked = {field.name for field in dataclasses.fields(settings) if getattr(settings, field.name) != field.default}
    asked |= set(typed)
    for name, purpose, here in _idle(settings):
        if name in asked:
            flag = name.replace("_", "-")
            said = f" {settings.method}" if name == "method" else ""
            raise CalledWrongly(f"--{flag}{said} is for {purpose}, not {here}")
    if settings.method != "rtn" and settings.calibration is None:
        raise CalledWrongly(
            f"--method {settings.method} needs text like what the model will read",
            hint="--calibration FILE, or - for a pipe",
        )


def _idle(settings: QuantizeSettings) -> Iterator[tuple[str, str, str]]:
    """Fields that are not looked at, what they are for, and what stands there."""
    form = settings.format
    if form not in _INTEGERS:
        yield from ((name, "int8 and int4", form) for name in ("method", "group_size", "symmetric"))
    if form not in _TABLES:
        yield "double_quantization", "nf4 and fp4", form
    if form != "int4":
        yield "target_bits", "int4, which it mixes with 8 bits", form
    if form in PLAIN:
        yield from ((name, "formats of few bits", form) for name in ("keep", "bits"))
    if settings.method != "gptq":
        yield from ((name, "--method gptq", settings.method) for name in ("act_order", "damping"))
    if settings.calibration is None:
        names = ("calibration_samples", "calibration_length")
        yield from ((name, "--calibration FILE", "the built-in texts of the check") for name in names)
