"""The attention mixer."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models import config, norm
from llmctl.models.context import Context
from llmctl.models.linear import Linear
from llmctl.ops.attention import attention, attention_weights
from llmctl.ops.rotary import rotate


class Attention(nn.Module):
    """softmax(q k^T) v with grouped heads, rotary positions, windows and a cache, as its spec says.

    `rotary` is the number of the context's rotation that belongs to the spec's Rope.
    """

    def __init__(self, spec: config.Attention, d_model: int, layer: int, rotary: int | None, dropout: float = 0.0):
        super().__init__()
        self.spec, self.layer, self.rotary, self.dropout = spec, layer, rotary, dropout
        q_width, kv_width = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
        self.q_proj = Linear(d_model, q_width, bias=spec.qkv_bias)
        self.k_proj = Linear(d_model, kv_width, bias=spec.qkv_bias)
        self.v_proj = Linear(d_model, kv_width, bias=spec.qkv_bias)
        self.o_proj = Linear(q_width, d_model, bias=spec.out_bias)
        per_head = spec.qk_norm_over == "head"
        self.q_norm = norm.build(spec.qk_norm, spec.head_dim if per_head else q_width)
        self.k_norm = norm.build(spec.qk_norm, spec.head_dim if per_head else kv_width)

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        q_BHTK = self._normalized_heads(self.q_proj(x_BTD), self.q_norm)
        k_BGSK = self._normalized_heads(self.k_proj(x_BTD), self.k_norm)
        v_BGSK = self._heads(self.v_proj(x_BTD))
        if self.rotary is not None:
            rotation = context.rotations[self.rotary]
            q_BHTK, k_BGSK = rotate(q_BHTK, *rotation), rotate(k_BGSK, *rotation)
        k_BGSK, v_BGSK = context.with_virtual(self.layer, k_BGSK, v_BGSK)
        if context.cache is not None:
            k_BGSK, v_BGSK = context.cache.layers[self.layer].append(context.offset, k_BGSK, v_BGSK)
        visibility = context.visibility(self.spec.causal, self.spec.window)
        return self._attend(q_BHTK, k_BGSK, v_BGSK, visibility, context, context.bias_HTS)

    def _attend(self, q_BHTK, k_BGSK, v_BGSK, visibility, context: Context, bias_HTS=None) -> torch.Tensor:
        how = {"scale": self.spec.scale, "softcap": self.spec.softcap, "bias_HTS": bias_HTS}
        if context.recorded_weights is not None:
            context.recorded_weights.append(attention_weights(q_BHTK, k_BGSK, visibility, **how))
        dropout = self.dropout if self.training else 0.0
        y_BHTK = attention(q_BHTK, k_BGSK, v_BGSK, visibility, **how, dropout=dropout)
        return self.o_proj(y_BHTK.transpose(1, 2).flatten(2))

    def _normalized_heads(self, x_BTN: torch.Tensor, norm_: nn.Module) -> torch.Tensor:
        if self.spec.qk_norm_over == "head":
            return norm_(self._heads(x_BTN))
        return self._heads(norm_(x_BTN))

    def _heads(self, x_BTN: torch.Tensor) -> torch.Tensor:
        return x_BTN.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2)


class CrossAttention(Attention):
    """Queries of a decoder; keys and values of what an encoder made of the source."""

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        k_BGSK, v_BGSK = context.memory.keys_and_values(self.layer, self._project)
        # Order is nothing to these queries: the tokens of rows that share a source are further ones of the same row.
        queries_BTD = x_BTD.reshape(len(k_BGSK), -1, x_BTD.shape[-1])
        q_BHTK = self._normalized_heads(self.q_proj(queries_BTD), self.q_norm)
        return self._attend(q_BHTK, k_BGSK, v_BGSK, context.memory_visibility, context).view_as(x_BTD)

    def _project(self, hidden_BSD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_BGSK = self._normalized_heads(self.k_proj(hidden_BSD), self.k_norm)
        return k_BGSK, self._heads(self.v_proj(hidden_BSD))
