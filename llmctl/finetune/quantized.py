"""A frozen base in 4 or 8 bits under an adapter, as QLoRA has it (arXiv:2305.14314)."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmctl.models.linear import Linear
from llmctl.models.packed import AffineWeight
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.quantize import rounding
from llmctl.quantize.layouts import bitsandbytes

BLOCK = 64


@dataclass(frozen=True)
class Nf4Weight:
    """[out, in] in bitsandbytes' nf4: blocks of 64 weights to one scale, the scales in 8 bits too when `double`."""

    codes: torch.Tensor
    state: Any
    shape: tuple[int, int]

    @classmethod
    def of(cls, weight_NK: torch.Tensor, double: bool) -> Nf4Weight:
        how = {"blocksize": BLOCK, "quant_type": "nf4", "compress_statistics": double}
        return cls(*_functional().quantize_4bit(weight_NK.contiguous(), **how), tuple(weight_NK.shape))

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return _functional().dequantize_4bit(self.codes, self.state).to(dtype)

    def to(self, device: torch.device) -> Nf4Weight:
        self.state.to(device)  # in place: bitsandbytes' states have no copy
        return dataclasses.replace(self, codes=self.codes.to(device))


def packed(weight_NK: torch.Tensor, kind: str, double: bool) -> AffineWeight | Nf4Weight:
    """A matrix [out, in] in "nf4", or in "int8" with one scale for a row."""
    if kind == "nf4":
        return Nf4Weight.of(weight_NK, double)
    return bitsandbytes.of_8_bits(*rounding.in_llm_int8(weight_NK))


def quantize(model: nn.Module, kind: str, double: bool) -> None:
    """Pack every frozen Linear inside the model's blocks, in place; `kind` is "nf4" or "int8"."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and "layers." in name and not module.weight.requires_grad:
            owner, _, leaf = name.rpartition(".")
            weight = module.weight.detach()
            layer = QuantizedLinear(packed(weight, kind, double), module.bias, weight.dtype)
            setattr(model.get_submodule(owner), leaf, layer)


def _functional():
    with warnings.catch_warnings():  # of optional kernels that it looks for
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    return functional
