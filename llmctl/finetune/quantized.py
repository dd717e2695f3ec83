"""A frozen base in 4 or 8 bits under an adapter, as QLoRA has it (arXiv:2305.14314); bitsandbytes packs and unpacks."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import quantized_linear
from llmctl.models.linear import Linear


class QuantizedLinear(nn.Module):
    """x W^T + bias with W [out, in] unpacked to the dtype of x when it is used, and again in the backward pass.

    "nf4": blocks of 64 weights to one scale, the scales in 8 bits too when `double`. "int8": one scale for a row.
    """

    def __init__(self, linear: Linear, kind: str, double: bool):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.kind, self.bias, self._dtype = kind, linear.bias, linear.weight.dtype
        functional = _bitsandbytes()
        if kind == "nf4":
            weight = linear.weight.detach().contiguous()
            packed, self._state = functional.quantize_4bit(
                weight, blocksize=64, quant_type="nf4", compress_statistics=double
            )
            scales = None
        else:
            packed, scales, _ = functional.int8_vectorwise_quant(linear.weight.detach().to(torch.float16))
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in] in the dtype that it was packed from."""
        return self.unpacked(self._dtype)

    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        if self.kind == "int8":
            return (self.packed.to(dtype) * (self.scales / 127.0).to(dtype)[:, None]).detach()
        if self._state.absmax.device != self.packed.device:
            self._state.to(self.packed.device)
        return _bitsandbytes().dequantize_4bit(self.packed, self._state).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """Keeps neither x nor the unpacked matrix."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return F.linear(x, module.unpacked(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.module.unpacked(grad.dtype), None


def quantize(model: nn.Module, kind: str, double: bool) -> None:
    """Pack every frozen Linear inside the model's blocks, in place; `kind` is "nf4" or "int8"."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and "layers." in name and not module.weight.requires_grad:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, QuantizedLinear(module, kind, double))


def matrix_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of packed matrices, those of a quantized checkpoint too, under the names that their weights had."""
    return {
        f"{name}.weight": torch.Size([module.out_features, module.in_features])
        for name, module in model.named_modules()
        if isinstance(module, (QuantizedLinear, quantized_linear.QuantizedLinear))
    }


def _bitsandbytes():
    with warnings.catch_warnings():  # of optional kernels that it looks for
        warnings.simplefilter("ignore")
        from bitsandbytes import functional
    return functional
