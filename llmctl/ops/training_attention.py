"""Causal attention of training in one pass over each head, where csrc has it: bfloat16 on the processor's tile registers."""

from __future__ import annotations

import ctypes

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cpu_library


class Args(ctypes.Structure):
    """llmctl_training_attention of csrc/llmctl.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "first_keys", "out", "log_sums")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "tokens", "head_dim")),
        ("scale", ctypes.c_float),
    ]


def applies(q_BHTK: torch.Tensor) -> bool:
    """For tensors of this dtype and head size, on this processor."""
    library = cpu_library()
    dtype = DTYPES.get(q_BHTK.dtype)
    return (
        library is not None
        and dtype is not None
        and bool(library.llmctl_has_training_attention(dtype, q_BHTK.shape[3]))
    )


def forward(
    q_BHTK: torch.Tensor, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor, first_keys_BT: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output like q, log of each softmax's denominator float32 [B, H, T])."""
    q_BHTK, k_BGTK, v_BGTK = (x.contiguous() for x in (q_BHTK, k_BGTK, v_BGTK))
    out, log_sums = torch.empty_like(q_BHTK), q_BHTK.new_empty(q_BHTK.shape[:3], dtype=torch.float32)
    tensors = {"q": q_BHTK, "k": k_BGTK, "v": v_BGTK, "out": out, "log_sums": log_sums}
    _call("llmctl_training_attention_forward", first_keys_BT, tensors)
    return out, log_sums


def backward(
    grad_out: torch.Tensor,
    q_BHTK: torch.Tensor,
    k_BGTK: torch.Tensor,
    v_BGTK: torch.Tensor,
    out: torch.Tensor,
    log_sums: torch.Tensor,
    first_keys_BT: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, from what `forward` gave."""
    grad_out, q_BHTK, k_BGTK, v_BGTK = (x.contiguous() for x in (grad_out, q_BHTK, k_BGTK, v_BGTK))
    batch, heads, tokens, head_dim = q_BHTK.shape
    group = heads // k_BGTK.shape[1]
    dtype = q_BHTK.dtype if group == 1 else torch.float32
    grads = [torch.empty_like(q_BHTK, dtype=dtype) for _ in range(2)]
    tensors = {"q": q_BHTK, "k": k_BGTK, "v": v_BGTK, "out": out, "log_sums": log_sums}
    grad_q = torch.empty_like(q_BHTK)
    tensors |= {"grad_out": grad_out, "grad_q": grad_q, "grad_k": grads[0], "grad_v": grads[1]}
    _call("llmctl_training_attention_backward", first_keys_BT, tensors)
    if group > 1:
        grads = [grad.unflatten(1, (-1, group)).sum(2).to(k_BGTK.dtype) for grad in grads]
    return grad_q, *grads


def _call(name: str, first_keys_BT: torch.Tensor | None, tensors: dict[str, torch.Tensor]) -> None:
    q_BHTK, k_BGTK = tensors["q"], tensors["k"]
    batch, heads, tokens, head_dim = q_BHTK.shape
    first_keys_BT = None if first_keys_BT is None else first_keys_BT.contiguous()
    args = Args(
        first_keys=None if first_keys_BT is None else first_keys_BT.data_ptr(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        batch=batch,
        heads=heads,
        kv_heads=k_BGTK.shape[1],
        tokens=tokens,
        head_dim=head_dim,
        scale=head_dim**-0.5,
    )
    native.call(cpu_library(), name, ctypes.byref(args))
