"""Training a part of a model's own weights."""

from __future__ import annotations

import re

from torch import nn

from llmctl.errors import CalledWrongly


def freeze(model: nn.Module, layers: str | None, modules: str | None) -> None:
    """Leave only these layers (a slice such as "-4:") and parameters (a regular expression found in the name) to train,
    and a classifier's head.

    Raises CalledWrongly for what selects nothing.
    """
    if layers is None and modules is None and model.config.classifier is None:
        raise CalledWrongly("--method freeze trains what --train-layers and --train-modules say, and neither is given")
    chosen = set() if layers is None else {f"layers.{i}." for i in _layers(layers, len(model.layers))}
    pattern = None if modules is None else _pattern(modules)
    for name, parameter in model.named_parameters():
        inside = name.startswith(("classifier.", *chosen))
        parameter.requires_grad_(inside or bool(pattern and pattern.search(name)))
    if pattern and not any(pattern.search(name) for name, _ in model.named_parameters()):
        raise CalledWrongly(f"--train-modules {modules!r} matches no parameter", "llmctl inspect lists the names")


def _layers(text: str, count: int) -> range:
    try:
        bounds = [int(part) if part else None for part in text.split(":")]
        chosen = range(count)[slice(*bounds)] if len(bounds) > 1 else range(count)[bounds[0] :][:1]
    except (ValueError, TypeError) as error:
        raise CalledWrongly(f"--train-layers {text!r}: expected a slice such as -4: or 0:2") from error
    if not chosen:
        raise CalledWrongly(f"--train-layers {text!r}: the model has {count} layers")
    return chosen


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise CalledWrongly(f"--train-modules {text!r}: not a regular expression: {error}") from error
