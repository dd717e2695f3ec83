"""Positions: each kind implements the hooks that it needs (`embed` adds to the embedding, `rotate` turns queries and keys,
`bias` adds to their products)."""

from __future__ import annotations

import math

import torch
from torch import nn

from llmctl.models import config, rope_scaling


class RotaryTable(nn.Module):
    """cos and sin of position x frequency, float32, computed once and grown when a longer sequence comes.

    Where the angles depend on the length of the text, nothing is kept.
    """

    def __init__(self, rope: config.Rope, head_dim: int):
        super().__init__()
        self.rope, self.dims = rope, rope.dims or head_dim
        if rope.stored:
            self.register_buffer("frequencies", torch.empty(self.dims // 2))
        self._cos = self._sin = torch.empty(0, self.dims)

    def reset_buffers(self) -> None:
        """What a checkpoint that lacks the frequencies means by them."""
        if self.rope.stored:
            self.frequencies = rope_scaling.frequencies(self.rope, self.dims)

    def lookup(
        self,
        positions_BT: torch.Tensor | None,
        lengths_BT: torch.Tensor | None,
        offset: int,
        end: int,
        device: torch.device,
    ):
        """(cos, sin) of shape [T, K] for positions `offset` to `end`, or [B, 1, T, K] where rows have their own.

        `lengths_BT` are those of the tokens' texts so far, None where all are `end` long.
        """
        if rope_scaling.heeds_length(self.rope):
            return self._of_lengths(positions_BT, lengths_BT, offset, end, device)
        if self._cos.shape[0] < end or self._cos.device != device:
            self._grow(max(end, 2 * self._cos.shape[0]), device)
        if positions_BT is None:
            return self._cos[offset:end], self._sin[offset:end]
        return self._cos[positions_BT].unsqueeze(1), self._sin[positions_BT].unsqueeze(1)

    def _of_lengths(self, positions_BT, lengths_BT, offset: int, end: int, device: torch.device):
        steps = torch.arange(offset, end, device=device) if positions_BT is None else positions_BT[:, None]
        lengths = torch.tensor([end], device=device) if lengths_BT is None else lengths_BT[:, None]
        frequencies = rope_scaling.frequencies(self.rope, self.dims, lengths)
        return self._turns(steps[..., None].float() * frequencies)

    def _grow(self, length: int, device: torch.device) -> None:
        with torch.inference_mode(False), torch.no_grad():
            frequencies = self.frequencies if self.rope.stored else rope_scaling.frequencies(self.rope, self.dims)
            steps = torch.arange(length, device=device, dtype=torch.float32)
            self._cos, self._sin = self._turns(torch.outer(steps, frequencies.to(device, torch.float32)))

    def _turns(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The rotation pairs element i with i + K/2 (the Hugging Face layout), not neighbours.
        angles, size = torch.cat([angles, angles], dim=-1), rope_scaling.magnitude(self.rope)
        return angles.cos() * size, angles.sin() * size


class RelativeBias(nn.Module):
    """What distance adds to the scores of a stack's self-attention."""

    def __init__(self, spec: config.RelativeBias):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.n_buckets, spec.n_heads))

    def initialize(self, generator: torch.Generator) -> None:
        """No distance is preferred."""
        nn.init.zeros_(self.weight)

    def forward(self, start: int, end: int, device: torch.device) -> torch.Tensor:
        """[H, T, S] for the queries from `start` to `end` and all keys in front of `end`."""
        queries_T = torch.arange(start, end, device=device)
        distances_TS = torch.arange(end, device=device) - queries_T[:, None]
        # Few distances make up the matrix: each is looked up once.
        bias_HN = self.weight[self.buckets(torch.arange(1 - end, end - start, device=device))].mT
        return bias_HN[:, distances_TS + (end - 1)]

    def buckets(self, distances: torch.Tensor) -> torch.Tensor:
        """The bucket of each distance (the key's position less the query's), int64 of the same shape."""
        count, first = self.spec.n_buckets, 0
        if self.spec.both_ways:
            count //= 2
            first = (distances > 0) * count
            distances = distances.abs()
        else:
            distances = (-distances).clamp(min=0)
        n_exact = count // 2
        share = torch.log(distances.float() / n_exact) / math.log(self.spec.max_distance / n_exact)
        # The logarithm of 0 is never taken up: that distance is exact.
        far = n_exact + (share.clamp(min=0) * (count - n_exact)).long()
        return first + torch.where(distances < n_exact, distances, far.clamp(max=count - 1))
