"""x weight^T + bias: for training torch's own, for inference on a CPU a kernel whose rows do not depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, inference_library, is_inference

MatmulPrecision = Literal["highest", "high"]
_high: ContextVar[bool] = ContextVar("high", default=False)


@contextmanager
def float32_products(precision: MatmulPrecision) -> Iterator[None]:
    """Within it `linear` multiplies float32 without a gradient to `precision`, in torch's words for it.

    "highest" takes whole float32. "high" takes the sums of two bfloat16 in their place, 16 bits of each product, where
    that is faster: on a CPU with a matrix unit. Rows are as independent of each other either way.
    """
    token = _high.set({"highest": False, "high": True}[precision])
    try:
        yield
    finally:
        _high.reset(token)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N].

    Without a gradient, on a CPU and in float32 or bfloat16, each row of the result has the same bits whatever the other
    rows are, how many there are, and on however many threads.
    """
    if not is_inference(x, weight, bias):
        return F.linear(x, weight, bias)
    # The operator's own overhead is that of a small product.
    return _operator(x, weight, bias) if torch.compiler.is_compiling() else _run(x, weight, bias)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The specification: products and sums in float32, one rounding at the end."""
    result = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return result.to(x.dtype)


def _run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    library = inference_library()
    if library is None:
        return F.linear(x, weight, bias)
    n_out, n_in = weight.shape
    if x.shape[-1] != n_in or (bias is not None and bias.shape != (n_out,)):
        return F.linear(x, weight, bias)  # it says what is wrong
    rows = x if x.dim() == 2 else x.reshape(-1, n_in)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], n_out)
    native.call(
        library,
        "llmctl_linear",
        DTYPES[x.dtype],
        _high.get(),
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        n_out,
        rows.shape[0],
        n_in,
        n_out,
    )
    return out


@torch.library.custom_op("llmctl::linear", mutates_args=())
def _operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _run(x, weight, bias)


@_operator.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
