"""Activations, alone and as the gate of another branch: for inference on a CPU one pass over memory."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cuda_library, cuda_stream, inference_library, is_inference, is_training

KINDS = ("silu", "gelu", "gelu_tanh", "relu")
"""In the order of LLMCTL_SILU and following in csrc/llmctl.h."""

_IN_TORCH = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def activate(kind: str, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """activation(x) [* up]. For inference on a CPU it is rounded once, and an element does not depend on its place: torch's
    own differ in the last bit between whole vectors and what is left over at the end of a tensor."""
    if up is not None and up.shape == x.shape and is_training(x, up):
        return _Gated.apply(kind, x, up)
    if (device := cuda_library(x, up)) and (up is None or up.shape == x.shape):
        return on_cuda(device, kind, x, up)
    if not is_inference(x, up) or (up is not None and up.shape != x.shape):
        return reference(kind, x, up)
    return _operator(kind, x, up) if torch.compiler.is_compiling() else _run(kind, x, up)


def reference(kind: str, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """The specification, but for the rounding between the activation and the product."""
    y = _IN_TORCH[kind](x)
    return y if up is None else y * up


def _run(kind: str, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    library = inference_library()
    if library is None:
        return reference(kind, x, up)
    return _call(library, "llmctl_activation", kind, x, up)


def on_cuda(library: ctypes.CDLL, kind: str, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """`activate` by the CUDA kernel."""
    return _call(library, "llmctl_cuda_activation", kind, x, up, cuda_stream(x))


def _call(library, function, kind, x, up, *stream) -> torch.Tensor:
    x, up = x.contiguous(), None if up is None else up.contiguous()
    out = torch.empty_like(x)
    pointers = x.data_ptr(), None if up is None else up.data_ptr(), out.data_ptr()
    native.call(library, function, DTYPES[x.dtype], KINDS.index(kind), *pointers, x.numel(), *stream)
    return out


class _Gated(torch.autograd.Function):
    """Keeps x and up alone: what lies between is made again in the backward pass."""

    @staticmethod
    def forward(ctx, kind, x, up):
        ctx.kind = kind
        ctx.save_for_backward(x, up)
        return _run(kind, x, up)

    @staticmethod
    def backward(ctx, grad):
        x, up = ctx.saved_tensors
        if (library := inference_library()) is not None and grad.dtype == x.dtype:
            return None, *_gradients(library, ctx.kind, grad, x, up)
        grad_up = grad * _IN_TORCH[ctx.kind](x) if ctx.needs_input_grad[2] else None
        grad_x = _GRADIENTS[ctx.kind](grad * up, x) if ctx.needs_input_grad[1] else None
        return None, grad_x, grad_up


def _gradients(library, kind, grad, x, up) -> tuple[torch.Tensor, torch.Tensor]:
    grad, x, up = grad.contiguous(), x.contiguous(), up.contiguous()
    grad_x, grad_up = torch.empty_like(x), torch.empty_like(up)
    pointers = (tensor.data_ptr() for tensor in (grad, x, up, grad_x, grad_up))
    native.call(library, "llmctl_gated_gradient", DTYPES[x.dtype], KINDS.index(kind), *pointers, x.numel())
    return grad_x, grad_up


_GRADIENTS = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: grad * (x > 0),
}


@torch.library.custom_op("llmctl::activation", mutates_args=())
def _operator(kind: str, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    return _run(kind, x, up)


@_operator.register_fake
def _(kind, x, up):
    return torch.empty_like(x)
