"""Drawing tokens: filters and the race in a few passes over the vocabulary, no sorting of it.

`llmctl.generation.sampling` is the specification: from the same scores and seeds both draw the same tokens.
"""

from __future__ import annotations

import ctypes

import torch

from llmctl.ops import native
from llmctl.ops.dispatch import cuda_library, cuda_stream, inference_library


class Args(ctypes.Structure):
    """llmctl_sample_args of csrc/llmctl.h."""

    _fields_ = [
        ("scores", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("n_rows", "n_tokens", "scores_stride")),
        *((name, ctypes.c_void_p) for name in ("temperature", "top_k", "top_p", "log_min_p")),
        *((name, ctypes.c_void_p) for name in ("greedy", "seeds", "sequences")),
        ("position", ctypes.c_int64),
    ]


def applies(scores_BV: torch.Tensor) -> bool:
    """Whether `sample` can be called: float32, and the kernel exists here."""
    return scores_BV.dtype == torch.float32 and _library(scores_BV) is not None


def _library(scores_BV: torch.Tensor) -> ctypes.CDLL | None:
    return inference_library() if scores_BV.device.type == "cpu" else cuda_library(scores_BV)


def sample(
    scores_BV: torch.Tensor,
    *,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    log_min_p_B: torch.Tensor,
    is_greedy_B: torch.Tensor,
    seeds_B: torch.Tensor,
    sequences_B: torch.Tensor,
    position: int,
) -> torch.Tensor:
    """A token for each row, int64 [B]; -1 for one whose scores have NaN. Each row has settings of its own.

    temperature float32, top_k int64 (0 for all), top_p float64 (1 for all), log_min_p float32 (-inf for all), seeds and
    sequences int64: what they mean is said in csrc/llmctl.h.
    """
    scores_BV = scores_BV if scores_BV.stride(1) == 1 else scores_BV.contiguous()
    settings = [temperature_B, top_k_B, top_p_B, log_min_p_B, is_greedy_B, seeds_B, sequences_B]
    dtypes = [torch.float32, torch.int64, torch.float64, torch.float32, torch.bool, torch.int64, torch.int64]
    for values, dtype in zip(settings, dtypes, strict=True):
        if values.dtype != dtype or values.shape != scores_BV.shape[:1]:
            raise ValueError(f"expected a {dtype} for each of {len(scores_BV)} rows, got {values.dtype} {values.shape}")
    settings = [values.contiguous() for values in settings]
    tokens_B = torch.empty(len(scores_BV), dtype=torch.int64, device=scores_BV.device)
    pointers = (values.data_ptr() for values in settings)
    args = Args(scores_BV.data_ptr(), *scores_BV.shape, scores_BV.stride(0), *pointers, position)
    outcome = ctypes.byref(args), tokens_B.data_ptr()
    if scores_BV.device.type == "cpu":
        native.call(_library(scores_BV), "llmctl_sample", *outcome)
    else:
        native.call(_library(scores_BV), "llmctl_cuda_sample", *outcome, cuda_stream(scores_BV))
    return tokens_B
