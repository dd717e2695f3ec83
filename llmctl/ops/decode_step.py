"""A decoder-only model in one call: the structures that `llmctl_decode` of csrc/llmctl.h reads, and the call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from llmctl.ops import native, quantized_linear
from llmctl.ops.activation import KINDS
from llmctl.ops.cached_attention import MAX_HEAD_DIM as MAX_HEAD_DIM
from llmctl.ops.dispatch import DTYPES, inference_library

NORMS = {"rms": 1, "layer": 2}
"""LLMCTL_RMS_NORM and LLMCTL_LAYER_NORM of csrc/llmctl.h."""

CACHE_DTYPES = {**DTYPES, torch.uint8: 3}
"""LLMCTL_F32, LLMCTL_BF16 and LLMCTL_I8."""

PTR, I64, I32, F32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class Norm(ctypes.Structure):
    """llmctl_norm; all zeros where there is none."""

    _fields_ = [("weight", PTR), ("bias", PTR), ("kind", I32), ("offset", F32), ("eps", F32)]


class Matrix(ctypes.Structure):
    """llmctl_matrix; all zeros where there is none."""

    _fields_ = [
        *((name, PTR) for name in ("weight", "quantized", "bias")),
        *((name, I64) for name in ("n_in", "n_out", "stride")),
    ]


class Layer(ctypes.Structure):
    """llmctl_decoder_layer."""

    _fields_ = [
        *((f"{part}_{place}norm", Norm) for part in ("mixer", "ffn") for place in ("", "output_", "sum_")),
        *((name, Norm) for name in ("q_norm", "k_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, I64) for name in ("heads", "kv_heads", "head_dim", "window")),
        *((name, F32) for name in ("scale", "softcap")),
        *((name, I32) for name in ("qk_norm_per_head", "rotary", "activation")),
    ]


class Decoder(ctypes.Structure):
    """llmctl_decoder."""

    _fields_ = [
        *((name, PTR) for name in ("layers", "embedding", "positions")),
        *((name, Norm) for name in ("embedding_norm", "final_norm")),
        ("head", Matrix),
        *((name, I64) for name in ("n_layers", "n_tokens", "d_model", "n_positions")),
        *((name, F32) for name in ("embedding_scale", "head_scale")),
        ("dtype", I32),
    ]


class Rotary(ctypes.Structure):
    """llmctl_rotary."""

    _fields_ = [("cos", PTR), ("sin", PTR), ("n_positions", I64), ("dims", I64)]


class KvCache(ctypes.Structure):
    """llmctl_kv_cache."""

    _fields_ = [
        *((name, PTR) for name in ("keys", "values", "key_scales", "value_scales")),
        ("strides", I64 * 3),
        ("scale_strides", I64 * 2),
        ("dtype", I32),
    ]


class Args(ctypes.Structure):
    """llmctl_decode_args."""

    _fields_ = [
        *((name, PTR) for name in ("tokens", "starts", "rotaries", "caches", "logits", "sampling", "drawn")),
        *((name, I64) for name in ("batch", "n_new", "n_rotaries", "offset", "capacity")),
    ]


def norm(kind: str, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, offset: float = 0.0) -> Norm:
    return Norm(pointer(weight), pointer(bias), NORMS[kind], offset, eps)


def matrix(weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> Matrix:
    n_out, n_in = weight_NK.shape
    return Matrix(pointer(weight_NK), None, pointer(bias_N), n_in, n_out, weight_NK.stride(0))


def quantized_matrix(weight: quantized_linear.Args, bias_N: torch.Tensor | None) -> Matrix:
    """The weight's structure must stay alive."""
    return Matrix(None, address(weight), pointer(bias_N), weight.n_in, weight.n_out, 0)


def activation(kind: str) -> int:
    return KINDS.index(kind)


def dtype(of: torch.dtype) -> int:
    return DTYPES[of]


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def address(array: ctypes.Array | ctypes.Structure) -> int:
    """Of what must stay alive as long as it is used."""
    return ctypes.addressof(array)


def kv_cache(
    keys_BGSK: torch.Tensor,
    values_BGSK: torch.Tensor,
    key_scales_BGS: torch.Tensor | None = None,
    value_scales_BGS: torch.Tensor | None = None,
) -> KvCache:
    """Each pair of one shape and contiguous; scales come with bytes."""
    strides = (0, 0) if key_scales_BGS is None else key_scales_BGS.stride()[:2]
    return KvCache(
        *map(pointer, (keys_BGSK, values_BGSK, key_scales_BGS, value_scales_BGS)),
        (I64 * 3)(*keys_BGSK.stride()[:3]),
        (I64 * 2)(*strides),
        CACHE_DTYPES[keys_BGSK.dtype],
    )


def bound(decoder: Decoder, args: Args) -> Callable[[], None]:
    """A call with these structures as they then are, both of which must stay alive; all that can be looked up once is.

    It raises RuntimeError for tokens, positions or places in a cache that are not there.
    """
    library = inference_library()
    decode, set_threads = library.llmctl_decode, library.llmctl_set_threads
    pointers = ctypes.byref(decoder), ctypes.byref(args)

    def run() -> None:
        set_threads(torch.get_num_threads())
        if decode(*pointers):
            raise native.failure(library, "llmctl_decode")

    return run
