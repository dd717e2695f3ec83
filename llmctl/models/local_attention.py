"""Longformer's mixer (arXiv:2004.05150)."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models import config
from llmctl.models.context import Context
from llmctl.models.linear import Linear
from llmctl.ops.attention import attention
from llmctl.ops.local_attention import GlobalTokens, local_attention, local_mask
from llmctl.ops.visibility import Visibility


class LocalAttention(nn.Module):
    """Attention within a window, and from and to the tokens that the context names as global."""

    def __init__(
        self, spec: config.LocalAttention, d_model: int, layer: int, rotary: int | None = None, dropout: float = 0.0
    ):
        super().__init__()
        self.spec, self.layer, self.dropout = spec, layer, dropout
        width = spec.n_heads * spec.head_dim
        self.q_proj, self.k_proj, self.v_proj = (Linear(d_model, width) for _ in range(3))
        self.global_q_proj, self.global_k_proj, self.global_v_proj = (Linear(d_model, width) for _ in range(3))
        self.o_proj = Linear(width, d_model)

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        q_BHTK, k_BHTK, v_BHTK = (self._heads(proj(x_BTD)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        visibility, dropout = context.visibility(causal=False), self.dropout if self.training else 0.0
        global_tokens = context.global_tokens
        seen = {"first_BT": visibility.first_BT, "end_BT": visibility.end_BT, "global_tokens": global_tokens}
        y_BHTK = local_attention(q_BHTK, k_BHTK, v_BHTK, self.spec.radius, **seen, dropout=dropout)
        y_BTD = y_BHTK.transpose(1, 2).flatten(2)
        if global_tokens is not None:
            y_BTD = global_tokens.put(y_BTD, self._global_rows(x_BTD, global_tokens, visibility, dropout))
        if context.recorded_weights is not None:
            context.recorded_weights.append(self._weights(x_BTD, q_BHTK, k_BHTK, seen))
        return self.o_proj(y_BTD)

    def _global_rows(self, x_BTD, global_tokens: GlobalTokens, visibility: Visibility, dropout: float) -> torch.Tensor:
        """What the global tokens take from all others, [B, N, D]."""
        k_BHTK, v_BHTK = self._heads(self.global_k_proj(x_BTD)), self._heads(self.global_v_proj(x_BTD))
        q_BHNK = self._heads(self.global_q_proj(global_tokens.gather(x_BTD.unsqueeze(1)).squeeze(1)))
        limits = (_of(global_tokens, visibility.first_BT), _of(global_tokens, visibility.end_BT))
        y_BHNK = attention(q_BHNK, k_BHTK, v_BHTK, Visibility(False, 0, *limits), dropout=dropout)
        return y_BHNK.transpose(1, 2).flatten(2)

    def _weights(self, x_BTD: torch.Tensor, q_BHTK: torch.Tensor, k_BHTK: torch.Tensor, seen: dict) -> torch.Tensor:
        """Who takes how much from whom, whole: [B, H, T, T] float32."""
        scores_BHTT = q_BHTK @ k_BHTK.mT
        if seen["global_tokens"] is not None:
            q_BHTK, k_BHTK = self._heads(self.global_q_proj(x_BTD)), self._heads(self.global_k_proj(x_BTD))
            is_global_B1T1 = seen["global_tokens"].is_global_BT[:, None, :, None]
            scores_BHTT = torch.where(is_global_B1T1, q_BHTK @ k_BHTK.mT, scores_BHTT)
        mask_BTT = local_mask(self.spec.radius, *x_BTD.shape[:2], x_BTD.device, **seen)
        scores_BHTT = scores_BHTT.float() * self.spec.head_dim**-0.5
        return scores_BHTT.masked_fill(~mask_BTT.unsqueeze(1), float("-inf")).softmax(-1)

    def _heads(self, x_BTN: torch.Tensor) -> torch.Tensor:
        return x_BTN.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)


def _of(global_tokens: GlobalTokens, limit_BT: torch.Tensor | None) -> torch.Tensor | None:
    """A limit of the visibility at the global tokens, [B, N]."""
    if limit_BT is None:
        return None
    return limit_BT.expand(len(global_tokens.places_BN), -1).gather(1, global_tokens.places_BN)
