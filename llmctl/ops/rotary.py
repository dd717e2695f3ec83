"""Rotary positions: for inference on a CPU one pass, rounded once."""

from __future__ import annotations

import ctypes

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cuda_library, cuda_stream, inference_library, is_inference, is_training


def rotate(x_BHTK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + dims/2) of a head's first `dims` elements by its angle; the others stay as they are.

    `cos` and `sin` are [T, dims], or [B, 1, T, dims] where rows have positions of their own.
    """
    if is_training(x_BHTK, cos, sin) and not (cos.requires_grad or sin.requires_grad):
        return _Rotation.apply(x_BHTK, cos, sin)
    if device := cuda_library(x_BHTK, cos, sin):
        return on_cuda(device, x_BHTK, cos, sin)
    if not is_inference(x_BHTK, cos, sin):
        return reference(x_BHTK, cos, sin)
    return _operator(x_BHTK, cos, sin) if torch.compiler.is_compiling() else _run(x_BHTK, cos, sin)


def reference(x_BHTK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The specification, but for the roundings in between."""
    dims = cos.shape[-1]
    if dims < x_BHTK.shape[-1]:
        return torch.cat([reference(x_BHTK[..., :dims], cos, sin), x_BHTK[..., dims:]], dim=-1)
    first, second = x_BHTK.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x_BHTK * cos + turned * sin).to(x_BHTK.dtype)


def _run(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    library = inference_library()
    if library is None:
        return reference(x, cos, sin)
    return _call(library, "llmctl_rotate", x, cos, sin)


def on_cuda(library: ctypes.CDLL, x_BHTK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rotate` by the CUDA kernel."""
    return _call(library, "llmctl_cuda_rotate", x_BHTK, cos, sin, cuda_stream(x_BHTK))


def _call(library, function, x, cos, sin, *stream) -> torch.Tensor:
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, heads, tokens, head_dim = x.shape
    dims = cos.shape[-1]
    cos, sin = (table.expand(batch, 1, tokens, dims) for table in (cos.contiguous(), sin.contiguous()))
    out = x.new_empty(x.shape)
    triple, pair, four = ctypes.c_int64 * 3, ctypes.c_int64 * 2, ctypes.c_int64 * 4
    native.call(
        library,
        function,
        DTYPES[x.dtype],
        x.data_ptr(),
        triple(*x.stride()[:3]),
        cos.data_ptr(),
        sin.data_ptr(),
        pair(cos.stride(0), cos.stride(2)),
        out.data_ptr(),
        triple(*out.stride()[:3]),
        four(batch, heads, tokens, head_dim),
        dims,
        *stream,
    )
    return out


class _Rotation(torch.autograd.Function):
    """Back through a rotation goes the rotation the other way."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _run(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _run(grad, cos, -sin), None, None


@torch.library.custom_op("llmctl::rotate", mutates_args=())
def _operator(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _run(x, cos, sin)


@_operator.register_fake
def _(x, cos, sin):
    return x.new_empty(x.shape)
