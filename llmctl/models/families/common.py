"""What the family files share: the rows of a weight table, activation names, and the two spellings of RoPE settings."""

from __future__ import annotations

from dataclasses import dataclass

from llmctl.models.config import Activation, Rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
HF_ACTIVATIONS: dict[Activation, str] = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


@dataclass(frozen=True)
class Row:
    """One tensor of a Hugging Face file and the parameter or parameters of ours that it holds.

    Each `{}` stands for a number (of a layer, of an expert), the same and in the same order in all names. `change` names
    what models.weights does to the tensor, both ways: "rename" nothing, "split_rows" cuts a matrix [sum of out, in] into our
    Linears, "split_columns" a transposed one [in, sum of out] (or its bias), and "as_row" makes a vector a matrix of one row.
    With `beside` or `without` the row is for models that have, or lack, that parameter of ours.
    """

    theirs: str
    ours: tuple[str, ...]
    change: str = "rename"
    beside: str | None = None
    without: str | None = None


def row(
    theirs: str, *ours: str, change: str = "rename", beside: str | None = None, without: str | None = None
) -> Row:
    return Row(theirs, ours, change, beside, without)


def rope_from_hf(hf: dict) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    settings = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = settings.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
    if "type" in settings:
        settings["rope_type"] = settings.pop("type")
    return Rope(theta, settings if settings.get("rope_type", "default") != "default" else None)


def rope_to_hf(rope: Rope) -> dict:
    """The older spelling, which every release of transformers and vllm reads."""
    return {"rope_theta": rope.theta, "rope_scaling": rope.scaling, "rope_parameters": None}
