"""What this machine computes with: precision of matrix products, how fast they can be, and memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time

import torch


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bfloat16 or float32 for `auto`, `bf16` or `fp32`: bfloat16 where it runs in hardware."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """Floating-point operations per second of the best of several square matrix products: what MFU is a share of."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, deadline = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < deadline or not best:
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or this process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> int | None:
    """Bytes that a process could still allocate; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
        return 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])
    except (OSError, KeyError):
        return None
