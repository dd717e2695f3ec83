"""Random numbers that are a function of where they are used: Philox4x32-10 (Salmon et al., SC'11,
"Parallel random numbers: as easy as 1, 2, 3").

A number belongs to (seed, sequence, position, token) and to nothing else. So a text does not depend on which other
texts are in its batch, and any kernel can make just the numbers that it needs, in any order.
"""

from __future__ import annotations

import torch

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # for counter words 0 and 2
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and sqrt(3) - 1, as 32-bit fractions
MASK = 0xFFFFFFFF
CACHED_BLOCKS = 1 << 14  # per tensor of intermediate results: 256 KB


def philox4x32(counters: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Four random 32-bit words [4, ...] for counters [4, ...] and keys [2, ...]; all int64 with values below 2^32."""
    even, odd = counters[0::2], counters[1::2]
    shape = (2,) + (1,) * (counters.dim() - 1)
    multipliers = torch.tensor(MULTIPLIERS, device=counters.device).view(shape)
    key_steps = torch.tensor(KEY_STEPS, device=counters.device).view(shape)
    for _ in range(ROUNDS):
        # The 64-bit product may wrap into the sign, but both of its halves keep their bits.
        products = even * multipliers
        even = ((products >> 32) & MASK).flip(0) ^ odd ^ keys
        odd = (products & MASK).flip(0)
        keys = (keys + key_steps) & MASK
    return torch.stack([even, odd], dim=1).flatten(0, 1)


def uniform(seeds_B: torch.Tensor, sequences_B: torch.Tensor, position: int, count: int) -> torch.Tensor:
    """Float64 [B, count] in (0, 1): one number for each token id at this position of each sequence.

    `seeds_B` int64, of which all 64 bits count (as the key); `sequences_B` int64 below 2^32. The counter is
    (token id // 4, position, sequence, 0), and token id % 4 picks the word.
    """
    blocks = -(-count // 4)
    rows_at_once = max(1, CACHED_BLOCKS // blocks) if seeds_B.device.type == "cpu" else len(seeds_B)
    words = torch.cat(
        [
            _words(seeds_R, sequences_R, position, blocks)
            for seeds_R, sequences_R in zip(seeds_B.split(rows_at_once), sequences_B.split(rows_at_once), strict=True)
        ]
    )
    # The half keeps 0 and 1 out.
    return words[:, :count].double().add_(0.5).mul_(2.0**-32)


def _words(seeds_B: torch.Tensor, sequences_B: torch.Tensor, position: int, blocks: int) -> torch.Tensor:
    counters = torch.zeros(4, len(seeds_B), blocks, dtype=torch.int64, device=seeds_B.device)
    counters[0] = torch.arange(blocks, device=seeds_B.device)
    counters[1] = position
    counters[2] = sequences_B[:, None]
    keys = torch.stack([seeds_B & MASK, (seeds_B >> 32) & MASK]).unsqueeze(-1)
    return philox4x32(counters, keys).permute(1, 2, 0).flatten(1)


def gumbel(seeds_B: torch.Tensor, sequences_B: torch.Tensor, position: int, count: int) -> torch.Tensor:
    """Standard Gumbel noise, float64 [B, count]: -log of an exponential variable.

    In double precision, so that the winner of a race is the same wherever logarithms are rounded another way.
    """
    return -torch.log(-torch.log1p(-uniform(seeds_B, sequences_B, position, count)))
