"""Attention of inference: online softmax over keys and values where they lie, each row by itself to the last bit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import DTYPES, cuda_library, cuda_stream, inference_library, is_inference
from llmctl.ops.visibility import Visibility

MAX_HEAD_DIM = 256
"""LLMCTL_ATTENTION_MAX_HEAD_DIM of csrc/llmctl.h."""

BYTES = 3
"""LLMCTL_I8 there."""

FEW_QUERIES = 8
"""Up to so many a CUDA device reads the keys by the kernel made for decoding; torch's are made for prompts."""


class Args(ctypes.Structure):
    """llmctl_attention_args of csrc/llmctl.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out")),
        ("first", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("first_strides", ctypes.c_int64 * 2),
        ("end_strides", ctypes.c_int64 * 2),
        ("origins", ctypes.c_void_p),
        ("causal_offset", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("k_scales", "v_scales")),
        ("scale_strides", ctypes.c_int64 * 2),
        ("kv_dtype", ctypes.c_int32),
    ]


@dataclass(frozen=True)
class InBytes:
    """Keys or values as a cache in bytes holds them: (code - 128) * scale of `codes_BGSK` (uint8) and `scales_BGS` (float32)."""

    codes_BGSK: torch.Tensor
    scales_BGS: torch.Tensor

    def decoded(self, dtype: torch.dtype) -> torch.Tensor:
        return ((self.codes_BGSK.float() - 128) * self.scales_BGS[..., None]).to(dtype)


def applies(q_BHTK: torch.Tensor, k_BGSK: torch.Tensor | InBytes, v_BGSK: torch.Tensor | InBytes) -> bool:
    """Whether `attention` can be called: no gradient is asked for, and the kernel exists here and takes these; bytes only on
    a CUDA device."""
    if isinstance(k_BGSK, InBytes):
        few = q_BHTK.shape[-1] <= MAX_HEAD_DIM and q_BHTK.shape[2] <= FEW_QUERIES
        return few and cuda_library(q_BHTK) is not None
    if q_BHTK.shape[-1] > MAX_HEAD_DIM or k_BGSK.shape != v_BGSK.shape:
        return False
    if q_BHTK.shape[2] <= FEW_QUERIES and cuda_library(q_BHTK, k_BGSK, v_BGSK) is not None:
        return True
    return is_inference(q_BHTK, k_BGSK, v_BGSK) and inference_library() is not None


def attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor | InBytes,
    v_BGSK: torch.Tensor | InBytes,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, H, T, K] laid out as [B, T, H, K]; a query that sees no key gets 0."""
    batch, n_heads, n_queries, head_dim = q_BHTK.shape
    scales = ()
    if isinstance(k_BGSK, InBytes):
        scales = k_BGSK.scales_BGS, v_BGSK.scales_BGS
        k_BGSK, v_BGSK = k_BGSK.codes_BGSK, v_BGSK.codes_BGSK
    first_BT, end_BT, origin_B = visibility.first_BT, visibility.end_BT, visibility.origin_B
    tensors = [
        None if first_BT is None else first_BT.expand(batch, n_queries),
        None if end_BT is None else end_BT.expand(batch, n_queries),
        None if origin_B is None else origin_B.contiguous(),
        None if bias_HTS is None else bias_HTS.float().expand(batch, n_heads, n_queries, k_BGSK.shape[2]),
    ]
    numbers = [
        visibility.offset if visibility.causal else -1,
        head_dim**-0.5 if scale is None else scale,
        softcap or 0.0,
    ]
    run = _operator if torch.compiler.is_compiling() else _run
    return run(q_BHTK, k_BGSK, v_BGSK, *tensors, *numbers, *scales).transpose(1, 2)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    end: torch.Tensor | None,
    origins: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal_offset: int,
    scale: float,
    softcap: float,
    k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    args = arguments(q, k, v, out, first, end, origins, bias, causal_offset, scale, softcap, k_scales, v_scales)
    if device := cuda_library(q, *((k, v) if k_scales is None else ())):
        on_cuda(device, q, args)
    else:
        native.call(inference_library(), "llmctl_attention", DTYPES[q.dtype], ctypes.byref(args))
    return out


def arguments(
    q, k, v, out, first, end, origins, bias, causal_offset, scale, softcap, k_scales=None, v_scales=None
) -> Args:
    """Tensors as C takes them; q, k and v with their last dimension dense, out [B, T, H, K]. Scales of bytes [B, G, S]."""
    batch, heads, queries, head_dim = q.shape
    return Args(
        *(x.data_ptr() for x in (q, k, v, out)),
        *(batch, heads, k.shape[1], queries, k.shape[2], head_dim),
        *((x.stride(0), x.stride(1), x.stride(2)) for x in (q, k, v, out.transpose(1, 2))),
        *(None if x is None else x.data_ptr() for x in (first, end)),
        *((0, 0) if x is None else x.stride() for x in (first, end)),
        None if origins is None else origins.data_ptr(),
        causal_offset,
        None if bias is None else bias.data_ptr(),
        (0, 0, 0, 0) if bias is None else bias.stride(),
        scale,
        softcap,
        *(None if x is None else x.data_ptr() for x in (k_scales, v_scales)),
        (0, 0) if k_scales is None else k_scales.stride()[:2],
        DTYPES[q.dtype] if k_scales is None else BYTES,
    )


def on_cuda(library: ctypes.CDLL, q: torch.Tensor, args: Args) -> None:
    """Run the CUDA kernels on arguments that are ready."""
    size = ctypes.c_int64()
    native.call(library, "llmctl_cuda_attention_scratch", ctypes.byref(args), ctypes.byref(size))
    scratch = torch.empty(size.value, dtype=torch.uint8, device=q.device)
    pointers = ctypes.byref(args), scratch.data_ptr(), cuda_stream(q)
    native.call(library, "llmctl_cuda_attention", DTYPES[q.dtype], *pointers)


@torch.library.custom_op("llmctl::cached_attention", mutates_args=())
def _operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first: torch.Tensor | None,
    end: torch.Tensor | None,
    origins: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal_offset: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    return _run(q, k, v, first, end, origins, bias, causal_offset, scale, softcap)


@_operator.register_fake
def _(q, k, v, first, end, origins, bias, causal_offset, scale, softcap):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
