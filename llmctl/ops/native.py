"""The native library: where it is, what it offers, and whether it is to be used."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from pathlib import Path

from llmctl.errors import CalledWrongly, UserError

log = logging.getLogger("llmctl")

ABI = 15
CHOICES = ("auto", "cuda", "cpu", "reference")
HINT = "install the package again with a C++ compiler at hand, or set LLMCTL_KERNELS=auto"

INT, I32, I64, U64, F32 = ctypes.c_int, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
PTR, STR = ctypes.c_void_p, ctypes.c_char_p

# Every function of csrc/llmctl.h: what it returns, then what it takes.
SIGNATURES = {
    "llmctl_abi_version": [INT],
    "llmctl_last_error": [STR],
    "llmctl_built_with_cuda": [INT],
    "llmctl_cpu_features": [U64],
    "llmctl_set_isa": [INT, STR],
    "llmctl_isa": [STR],
    "llmctl_set_threads": [INT, I32],
    "llmctl_threads": [I32],
    "llmctl_bpe_create": [INT, I32, PTR, PTR, I64, PTR],
    "llmctl_bpe_destroy": [None, PTR],
    "llmctl_bpe_add_words": [INT, PTR, PTR, PTR, PTR, I64],
    "llmctl_bpe_add_tokens": [INT, PTR, PTR, PTR, PTR, I64],
    "llmctl_bpe_encode": [INT, PTR, PTR, PTR, I64, PTR, I64, PTR, I64, I32, PTR, PTR],
    "llmctl_linear": [INT, I32, I32, PTR, I64, PTR, I64, PTR, PTR, I64, I64, I64, I64],
    "llmctl_quantized_linear": [INT, I32, PTR, I64, PTR, PTR, PTR, I64, I64, I64, I64],
    "llmctl_group_scales": [INT, PTR],
    "llmctl_attention": [INT, I32, PTR],
    "llmctl_activation": [INT, I32, I32, PTR, PTR, PTR, I64],
    "llmctl_gated_gradient": [INT, I32, I32, PTR, PTR, PTR, PTR, PTR, I64],
    "llmctl_rms_norm_gradient": [INT, I32, PTR, PTR, PTR, F32, F32, PTR, PTR, I64, I64],
    "llmctl_rms_norm": [INT, I32, PTR, I64, PTR, F32, F32, PTR, I64, I64],
    "llmctl_layer_norm": [INT, I32, PTR, I64, PTR, PTR, F32, PTR, I64, I64],
    "llmctl_rotate": [INT, I32, PTR, PTR, PTR, PTR, PTR, PTR, PTR, PTR, I64],
    "llmctl_sample": [INT, PTR, PTR],
    "llmctl_decode": [INT, PTR, PTR],
    "llmctl_cross_entropy": [INT, I32, PTR, I64, I64, PTR, F32, PTR],
    "llmctl_attention_softmax": [INT, I32, PTR, I64, I64, PTR, PTR, I64, F32, PTR],
    "llmctl_attention_softmax_backward": [INT, I32, PTR, PTR, I64, I64, PTR, PTR, I64, F32, PTR, PTR],
    "llmctl_has_training_attention": [INT, I32, I64],
    "llmctl_training_attention_forward": [INT, PTR],
    "llmctl_training_attention_backward": [INT, PTR],
    "llmctl_cuda_rms_norm": [INT, I32, PTR, I64, PTR, F32, F32, PTR, I64, I64, PTR],
    "llmctl_cuda_rotate": [INT, I32, PTR, PTR, PTR, PTR, PTR, PTR, PTR, PTR, I64, PTR],
    "llmctl_cuda_activation": [INT, I32, I32, PTR, PTR, PTR, I64, PTR],
    "llmctl_cuda_attention_scratch": [INT, PTR, PTR],
    "llmctl_cuda_attention": [INT, I32, PTR, PTR, PTR],
    "llmctl_cuda_sample": [INT, PTR, PTR, PTR],
    "llmctl_cuda_quantized_linear_scratch": [INT, PTR, I64, PTR],
    "llmctl_cuda_quantized_linear": [INT, I32, PTR, I64, PTR, PTR, PTR, I64, I64, PTR, PTR],
    "llmctl_cuda_dequantize": [INT, I32, PTR, PTR, PTR],
}

# Bit by bit, the LLMCTL_CPU_* of csrc/llmctl.h.
CPU_FEATURES = ("avx2", "avx512", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "neon")


def chosen_kernels() -> str:
    """LLMCTL_KERNELS, one of CHOICES."""
    choice = os.environ.get("LLMCTL_KERNELS") or "auto"
    if choice not in CHOICES:
        raise CalledWrongly(f"LLMCTL_KERNELS is {choice}", hint=f"expected one of {', '.join(CHOICES)}")
    return choice


def library() -> ctypes.CDLL | None:
    """The library, or None where the plain Python code is to be used instead.

    Under `auto` a library that cannot be loaded is one notice; `cpu` and `cuda` never fall back and raise UserError.
    """
    return _library(chosen_kernels())


@functools.cache
def _library(choice: str) -> ctypes.CDLL | None:
    if choice == "reference":
        return None
    try:
        native = load()
    except CalledWrongly:
        raise
    except UserError as error:
        if choice != "auto":
            raise UserError(f"LLMCTL_KERNELS={choice}: {error.message}", hint=error.hint) from error
        log.info("%s; using the slower code in Python", error.message)
        return None
    if choice == "cuda" and not native.llmctl_built_with_cuda():
        raise UserError("LLMCTL_KERNELS=cuda: the native library was built without CUDA", hint=HINT)
    return native


def path() -> Path:
    """Where a build puts the library, in a source tree as in an installed package."""
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(__file__).resolve().parent.parent / "lib" / f"libllmctl{suffix}"


@functools.cache
def load() -> ctypes.CDLL:
    """The library with every signature declared and the instruction set that LLMCTL_ISA names.

    Raises UserError where it is missing or of another version, CalledWrongly for an instruction set that it cannot use.
    """
    try:
        native = ctypes.CDLL(str(path()))
    except OSError as error:
        raise UserError(f"the native library cannot be loaded ({error})", hint=HINT) from error
    found = native.llmctl_abi_version()
    if found != ABI:
        raise UserError(f"{path()} has ABI {found}, this package needs {ABI}", hint=HINT)
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(native, name, None)
        if function is None:
            raise UserError(f"{path()} is older than this package: it lacks {name}", hint=HINT)
        function.restype, function.argtypes = result, arguments
    isa = os.environ.get("LLMCTL_ISA")
    if isa and native.llmctl_set_isa(isa.encode()):
        raise CalledWrongly(f"LLMCTL_ISA={isa}: {native.llmctl_last_error().decode()}")
    return native


@functools.cache
def has_fast_kernels() -> bool:
    """Whether the CPU kernels have vector instructions to work with, or scalar code was asked for by its name."""
    return load().llmctl_isa() != b"scalar" or os.environ.get("LLMCTL_ISA") == "scalar"


def call(native: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call a function that returns an error code; raises MemoryError or RuntimeError with the library's message."""
    if getattr(native, name)(*arguments):
        raise failure(native, name)


def failure(native: ctypes.CDLL, name: str) -> Exception:
    """What to raise where the function has just returned an error code."""
    message = native.llmctl_last_error().decode(errors="replace")
    return (MemoryError if message == "out of memory" else RuntimeError)(f"{name}: {message}")


def cpu_features() -> list[str]:
    """Names of the instruction sets that this machine runs and a kernel may choose."""
    bits = load().llmctl_cpu_features()
    return [name for bit, name in enumerate(CPU_FEATURES) if bits >> bit & 1]
