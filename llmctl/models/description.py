"""A stack in words: each kind of block that it has, and in which layers. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from llmctl.models.config import Block, ModelConfig


def blocks(config: ModelConfig) -> dict[str, str]:
    """For each kind of block its layers ("0-4, 6"), and every value of its parts that is not the default."""
    kinds: list[tuple[Block, list[int]]] = []
    for layer in range(config.n_layers):
        block = config.block(layer)
        layers = next((layers for kind, layers in kinds if kind == block), None)
        if layers is None:
            kinds.append((block, [layer]))
        else:
            layers.append(layer)
    return {_ranges(layers): _parts(block) for block, layers in kinds}


def head(config: ModelConfig) -> str:
    """What the model gives for a text."""
    if config.classifier is not None:
        return f"classifier, {config.classifier.in_words}"
    if config.head is None:
        return "none"
    return "language model, tied to the embedding" if config.tie_embeddings else "language model"


def _parts(block: Block) -> str:
    words = [_in_words(part) for part in block.branches]
    return "; ".join([*words, f"{_in_words(block.norm)} {block.norm_placement}"])


def _in_words(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        fields = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        told = (f"{field.name} {_in_words(content)}" for field, content in fields if content != field.default)
        return f"{type(value).__name__}({', '.join(told)})"
    if isinstance(value, dict):  # of a rope's scaling: the long lists say nothing to a person
        short = (f"{key} {_in_words(content)}" for key, content in value.items() if not isinstance(content, list))
        return f"({', '.join(short)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """0-2, 4: ascending numbers, neighbours joined."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
