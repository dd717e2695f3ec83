"""How a command that asks a model opens it: flags that mean the same wherever they stand. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def flag(default: Any, help: str, group: str = "Options", **metadata: Any) -> Any:
    """A field of settings: `options.settings` makes a flag of it."""
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class ModelSettings:
    adapter: tuple[str, ...] = flag(
        (), "Put this adapter beside the model's weights; repeatable.", metavar="PATH[:WEIGHT]"
    )
    force: bool = flag(False, "Use an adapter that was trained on another base.", show_default=False)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "Weights and cache; auto is as stored.")
    device: str | None = flag(None, "cpu, cuda, cuda:1.", show_default="a GPU where there is one", metavar="NAME")
    provider: str | None = flag(
        None,
        "Of onnxruntime, for a MODEL that export-onnx wrote: cpu, cuda, or its own name for one.",
        show_default="what suits the device",
        metavar="NAME",
    )
