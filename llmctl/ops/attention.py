"""Scaled dot-product attention behind one signature; what runs underneath is chosen here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmctl.ops import blocked_attention


def attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    mask_BTS: torch.Tensor | None = None,
    first_keys_BT: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v -> [B, H, T, K]; H is a multiple of G, each kv head serves H / G query heads.

    Which keys a query may attend to: with `causal` (T = S) those up to itself, and with `first_keys_BT` (int64) only from
    that index on, which keeps packed documents apart; with `mask_BTS` (bool, true = may attend) those that it says; else
    all. A query that may attend to nothing gets finite values.
    """
    if causal and mask_BTS is None and not dropout and blocked_attention.applies(q_BHTK, first_keys_BT is not None):
        return blocked_attention.causal_attention(q_BHTK, k_BGSK, v_BGSK, first_keys_BT)
    if first_keys_BT is not None:
        mask_BTS, causal = mask_of(first_keys_BT), False
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    if grouped and q_BHTK.device.type == "cpu":
        # torch's CPU flash kernel takes equal head counts only.
        repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
        k_BGSK, v_BGSK = k_BGSK.repeat_interleave(repeats, 1), v_BGSK.repeat_interleave(repeats, 1)
        grouped = False
    mask = None if mask_BTS is None else mask_BTS.unsqueeze(1)
    return F.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
    )


def mask_of(first_keys_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, T, S = T]: key s is at or behind the query's first key, and not behind the query."""
    keys_S = torch.arange(first_keys_BT.shape[1], device=first_keys_BT.device)
    return (keys_S >= first_keys_BT[:, :, None]) & (keys_S <= keys_S[:, None])
