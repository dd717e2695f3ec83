"""Which keys each query of an attention may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Visibility:
    """One range of keys for each query: causal order, windows, padding and packed documents are all of that form.

    Query t of row b sees the keys s with `first_BT` <= s < `end_BT` (int64, each dimension may be 1), and with `causal`
    only those with s <= `offset` + t: `offset` counts the keys in front of the first query's own. None sets no limit.
    `origin_B` (int64) says where the text of each row begins, behind its padding: nothing hangs on it but the order of
    additions, which is then the same with any padding.
    """

    causal: bool = False
    offset: int = 0
    first_BT: torch.Tensor | None = None
    end_BT: torch.Tensor | None = None
    origin_B: torch.Tensor | None = None

    def hides_nothing(self, n_queries: int) -> bool:
        """Whether every query sees every key; a single causal query is the last, and sees all before it."""
        return self.first_BT is None and self.end_BT is None and not (self.causal and n_queries > 1)

    def is_triangle(self) -> bool:
        """Whether this is plain causal order, from the first key on."""
        return self.causal and self.offset == 0 and self.first_BT is None and self.end_BT is None

    def mask_BTS(self, n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
        """The same as a bool mask [B, T, S] (B may be 1), true where a query may attend."""
        keys_S = torch.arange(n_keys, device=device)
        mask_BTS = torch.ones(1, n_queries, n_keys, dtype=torch.bool, device=device)
        if self.causal:
            mask_BTS = mask_BTS & (keys_S <= torch.arange(self.offset, self.offset + n_queries, device=device)[:, None])
        if self.first_BT is not None:
            mask_BTS = mask_BTS & (keys_S >= self.first_BT[:, :, None])
        if self.end_BT is not None:
            mask_BTS = mask_BTS & (keys_S < self.end_BT[:, :, None])
        return mask_BTS
