"""The attention mixer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llmctl.models import config, norm
from llmctl.models.cache import KVCache
from llmctl.models.position import rotate
from llmctl.ops.attention import attention


@dataclass
class Context:
    """What every layer of one forward shares, worked out once by the stack."""

    mask_BTS: torch.Tensor | None = None
    """bool, true = may attend; None means plainly causal (or, for one new token, everything cached)."""
    first_keys_BT: torch.Tensor | None = None
    """With packed documents, where in its row each token's document begins."""
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    cache: KVCache | None = None


class Attention(nn.Module):
    """softmax(q k^T) v with grouped heads, rotary positions where the context has them, and a cache."""

    def __init__(self, spec: config.Attention, d_model: int, layer: int, dropout: float):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, spec.head_dim, dropout
        self.q_proj = nn.Linear(d_model, spec.n_heads * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(d_model, spec.n_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(d_model, spec.n_kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.n_heads * spec.head_dim, d_model, bias=spec.out_bias)
        self.q_norm = norm.build(spec.qk_norm, spec.head_dim) if spec.qk_norm else nn.Identity()
        self.k_norm = norm.build(spec.qk_norm, spec.head_dim) if spec.qk_norm else nn.Identity()

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        q_BHTK = self.q_norm(self._heads(self.q_proj(x_BTD)))
        k_BGTK = self.k_norm(self._heads(self.k_proj(x_BTD)))
        v_BGTK = self._heads(self.v_proj(x_BTD))
        if context.rotation is not None:
            q_BHTK, k_BGTK = rotate(q_BHTK, *context.rotation), rotate(k_BGTK, *context.rotation)
        if context.cache is not None:
            k_BGTK, v_BGTK = context.cache.update(self.layer, k_BGTK, v_BGTK)
        y_BHTK = attention(
            q_BHTK,
            k_BGTK,
            v_BGTK,
            mask_BTS=context.mask_BTS,
            first_keys_BT=context.first_keys_BT,
            causal=context.mask_BTS is None and q_BHTK.shape[2] > 1,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))

    def _heads(self, x_BTN: torch.Tensor) -> torch.Tensor:
        return x_BTN.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
