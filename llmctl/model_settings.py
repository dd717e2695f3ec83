"""How a command that asks a model opens it: flags that mean the same wherever they stand. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MODEL = "Model"


def flag(default: Any, help: str, group: str = "Options", **metadata: Any) -> Any:
    """A field of settings: `options.settings` makes a flag of it."""
    return field(default=default, metadata={"help": help, "group": group, **metadata})


@dataclass(frozen=True)
class EngineSettings:
    """What a model runs in and on."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "Weights and cache; auto is as stored.", MODEL
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = flag(
        "auto",
        "Keys and values of the text so far: int8 needs half of bfloat16's memory. auto is as the weights.",
        MODEL,
    )
    device: str | None = flag(
        None, "cpu, cuda, cuda:1.", MODEL, show_default="a GPU where there is one", metavar="NAME"
    )
    threads: int | None = flag(
        None,
        "Threads of the CPU's kernels.",
        MODEL,
        type="count",
        at_least=1,
        show_default="one for each physical core",
        metavar="N",
    )
    provider: str | None = flag(
        None,
        "Of onnxruntime, for a MODEL that export-onnx wrote: cpu, cuda, or its own name for one.",
        MODEL,
        show_default="what suits the device",
        metavar="NAME",
    )

    @property
    def asked_dtype(self) -> str | None:
        """None for the dtype that is stored."""
        return None if self.dtype == "auto" else self.dtype


@dataclass(frozen=True)
class ModelSettings(EngineSettings):
    """And what stands beside its weights."""

    adapter: tuple[str, ...] = flag(
        (),
        "Put this adapter, a PEFT directory, beside the model's weights; repeatable. LoRA may count WEIGHT times.",
        MODEL,
        metavar="PATH[:WEIGHT]",
    )
    force: bool = flag(False, "Use an adapter that was trained on another base.", MODEL, show_default=False)
