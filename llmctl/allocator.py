"""How glibc deals with freed memory: kept for speed in training, returned where a small peak is what counts.

Elsewhere than on glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # the names and numbers of malloc.h


def keep_freed_memory() -> None:
    """Keep large blocks for the next step instead of returning them to the system after each operation.

    A training step allocates the same activations again and again, and first touching fresh pages costs more than many an
    operation on them.
    """
    _mallopt(MMAP_MAX, 0)
    _mallopt(TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give every block of a megabyte or more back at once: work tensor by tensor holds one at a time, not their sum."""
    _mallopt(MMAP_THRESHOLD, 1 << 20)
    _mallopt(TRIM_THRESHOLD, 1 << 20)


def _mallopt(option: int, value: int) -> None:
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(option, value)
