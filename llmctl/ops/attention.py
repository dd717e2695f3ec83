"""Scaled dot-product attention behind one signature; what runs underneath is chosen here and nowhere else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmctl.ops import blocked_attention, cached_attention
from llmctl.ops.cached_attention import InBytes
from llmctl.ops.visibility import Visibility


def attention(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor | InBytes,
    v_BGSK: torch.Tensor | InBytes,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HTS: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(softcap(scale q k^T) + bias) v -> [B, H, T, K]; H is a multiple of G, each kv head serves H / G query heads.

    `scale` None is 1 / sqrt(K). Every query must see at least one key.
    """
    if not dropout and cached_attention.applies(q_BHTK, k_BGSK, v_BGSK):
        return cached_attention.attention(
            q_BHTK, k_BGSK, v_BGSK, visibility, scale=scale, softcap=softcap, bias_HTS=bias_HTS
        )
    if isinstance(k_BGSK, InBytes):
        k_BGSK, v_BGSK = k_BGSK.decoded(q_BHTK.dtype), v_BGSK.decoded(q_BHTK.dtype)
        return attention(
            q_BHTK, k_BGSK, v_BGSK, visibility, scale=scale, softcap=softcap, bias_HTS=bias_HTS, dropout=dropout
        )
    plain = scale is None and softcap is None and bias_HTS is None and not dropout
    starts_at_zero = visibility.causal and visibility.offset == 0 and visibility.end_BT is None
    if plain and starts_at_zero and blocked_attention.applies(q_BHTK, visibility.first_BT is not None):
        first_keys_BT = visibility.first_BT
        if first_keys_BT is not None:
            first_keys_BT = first_keys_BT.expand(q_BHTK.shape[0], q_BHTK.shape[2])
        return blocked_attention.causal_attention(q_BHTK, k_BGSK, v_BGSK, first_keys_BT)
    if softcap is not None:
        weights_BHTS = attention_weights(q_BHTK, k_BGSK, visibility, scale=scale, softcap=softcap, bias_HTS=bias_HTS)
        weights_BHTS = F.dropout(weights_BHTS, dropout, training=dropout > 0).to(v_BGSK.dtype)
        return weights_BHTS @ _repeat_heads(v_BGSK, q_BHTK)
    if q_BHTK.device.type == "cpu":  # torch's CPU flash kernel takes equal head counts only
        k_BGSK, v_BGSK = _repeat_heads(k_BGSK, q_BHTK), _repeat_heads(v_BGSK, q_BHTK)
    triangle = visibility.is_triangle() and bias_HTS is None and q_BHTK.shape[2] > 1
    return F.scaled_dot_product_attention(
        q_BHTK,
        k_BGSK,
        v_BGSK,
        attn_mask=None if triangle else _mask(visibility, bias_HTS, q_BHTK, k_BGSK),
        is_causal=triangle,
        dropout_p=dropout,
        scale=scale,
        enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
    )


def attention_weights(
    q_BHTK: torch.Tensor,
    k_BGSK: torch.Tensor | InBytes,
    visibility: Visibility,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias_HTS: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax itself, [B, H, T, S] float32: how much each query takes from each key."""
    k_BGSK = k_BGSK.decoded(q_BHTK.dtype) if isinstance(k_BGSK, InBytes) else k_BGSK
    scale = q_BHTK.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = (q_BHTK * scale).float() @ _repeat_heads(k_BGSK, q_BHTK).float().mT
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    if bias_HTS is not None:
        scores_BHTS = scores_BHTS + bias_HTS
    if not visibility.hides_nothing(q_BHTK.shape[2]):
        mask_BTS = visibility.mask_BTS(q_BHTK.shape[2], k_BGSK.shape[2], q_BHTK.device)
        scores_BHTS = scores_BHTS.masked_fill(~mask_BTS.unsqueeze(1), float("-inf"))
    return scores_BHTS.softmax(-1)


def _mask(visibility, bias_HTS, q_BHTK, k_BGSK) -> torch.Tensor | None:
    """What torch adds to the scores: a bool mask, or the bias with -inf where nothing is seen."""
    n_queries, n_keys = q_BHTK.shape[2], k_BGSK.shape[2]
    if visibility.hides_nothing(n_queries):
        return None if bias_HTS is None else bias_HTS.to(q_BHTK.dtype)
    mask_B1TS = visibility.mask_BTS(n_queries, n_keys, q_BHTK.device).unsqueeze(1)
    if bias_HTS is None:
        return mask_B1TS
    return bias_HTS.to(q_BHTK.dtype).masked_fill(~mask_B1TS, float("-inf"))


def _repeat_heads(k_BGSK: torch.Tensor, q_BHTK: torch.Tensor) -> torch.Tensor:
    repeats = q_BHTK.shape[1] // k_BGSK.shape[1]
    return k_BGSK if repeats == 1 else k_BGSK.repeat_interleave(repeats, 1)
