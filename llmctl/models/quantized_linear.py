"""The linear layer of a quantized checkpoint: its matrix stays in few bits."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models.packed import AffineWeight, LaidOutWeight, PackedWeight, in_order
from llmctl.ops import quantized_linear as ops


class QuantizedLinear(nn.Module):
    """x W^T + bias with W [out, in] in few bits: by the kernel where no gradient is asked for, else W is unpacked in the
    dtype of x, and again in the backward pass.

    `quantized` is W for `ops.quantized_linear`, whose inputs are then `x[..., columns_K]` (None: x); where the kernel does
    not take it (4-bit floats, odd groups) it is None and `packed` holds W.
    """

    def __init__(self, packed: PackedWeight | LaidOutWeight, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.bias, self.dtype = bias, dtype
        self.columns_K: torch.Tensor | None = None
        self.quantized: ops.QuantizedWeight | None = None
        self.packed: PackedWeight | None = packed
        if isinstance(packed, LaidOutWeight):
            self.quantized, self.packed, self.columns_K = packed.quantized, None, packed.columns_K
        elif isinstance(packed, AffineWeight) and (quantized := packed.kernel_weight()) is not None:
            self.quantized, self.packed, self.columns_K = quantized, None, packed.columns_K

    @property
    def laid_out(self) -> LaidOutWeight | None:
        return None if self.quantized is None else LaidOutWeight(self.quantized, self.columns_K)

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], unpacked in the model's dtype, for those who multiply by it themselves."""
        return self.unpacked(self.dtype)

    @torch.no_grad()
    def unpacked(self, dtype: torch.dtype) -> torch.Tensor:
        if self.quantized is None:
            return self.packed.dequantized(dtype)
        return in_order(ops.dequantized(self.quantized, dtype), self.columns_K)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if (torch.is_grad_enabled() and x.requires_grad) or self.quantized is None:
            y = _Product.apply(x, self)
            return y if bias is None else y + bias
        return ops.quantized_linear(x if self.columns_K is None else x[..., self.columns_K], self.quantized, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn, recurse=True):
        """A move to another device takes the packed matrix along; another dtype is that of what is unpacked."""
        super()._apply(fn, recurse)
        like = fn(torch.empty(0, dtype=self.dtype))
        self.dtype = like.dtype
        if like.device.type == "meta":
            return self
        if self.columns_K is not None:
            self.columns_K = self.columns_K.to(like.device)
        if self.packed is not None:
            self.packed = self.packed.to(like.device)
        else:
            self.quantized = _moved(self.quantized, like.device)
        return self


def _moved(quantized: ops.QuantizedWeight, device: torch.device) -> ops.QuantizedWeight:
    fields = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)}
    tensors = {name: value.to(device) for name, value in fields.items() if isinstance(value, torch.Tensor)}
    return dataclasses.replace(quantized, **tensors)


class _Product(torch.autograd.Function):
    """Keeps neither x nor the unpacked matrix."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.module = module
        return F.linear(x, module.unpacked(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.module.unpacked(grad.dtype), None


def matrix_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes [out, in] of a model's packed matrices, under the names that their weights had."""
    return {
        f"{name}.weight": torch.Size([module.out_features, module.in_features])
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
