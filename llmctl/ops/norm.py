"""RMSNorm and LayerNorm: for training torch's own, for inference on a CPU one pass, rounded once."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cuda_library, cuda_stream, inference_library, is_inference, is_training

ROWS_PER_SUM = 32
"""LLMCTL_ROWS_PER_SUM of csrc/llmctl.h."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension; weight [D], x [..., D] of the same dtype."""
    if x.shape[-1:] == weight.shape and x.shape[-1] and is_training(x, weight):
        return _Norm.apply(x, weight, eps, offset)
    if (device := cuda_library(x, weight)) and x.shape[-1:] == weight.shape:
        return on_cuda(device, x, weight, eps, offset)
    if not is_inference(x, weight) or x.shape[-1:] != weight.shape or x.shape[-1] == 0:
        return reference(x, weight, eps, offset)
    return _operator(x, weight, eps, offset) if torch.compiler.is_compiling() else _run(x, weight, eps, offset)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The specification: with an offset in float32, else as torch has it."""
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, offset + weight.float(), eps).to(x.dtype)


def _run(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    library = inference_library()
    if library is None:
        return reference(x, weight, eps, offset)
    return _call(library, "llmctl_rms_norm", x, weight, eps, offset)


def on_cuda(library: ctypes.CDLL, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    """`rms_norm` by the CUDA kernel."""
    return _call(library, "llmctl_cuda_rms_norm", x, weight, eps, offset, cuda_stream(x))


def _call(library, function, x, weight, eps, offset, *stream) -> torch.Tensor:
    n = weight.shape[0]
    rows = x if x.dim() == 2 else x.reshape(-1, n)
    rows, weight = rows if rows.stride(1) == 1 else rows.contiguous(), weight.contiguous()
    out = x.new_empty(x.shape)
    pointers = weight.data_ptr(), offset, eps, out.data_ptr()
    sizes = rows.shape[0], n
    native.call(library, function, DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), *pointers, *sizes, *stream)
    return out


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension; weight and bias [D], x [..., D]."""
    fits = x.shape[-1:] == weight.shape and x.shape[-1] > 0 and is_inference(x, weight, bias)
    library = None if torch.compiler.is_compiling() or not fits else inference_library()
    if library is None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    n = weight.shape[0]
    rows = x if x.dim() == 2 else x.reshape(-1, n)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = x.new_empty(x.shape)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    pointers = weight.data_ptr(), None if bias is None else bias.data_ptr(), eps, out.data_ptr()
    native.call(
        library, "llmctl_layer_norm", DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), *pointers, rows.shape[0], n
    )
    return out


class _Norm(torch.autograd.Function):
    """Keeps x in its own dtype; torch's keeps it in float32."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        ctx.eps, ctx.offset = eps, offset
        ctx.save_for_backward(x, weight)
        return _run(x, weight, eps, offset)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if (library := inference_library()) is not None and grad.dtype == x.dtype == weight.dtype:
            return *_gradients(library, ctx, grad.contiguous(), x.contiguous(), weight.contiguous()), None, None
        long_x, long_grad = x.float(), grad.float()
        scale = torch.rsqrt(long_x.square().mean(-1, keepdim=True).add_(ctx.eps))
        unit = long_x * scale
        grad_weight = (long_grad * unit).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        through = long_grad * (weight.float() + ctx.offset)
        along = (through * unit).mean(-1, keepdim=True)
        return through.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None, None


def _gradients(library, ctx, grad, x, weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    n = weight.shape[0]
    n_rows, grad_x, sums = x.numel() // n, torch.empty_like(x), None
    if ctx.needs_input_grad[1]:
        sums = torch.empty(-(-n_rows // ROWS_PER_SUM), n)
    pointers = grad.data_ptr(), x.data_ptr(), weight.data_ptr()
    to = grad_x.data_ptr(), None if sums is None else sums.data_ptr()
    native.call(library, "llmctl_rms_norm_gradient", DTYPES[x.dtype], *pointers, ctx.offset, ctx.eps, *to, n_rows, n)
    return grad_x, None if sums is None else sums.sum(0).to(weight.dtype)


@torch.library.custom_op("llmctl::rms_norm", mutates_args=())
def _operator(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return _run(x, weight, eps, offset)


@_operator.register_fake
def _(x, weight, eps, offset):
    return x.new_empty(x.shape)
