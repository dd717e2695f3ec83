"""What `llmctl export-onnx` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _flag(default: Any, help_: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help_, **metadata})


@dataclass(frozen=True)
class OnnxSettings:
    dtype: Literal["float32", "float16", "bfloat16"] = _flag(
        "float32", "What the graph computes in; bfloat16 needs a provider that has it (cuda)."
    )
    quantize: Literal["int8", "int4"] | None = _flag(
        None,
        "Round weights of linear layers to nearest in 8 or 4 bits, in groups with a scale each (MatMulNBits). A matrix that "
        "MODEL has in 4 or 8 bits already (llmctl quantize, GPTQ, AWQ, GGUF) keeps its codes, with and without this.",
    )
    group_size: int = _flag(32, "Weights that share a scale: a power of 2.", at_least=16, at_most=256)
    fuse: bool = _flag(
        False,
        "Use onnxruntime's own operators (GroupQueryAttention, SkipLayerNormalization, ...): faster there, and nowhere "
        "else; without, all are ONNX's.",
    )
    merged_decoder: bool = _flag(False, "Of an encoder-decoder, write both decoders as one file.")
    opset: int = _flag(21, "Version of ONNX's operators, from 20 to the newest that onnxruntime here has.")
    external_data_above: int = _flag(
        100_000_000,
        "Weights of more bytes go into a file of their own, model.onnx.data, which onnxruntime maps; above 2 GB always.",
        type="size",
        at_least=0,
    )
    pooling: Literal["auto", "mean", "cls", "last"] = _flag(
        "auto", "Of an encoder's output sentence_embedding; auto is what the checkpoint says, else mean."
    )
    adapter: tuple[str, ...] = _flag((), "Fold this adapter in first; repeatable.", metavar="PATH[:WEIGHT]")
    adapter_inputs: bool = _flag(
        False,
        "Do not fold adapters in: the graph takes LoRA matrices of the modules that they change as inputs, these adapters' "
        "or others', and adapters/NAME.onnx_adapter has each for onnxruntime.",
    )
    force: bool = _flag(False, "Use an adapter that was trained on another base.")
    provider: str | None = _flag(
        None, "Of onnxruntime, for the check: cpu, cuda, or its own name for one.", metavar="NAME", show_default="cpu"
    )
    tolerance: float | None = _flag(
        None,
        "Largest mean KL divergence, in nats, between MODEL and the result.",
        at_least=0,
        show_default="0.0001; float16 0.01, bfloat16 and int8 0.05, int4 0.5",
    )
    overwrite: bool = _flag(False, "Replace an output that exists.")

    @property
    def precision(self) -> str:
        return self.quantize or self.dtype

    @property
    def kl_tolerance(self) -> float:
        return TOLERANCES[self.precision] if self.tolerance is None else self.tolerance


TOLERANCES = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05, "int8": 0.05, "int4": 0.5}
LOGITS = 1e-3
"""How far a logit may be off in float32."""
