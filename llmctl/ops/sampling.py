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
        *((name, ctypes.c_void_p) for name in ("seen", "counts", "repetition", "presence", "frequency")),
        *((name, ctypes.c_void_p) for name in ("logprobs", "top_tokens", "top_logprobs")),
        ("n_top", ctypes.c_int64),
    ]


class Settings:
    """How each of B rows draws, for any number of steps; rows have settings of their own.

    temperature float32, top_k int64 (0 for all), top_p float64 (1 for all), log_min_p float32 (-inf for all), seeds and
    sequences int64: what they mean is said in csrc/llmctl.h. On a CPU it may have penalties and log-probabilities too.
    """

    def __init__(
        self,
        *,
        temperature_B: torch.Tensor,
        top_k_B: torch.Tensor,
        top_p_B: torch.Tensor,
        log_min_p_B: torch.Tensor,
        is_greedy_B: torch.Tensor,
        seeds_B: torch.Tensor,
        sequences_B: torch.Tensor,
    ):
        columns = [temperature_B, top_k_B, top_p_B, log_min_p_B, is_greedy_B, seeds_B, sequences_B]
        dtypes = [torch.float32, torch.int64, torch.float64, torch.float32, torch.bool, torch.int64, torch.int64]
        for values, dtype in zip(columns, dtypes, strict=True):
            _check(values, dtype, temperature_B.shape[:1])
        self._kept: list[torch.Tensor] = [values.contiguous() for values in columns]
        self.n_rows = len(temperature_B)
        self.args = Args(None, self.n_rows, 0, 0, *(values.data_ptr() for values in self._kept))
        self.logprobs_B = self.top_ids_BN = self.top_logprobs_BN = None
        """Of the last draw, after `report`."""

    def penalize(self, seen_BV: torch.Tensor, repetition_B: torch.Tensor) -> None:
        """Repetition's penalty (float32 [B]) on the tokens seen, a bool mask that may go on changing."""
        self.args.seen, self.args.repetition = self._kept_of(seen_BV, torch.bool), self._kept_of(repetition_B)

    def count(self, counts_BV: torch.Tensor, presence_B: torch.Tensor, frequency_B: torch.Tensor) -> None:
        """Penalties (float32 [B]) by how often tokens came, float32, which may go on changing."""
        self.args.counts = self._kept_of(counts_BV)
        self.args.presence, self.args.frequency = self._kept_of(presence_B), self._kept_of(frequency_B)

    def report(self, n_top: int) -> None:
        """Ask for the log-probability of each token drawn, and the tokens and log-probabilities of the likeliest."""
        self.logprobs_B = torch.empty(self.n_rows)
        self.top_ids_BN = torch.empty(self.n_rows, n_top, dtype=torch.int64)
        self.top_logprobs_BN = torch.empty(self.n_rows, n_top)
        self.args.logprobs, self.args.n_top = self.logprobs_B.data_ptr(), n_top
        self.args.top_tokens, self.args.top_logprobs = self.top_ids_BN.data_ptr(), self.top_logprobs_BN.data_ptr()

    @property
    def needs_every_step(self) -> bool:
        """Whether something changes between the steps, or is asked for after each."""
        return bool(self.args.seen or self.args.counts or self.args.logprobs)

    def _kept_of(self, values: torch.Tensor, dtype: torch.dtype = torch.float32) -> int:
        _check(values, dtype, (self.n_rows, *values.shape[1:]))
        if not values.is_contiguous():
            raise ValueError("what goes on changing must be contiguous")
        self._kept.append(values)
        return values.data_ptr()


def _check(values: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if values.dtype != dtype or values.shape != shape:
        raise ValueError(f"expected {dtype} {tuple(shape)}, got {values.dtype} {tuple(values.shape)}")


def applies(scores_BV: torch.Tensor) -> bool:
    """Whether `sample` can be called: float32, and the kernel exists here."""
    return scores_BV.dtype == torch.float32 and _library(scores_BV) is not None


def _library(scores_BV: torch.Tensor) -> ctypes.CDLL | None:
    return inference_library() if scores_BV.device.type == "cpu" else cuda_library(scores_BV)


def sample(scores_BV: torch.Tensor, settings: Settings, position: int) -> torch.Tensor:
    """A token for each row, int64 [B]; -1 for one whose scores have NaN."""
    if len(scores_BV) != settings.n_rows:
        raise ValueError(f"settings for {settings.n_rows} rows, scores of {len(scores_BV)}")
    scores_BV = scores_BV if scores_BV.stride(1) == 1 else scores_BV.contiguous()
    tokens_B = torch.empty(len(scores_BV), dtype=torch.int64, device=scores_BV.device)
    args = settings.args
    args.scores, args.n_tokens, args.scores_stride = scores_BV.data_ptr(), scores_BV.shape[1], scores_BV.stride(0)
    args.position = position
    outcome = ctypes.byref(args), tokens_B.data_ptr()
    if scores_BV.device.type == "cpu":
        native.call(_library(scores_BV), "llmctl_sample", *outcome)
    else:
        native.call(_library(scores_BV), "llmctl_cuda_sample", *outcome, cuda_stream(scores_BV))
    return tokens_B
