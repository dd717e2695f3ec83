"""The labels of a set as numbers: classes, sets of classes, or measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmctl.errors import UserError


class LabelTable:
    """Numbers the names of classes as they appear; `names` gives them in their final order.

    With `known` names, those of a model that has classes already, or once `seal`ed, another name raises `UserError`.
    """

    def __init__(self, objective: str, known: Sequence[str] | None = None):
        self._objective = objective
        self._codes: dict[str, int] = {name: code for code, name in enumerate(known or ())}
        self._known, self._sealed = known, known is not None
        self._rows: list[float | int | tuple[int, ...]] = []
        self.is_multiple = False

    def seal(self) -> None:
        """From here on the labels are those of held-out rows, which teach nothing."""
        self._sealed = True

    def add(self, label: Any) -> None:
        """Take up a label that `normal_label` gave."""
        if self._objective != "classify":
            self._rows.append(label)
        else:
            self.is_multiple |= isinstance(label, list)
            names = label if isinstance(label, list) else [label]
            self._rows.append(tuple(sorted({self._code(name) for name in names})))

    @property
    def names(self) -> list[str] | None:
        """Class names by number: those known, else sorted; numbers by size. None where there are no classes."""
        if self._objective != "classify":
            return None
        return list(self._known) if self._known is not None else sorted(self._codes, key=_order)

    def array(self) -> np.ndarray:
        """Classes int64 [n], sets of classes float32 [n, n_classes] of 0 and 1, or measures float64 [n]."""
        if self._objective != "classify":
            return np.array(self._rows, np.float64 if self._objective == "regress" else np.int64)
        numbers = {name: number for number, name in enumerate(self.names)}
        final = np.array([numbers[name] for name in self._codes], np.int64)
        if not self.is_multiple:
            return final[np.array([code for (code,) in self._rows], np.int64)]
        sets = np.zeros((len(self._rows), len(numbers)), np.float32)
        for row, codes in enumerate(self._rows):
            sets[row, final[list(codes)]] = 1
        return sets

    def _code(self, name: str) -> int:
        if name not in self._codes and self._sealed:
            seen = ", ".join(map(repr, list(self._codes)[:10]))
            raise UserError(f"the label {name!r} is unseen in training, which has {seen}")
        return self._codes.setdefault(name, len(self._codes))


def normal_label(objective: str, label: Any) -> str | list[str] | float | int:
    """A label as its objective takes it: the name of a class, a list of names, a measure, or 0 or 1 for kto.

    Raises `UserError` for another.
    """
    if objective == "kto":
        return int(label)
    if objective == "regress":
        return _measure(label)
    return [_name(each) for each in label] if isinstance(label, list) else _name(label)


def _name(label: Any) -> str:
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if not isinstance(label, (str, int)):
        raise UserError(
            f"label: expected the name of a class, got {label!r}", hint="--objective regress learns numbers"
        )
    return str(label)


def _measure(label: Any) -> float:
    try:
        number = float(label)
    except (TypeError, ValueError):
        raise UserError(f"label: expected a number, got {label!r}", hint="--objective classify learns names") from None
    if not math.isfinite(number):
        raise UserError(f"label: expected a finite number, got {label!r}")
    return number


def _order(name: str) -> tuple:
    return (0, int(name), "") if name.lstrip("-").isdecimal() else (1, 0, name)
