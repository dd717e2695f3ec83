"""Numbers as people write and read them: 10M tokens, 64MB, 1h30m."""

from __future__ import annotations

import math
import re

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_BYTES = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgtp", start=1):
    _BYTES |= {_letter: 1000**_power, f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}
_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}

_NUMBER = r"[0-9][0-9_]*(?:\.[0-9_]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?"
_WITH_UNIT = re.compile(rf"({_NUMBER})\s*([a-z]*)", re.IGNORECASE)
_TIME_PART = re.compile(rf"({_NUMBER})\s*(d|h|min|m|sec|s)", re.IGNORECASE)


def parse_int(text: str | int) -> int:
    try:
        return int(text) if not isinstance(text, float) else _whole(text, str(text))
    except ValueError:
        raise ValueError(f"expected a whole number, got {text!r}") from None


def parse_float(text: str | float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"expected a number, got {text!r}")
    return number


def parse_count(text: str | int) -> int:
    """'10M', '2_000' or '1e6' as a whole number; units are powers of 1000."""
    return _scaled(text, _THOUSANDS, "a count such as 500, 10k, 10M or 1e6")


def parse_size(text: str | int) -> int:
    """'64MB' (powers of 1000) or '1GiB' (powers of 1024) as a whole number of bytes."""
    return _scaled(text, _BYTES, "a size such as 64MB or 1GiB")


def parse_duration(text: str | float) -> float:
    """'90s', '10m', '1h30m', or bare seconds, as seconds."""
    if isinstance(text, (int, float)):
        return float(text)
    text = text.strip()
    if re.fullmatch(_NUMBER, text, re.IGNORECASE):
        return float(text)
    parts = _TIME_PART.findall(text)
    if not parts or _TIME_PART.sub("", text).strip():
        raise ValueError(f"expected a duration such as 90s, 10m or 1h30m, got {text!r}")
    return sum(float(number) * _SECONDS[unit[0].lower()] for number, unit in parts)


def parse_interval(text: str | float) -> int | float:
    """'500' as a number of steps (an int), '10m' as seconds (a float)."""
    if isinstance(text, (int, float)):
        return text
    try:
        return parse_count(text) if not _TIME_PART.search(text) or text[-1] in "MBGT" else parse_duration(text)
    except ValueError:
        raise ValueError(f"expected a number of steps (500) or a duration (10m), got {text!r}") from None


def format_count(number: float) -> str:
    """At most four digits and a unit of 1000: 1234567 is 1.23M."""
    return _shortened(number, 1000, ["", "k", "M", "B", "T"])


def format_size(n_bytes: float) -> str:
    return _shortened(n_bytes, 1000, [" B", " kB", " MB", " GB", " TB", " PB"])


def format_duration(seconds: float) -> str:
    """The two largest units that matter: 59s, 1m 5s, 10m, 2h 10m."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    left = int(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, size)
        parts.append((amount, unit))
    first = next(i for i, (amount, _) in enumerate(parts) if amount)
    return " ".join(f"{amount}{unit}" for amount, unit in parts[first : first + 2] if amount)


def format_interval(interval: float) -> str:
    return format_duration(interval) if isinstance(interval, float) else f"{interval} steps"


def _scaled(text: str | int, units: dict[str, int], expected: str) -> int:
    if isinstance(text, int):
        return text
    match = _WITH_UNIT.fullmatch(str(text).strip())
    unit = units.get(match[2].lower()) if match else None
    if unit is None:
        raise ValueError(f"expected {expected}, got {text!r}")
    if re.fullmatch(r"[0-9_]+", match[1]):
        return int(match[1]) * unit
    return _whole(float(match[1]) * unit, text)


def _whole(number: float, text: str) -> int:
    if abs(number - round(number)) > 1e-6 * max(1.0, abs(number)):
        raise ValueError(f"expected a whole number, got {text!r}")
    return round(number)


def _shortened(number: float, base: int, units: list[str]) -> str:
    scale = 0
    while abs(number) >= base - 0.5 and scale < len(units) - 1:
        number /= base
        scale += 1
    digits = f"{number:.0f}" if number == int(number) or abs(number) >= 100 else f"{number:.3g}"
    return f"{digits}{units[scale]}"
