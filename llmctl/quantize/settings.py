"""What `llmctl quantize` can be told. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

CALIBRATION = "Calibration (gptq and awq, --target-bits, and the text of the check)"
CHOICE = "Which matrices, in how many bits"


def _flag(default, help_: str, **metadata):
    return field(default=default, metadata={"help": help_, **metadata})


@dataclass(frozen=True)
class QuantizeSettings:
    format: Literal["int8", "int4", "fp8", "nf4", "fp4", "llm-int8", "float32", "bfloat16", "float16"] = _flag(
        "int4",
        "int8, int4, fp8: compressed-tensors (vllm, transformers); nf4, fp4, llm-int8: bitsandbytes (transformers); "
        "float32, bfloat16, float16: back to an ordinary checkpoint.",
    )
    method: Literal["rtn", "gptq", "awq"] = _flag(
        "rtn",
        "How int8 and int4 choose their values: the nearest (rtn); each column makes up for the errors before it (gptq); "
        "channels that matter are scaled up first (awq).",
    )
    group_size: int | None = _flag(
        None, "Weights that share a scale; 0 is a whole row.", at_least=0, show_default="64 for int4, 0 for int8"
    )
    symmetric: bool | None = _flag(
        None,
        "Scales without zero points; transformers reads those with them under dequantize=True only.",
        flags=(" /--asymmetric",),
        show_default="symmetric",
    )
    double_quantization: bool = _flag(True, "nf4 and fp4: the scales in 8 bits too.")
    act_order: bool = _flag(True, "gptq: columns with large inputs first.")
    damping: float = _flag(0.01, "gptq: added to the diagonal of its Hessian, as a share of the mean.", above=0)
    keep: str = _flag(
        "lm_head",
        "Modules that stay as they are: names, ends of names or regular expressions, joined by commas. Embeddings do "
        "anyway.",
        metavar="NAME,...",
        group=CHOICE,
    )
    bits: tuple[str, ...] = _flag(
        (),
        "Modules that get other bits (4, 8; 16 keeps them), as in 'down_proj=8'; may be repeated, the last one counts.",
        metavar="NAME=BITS",
        group=CHOICE,
    )
    target_bits: float | None = _flag(
        None,
        "int4: give 8 bits to those matrices that the predictions suffer from most, until the mean reaches this.",
        above=4,
        at_most=8,
        group=CHOICE,
    )
    calibration: str | None = _flag(
        None,
        "Text or a token stream like what the model will read; - is standard input.",
        type="path",
        group=CALIBRATION,
    )
    calibration_samples: int = _flag(128, "Sequences of it to use.", at_least=1, group=CALIBRATION)
    calibration_length: int = _flag(512, "Tokens in each, at most the model's context.", at_least=8, group=CALIBRATION)
    tolerance: float | None = _flag(
        None,
        "Largest mean KL divergence, in nats, from the model before, on text that calibration did not see.",
        at_least=0,
        show_default="0.5 below 8 bits, 0.05 for 8, 0.001 for plain formats",
    )
    overwrite: bool = _flag(False, "Replace an output that exists.")
