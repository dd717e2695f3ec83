"""Several adapters' changes of one matrix become one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch

Combination = Literal["linear", "ties", "dare", "svd"]


def combine(
    method: Combination,
    name: str,
    changes: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    rank: int = 16,
    seed: int = 0,
) -> torch.Tensor:
    """One float32 change of the tensor `name`. `density` is the share that ties and dare keep, `rank` what svd leaves."""
    how: dict[str, Callable[[], torch.Tensor]] = {
        "linear": lambda: _sum(changes, weights),
        "ties": lambda: _ties(changes, weights, density),
        "dare": lambda: _sum([_dropped(c, density, f"{name}:{i}:{seed}") for i, c in enumerate(changes)], weights),
        "svd": lambda: _truncated(_sum(changes, weights), rank),
    }
    return how[method]()


def _sum(changes: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total.add_(change, alpha=weight)
    return total


def _ties(changes: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Keep each change's largest entries, elect a sign, and average what agrees with it (arXiv:2306.01708)."""
    trimmed = torch.stack([weight * _largest(change, density) for change, weight in zip(changes, weights, strict=True)])
    agreeing = torch.where(trimmed.sign() == trimmed.sum(0).sign(), trimmed, 0)
    return agreeing.sum(0) / agreeing.ne(0).sum(0).clamp(min=1)


def _largest(change: torch.Tensor, density: float) -> torch.Tensor:
    kept = max(1, round(density * change.numel()))
    threshold = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= threshold, change, 0)


def _dropped(change: torch.Tensor, density: float, key: str) -> torch.Tensor:
    """Drop entries at random and stretch the rest, so that the expectation stays (arXiv:2311.03099)."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    kept = torch.rand(change.shape, generator=generator) < density
    return torch.where(kept, change / density, 0)


def _truncated(change: torch.Tensor, rank: int) -> torch.Tensor:
    if change.dim() < 2 or rank >= min(change.shape):
        return change
    u, s, v = torch.svd_lowrank(change, q=min(rank + 8, *change.shape), niter=4)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].mT
