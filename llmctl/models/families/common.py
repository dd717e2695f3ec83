"""What the family files share: the rows of a weight table and the names of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmctl.models.config import Activation, Block, Classifier

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_ACTIVATIONS: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def usual_heads(width: int) -> int:
    """Of 64 where that divides the width, of 32 in narrow models."""
    return width // (64 if width >= 512 and width % 64 == 0 else 32)


@dataclass(frozen=True)
class Row:
    """One tensor of a Hugging Face file and the parameter or parameters of ours that it holds.

    Each `{}` stands for a number (of a layer, of an expert), the same and in the same order in all names. `change` names
    what models.weights does to the tensor, both ways: "rename" nothing, "split_rows" cuts a matrix [sum of out, in] into our
    Linears, "split_columns" a transposed one [in, sum of out] (or its bias), and "as_row" makes a vector a matrix of one row.
    The row is for models that have all parameters of ours named `beside`, and none of those `without`.
    """

    theirs: str
    ours: tuple[str, ...]
    change: str = "rename"
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def row(theirs: str, *ours: str, change: str = "rename", beside: str | None = None, without: str | None = None) -> Row:
    return Row(theirs, ours, change, *(() if name is None else (name,) for name in (beside, without)))


DECODERS_END = Classifier(at="last", dense=True, bias=True)
"""An encoder-decoder's classifier, with these weights."""
DECODERS_END_WEIGHTS = tuple(
    row(f"classification_head.{theirs}.{kind}", f"classifier.{ours}.{kind}")
    for theirs, ours in (("dense", "dense"), ("out_proj", "out"))
    for kind in ("weight", "bias")
)
SCORE = row("score.weight", "classifier.out.weight")
"""Of a classifier that is one matrix."""


def shortest(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """The fewest blocks that, repeated, give the same stack."""
    for length in range(1, len(blocks)):
        if all(block == blocks[i % length] for i, block in enumerate(blocks)):
            return tuple(blocks[:length])
    return tuple(blocks)
