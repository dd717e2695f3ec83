"""Scaled dot-product attention behind one signature; what runs underneath is chosen here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor,
    v_BGSK: torch.Tensor,
    *,
    mask_BTS: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v -> [B, H, T, K]; H is a multiple of G, each kv head serves H / G query heads.

    `mask_BTS` (bool, true = may attend) excludes `causal`, which means key s <= query t for T = S. A query that may attend to
    nothing gets finite values.
    """
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
