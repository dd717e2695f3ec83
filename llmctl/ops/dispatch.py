"""When an operation goes to the CPU kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from llmctl.ops import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""LLMCTL_F32 and LLMCTL_BF16 of csrc/llmctl.h."""

_PLAIN = (torch.Tensor, nn.Parameter)


def is_inference(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel without a gradient may take these: plain tensors of one dtype that it knows, on the CPU, and neither
    a gradient nor autocast is asked for."""
    return tensors[0].device.type == "cpu" and _asks_for_no_gradient(*tensors)


def cuda_library(*tensors: torch.Tensor | None) -> ctypes.CDLL | None:
    """The same for the kernels on a CUDA device: the library, or None where torch's own are to run.

    Those kernels have been compiled and emulated, not yet run on a device, so only LLMCTL_KERNELS=cuda chooses them.
    """
    if tensors[0].device.type != "cuda" or native.chosen_kernels() != "cuda" or torch.compiler.is_compiling():
        return None
    return native.library() if _asks_for_no_gradient(*tensors) else None


def cuda_stream(tensor: torch.Tensor) -> int:
    """torch's current stream on the tensor's device; 0, which is CUDA's own, for what is on none."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.device.type == "cuda" else 0


def _asks_for_no_gradient(*tensors: torch.Tensor | None) -> bool:
    first = tensors[0]
    if first.dtype not in DTYPES or torch.is_autocast_enabled(first.device.type):
        return False
    needs_grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or type(tensor) not in _PLAIN or (needs_grad and tensor.requires_grad):
            return False
    return True


def is_training(*tensors: torch.Tensor) -> bool:
    """Whether a kernel of ours may stand inside a function with a gradient of its own: on a CPU, eager, of one dtype."""
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and first.device.type == "cpu"
        and first.dtype in DTYPES
        and all(tensor.dtype == first.dtype and type(tensor) in _PLAIN for tensor in tensors)
        and inference_library() is not None
    )


def use_threads(n: int | None) -> None:
    """Gives the kernels of torch and ours n threads, the caller's among them; None leaves torch's choice, OMP_NUM_THREADS or
    one for each physical core. The two never work at the same time, and neither spins while the other does."""
    if n is not None:
        torch.set_num_threads(n)


def cpu_library() -> ctypes.CDLL | None:
    """The library with as many threads as torch has, or None where LLMCTL_KERNELS wants plain torch."""
    library = native.library()
    if library is not None:
        library.llmctl_set_threads(torch.get_num_threads())
    return library


def inference_library() -> ctypes.CDLL | None:
    """The same for kernels that compete with torch's own vector code: None where `auto` finds but scalar code of ours."""
    if native.chosen_kernels() == "auto" and native.library() is not None and not native.has_fast_kernels():
        return None
    return cpu_library()
