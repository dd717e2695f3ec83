"""Attention within a window around each token and with a few global ones, in memory linear in the length (arXiv:2004.05150)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def local_attention(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTK: torch.Tensor,
    radius: int,
    *,
    first_BT: torch.Tensor | None = None,
    end_BT: torch.Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v over the keys at most `radius` away and the global ones, [B, H, T, K].

    Query t of row b sees those keys s only for which `first_BT` <= s < `end_BT` (int64); one that would see none sees
    itself. Queries go through in blocks of `radius`, each against the three blocks around it.
    """
    batch, _, length, _ = q_BHTK.shape
    n_blocks = -(-length // radius)
    q_NHCK = _blocks(F.pad(q_BHTK, (0, 0, 0, n_blocks * radius - length)), radius, radius)
    around = (0, 0, radius, (n_blocks + 1) * radius - length)
    k_NHWK, v_NHWK = (_blocks(F.pad(x_BHTK, around), 3 * radius, radius) for x_BHTK in (k_BHTK, v_BHTK))
    seen = _Seen(batch, n_blocks, radius, length, q_BHTK.device, first_BT, end_BT)
    if global_tokens is None:
        mask_N1CW = seen.near_N1CW(None)
    else:
        k_NHWK, v_NHWK = (
            torch.cat([global_tokens.gather(x_BHTK).repeat_interleave(n_blocks, 0), x_NHWK], 2)
            for x_BHTK, x_NHWK in ((k_BHTK, k_NHWK), (v_BHTK, v_NHWK))
        )
        mask_N1CW = torch.cat([seen.global_N1CW(global_tokens), seen.near_N1CW(global_tokens)], -1)
    y_NHCK = F.scaled_dot_product_attention(q_NHCK, k_NHWK, v_NHWK, attn_mask=mask_N1CW, dropout_p=dropout)
    return y_NHCK.unflatten(0, (batch, n_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


class GlobalTokens:
    """The tokens that see all and are seen by all: where in their rows they stand."""

    def __init__(self, global_BT: torch.Tensor):
        self.is_global_BT = global_BT.bool()
        n_most = int(self.is_global_BT.sum(1).max())
        self.places_BN = self.is_global_BT.int().argsort(dim=1, descending=True, stable=True)[:, :n_most]
        self.is_real_BN = self.is_global_BT.gather(1, self.places_BN)

    def gather(self, x_BHTK: torch.Tensor) -> torch.Tensor:
        """[B, H, N, K] of these tokens; rows that have fewer are filled up with others."""
        where_BHNK = self.places_BN[:, None, :, None].expand(-1, x_BHTK.shape[1], -1, x_BHTK.shape[3])
        return x_BHTK.gather(2, where_BHNK)

    def put(self, x_BTD: torch.Tensor, y_BND: torch.Tensor) -> torch.Tensor:
        """x with y at these tokens."""
        rows_M, slots_M = self.is_real_BN.nonzero(as_tuple=True)
        return x_BTD.index_put((rows_M, self.places_BN[rows_M, slots_M]), y_BND[rows_M, slots_M].to(x_BTD.dtype))


def local_mask(
    radius: int,
    batch: int,
    length: int,
    device: torch.device,
    first_BT: torch.Tensor | None = None,
    end_BT: torch.Tensor | None = None,
    global_tokens: GlobalTokens | None = None,
) -> torch.Tensor:
    """What the queries of `local_attention` see, whole: bool [B, T, T]. For pictures, and to compare with."""
    at_T = torch.arange(length, device=device)
    within_BTT = torch.ones(batch, length, length, dtype=torch.bool, device=device)
    if first_BT is not None:
        within_BTT = within_BTT & (at_T >= first_BT[:, :, None])
    if end_BT is not None:
        within_BTT = within_BTT & (at_T < end_BT[:, :, None])
    near_TT = (at_T - at_T[:, None]).abs() <= radius
    if global_tokens is None:
        return within_BTT & near_TT | torch.eye(length, dtype=torch.bool, device=device)
    is_global_BT = global_tokens.is_global_BT
    reached_BTT = near_TT | is_global_BT[:, None, :] | is_global_BT[:, :, None]
    return within_BTT & reached_BTT | torch.eye(length, dtype=torch.bool, device=device)


class _Seen:
    """Masks of the blocks, N = batch * n_blocks: a query at C in its block against a key at W in the three around it."""

    def __init__(self, batch, n_blocks, radius, length, device, first_BT, end_BT):
        self._batch, self._n_blocks, self._radius, self._length = batch, n_blocks, radius, length
        self._query_NC = torch.arange(n_blocks * radius, device=device).view(n_blocks, radius)
        self._first_BNC, self._end_BNC = self._in_blocks(first_BT, 0), self._in_blocks(end_BT, length)

    def near_N1CW(self, global_tokens: GlobalTokens | None) -> torch.Tensor:
        offsets_W = torch.arange(-self._radius, 2 * self._radius, device=self._query_NC.device)
        key_NW = self._query_NC[:, :1] + offsets_W
        away_NCW = key_NW[:, None, :] - self._query_NC[:, :, None]
        seen_BNCW = (away_NCW.abs() <= self._radius) & self._within(key_NW[None, :, None, :])
        seen_BNCW = seen_BNCW | (away_NCW == 0)
        if global_tokens is not None:
            padded_BT = F.pad(global_tokens.is_global_BT, (self._radius, (self._n_blocks + 1) * self._radius))
            is_global_BNW = padded_BT.unfold(1, 3 * self._radius, self._radius)[:, : self._n_blocks]
            seen_BNCW = seen_BNCW & ~is_global_BNW[:, :, None, :]
        return self._joined(seen_BNCW)

    def global_N1CW(self, global_tokens: GlobalTokens) -> torch.Tensor:
        key_B11G = global_tokens.places_BN[:, None, None, :]
        seen_BNCG = self._within(key_B11G) | (key_B11G == self._query_NC[None, :, :, None])
        return self._joined(seen_BNCG & global_tokens.is_real_BN[:, None, None, :])

    def _within(self, key: torch.Tensor) -> torch.Tensor:
        return (key >= self._first_BNC[..., None]) & (key < self._end_BNC[..., None])

    def _in_blocks(self, limit_BT: torch.Tensor | None, default: int) -> torch.Tensor:
        if limit_BT is None:
            return torch.full((1, 1, 1), default, device=self._query_NC.device)
        filled_BT = F.pad(limit_BT, (0, self._n_blocks * self._radius - self._length), value=0)
        return filled_BT.unflatten(1, (self._n_blocks, self._radius))

    def _joined(self, seen_BNCW: torch.Tensor) -> torch.Tensor:
        return seen_BNCW.expand(self._batch, self._n_blocks, -1, -1).flatten(0, 1).unsqueeze(1)


def _blocks(x_BHTK: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """[B * n, H, size, K]: overlapping pieces along T."""
    return x_BHTK.unfold(2, size, stride).permute(0, 2, 1, 4, 3).flatten(0, 1)
