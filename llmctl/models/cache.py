"""The key-value cache of a batch."""

from __future__ import annotations

import torch

from llmctl.models.config import ModelConfig


class KVCache:
    """Keys and values of what was already read, preallocated: per layer [B, G, capacity, K] twice.

    Layers write at `length`; the stack alone advances it, once per forward. With left-padded rows, `starts_B` (int64) is the
    number of padding slots in front of each row: those are never attended to and positions count from behind them.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        starts_B: torch.Tensor | None = None,
    ):
        self.length, self.capacity, self.starts_B = 0, capacity, starts_B
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        for i in range(config.n_layers):
            mixer = config.block(i).mixer
            shape = (batch_size, mixer.n_kv_heads, capacity, mixer.head_dim)
            self.layers.append(tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))

    def update(self, layer: int, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T new entries and return all keys and values up to them, as views."""
        end = self.length + k_BGTK.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} were asked of it")
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k_BGTK
        values[:, :, self.length : end] = v_BGTK
        return keys[:, :, :end], values[:, :, :end]

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch (finished sequences leave; a beam is reordered)."""
        self.layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        if self.starts_B is not None:
            self.starts_B = self.starts_B[rows]
