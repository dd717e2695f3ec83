"""What this machine offers: Python, torch, devices, the native library, memory and the versions that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import llmctl
from llmctl.errors import UserError
from llmctl.quantities import format_size

REQUIRED = ("torch", "numpy", "pyarrow", "safetensors", "tokenizers", "click", "rich", "pyyaml", "jinja2")
OPTIONAL = ("transformers", "bitsandbytes", "onnxruntime", "onnxruntime-gpu", "matplotlib", "tensorboard", "wandb")


def describe() -> dict[str, dict[str, object]]:
    """Sections of plain values, fit for JSON; what is absent is None."""
    return {
        "llmctl": {"version": llmctl.__version__, "path": str(Path(llmctl.__file__).parent)},
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "cpu": _cpu(),
        "torch": _torch(),
        "native": _native(),
        "packages": {name: _version(name) for name in REQUIRED + OPTIONAL},
    }


def _cpu() -> dict[str, object]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total, available = _memory()
    return {
        "model": _first_match("/proc/cpuinfo", r"model name\s*:\s*(.+)") or platform.processor() or platform.machine(),
        "cores": usable,
        "memory": format_size(total) if total else None,
        "memory_available": format_size(available) if available else None,
        "memory_limit": _memory_limit(),
    }


def _torch() -> dict[str, object]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"version": None, "problem": str(error)}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": devices or ["cpu"],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _native() -> dict[str, object]:
    from llmctl.ops import native

    section: dict[str, object] = {"path": str(native.path()), "kernels": native.chosen_kernels()}
    try:
        library = native.load()
    except UserError as error:
        return {**section, "abi": None, "problem": error.message}
    return {
        **section,
        "abi": library.llmctl_abi_version(),
        "cuda": bool(library.llmctl_built_with_cuda()),
        "instruction_sets": native.cpu_features(),
        "kernels_use": library.llmctl_isa().decode(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> tuple[int | None, int | None]:
    """Bytes that the machine has, and that could be had now; None where the system does not tell."""
    total = _first_match("/proc/meminfo", r"MemTotal:\s*(\d+)")
    available = _first_match("/proc/meminfo", r"MemAvailable:\s*(\d+)")
    if total and available:
        return int(total) * 1024, int(available) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (ValueError, OSError):
        return None, None


def _memory_limit() -> str | None:
    """What a container may use, where it is told."""
    limit = _first_match("/sys/fs/cgroup/memory.max", r"(\d+)")
    return format_size(int(limit)) if limit else None


def _first_match(path: str, pattern: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return None
    return match[1].strip() if match else None
