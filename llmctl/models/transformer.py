"""Block, stack and the causal language model: the one forward pass that every command runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmctl.models import config, ffn, norm
from llmctl.models.attention import Attention, Context
from llmctl.models.cache import KVCache
from llmctl.models.position import RotaryTable


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, model: config.ModelConfig, layer: int):
        super().__init__()
        spec = model.block(layer)
        self.mixer_norm = norm.build(spec.norm, model.d_model)
        self.mixer = Attention(spec.mixer, model.d_model, layer, model.dropout)
        self.ffn_norm = norm.build(spec.norm, model.d_model)
        self.ffn = ffn.build(spec.ffn, model.d_model)
        self.dropout = model.dropout

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        x_BTD = x_BTD + self._drop(self.mixer(self.mixer_norm(x_BTD), context))
        return x_BTD + self._drop(self.ffn(self.ffn_norm(x_BTD)))

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


class CausalLM(nn.Module):
    """A decoder-only language model: token ids to logits over the vocabulary."""

    def __init__(self, config_: config.ModelConfig):
        super().__init__()
        self.config = config_
        self.activation_checkpointing = False
        self.embed_tokens = _embedding(config_.vocab_size, config_.d_model)
        learned = isinstance(config_.positions, config.LearnedPositions)
        self.embed_positions = _embedding(config_.max_positions, config_.d_model) if learned else None
        self.rotary = None if learned else RotaryTable(config_.positions, config_.blocks[0].mixer.head_dim)
        self.layers = nn.ModuleList(Block(config_, layer) for layer in range(config_.n_layers))
        self.norm = norm.build(config_.final_norm, config_.d_model)
        tied = config_.tie_embeddings
        self.lm_head = None if tied else nn.Linear(config_.d_model, config_.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D], whether or not it is the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]; the arguments are those of `hidden`."""
        return F.linear(self.hidden(input_ids_BT, attention_mask_BT, documents_BT=documents_BT, cache=cache), self.head_weight)  # fmt: skip

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        documents_BT: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The last layer's output after the final norm, [B, T, D].

        `attention_mask_BT` is 1 at real tokens and 0 at padding on the left. `documents_BT` (int, non-decreasing along T)
        numbers the documents packed into a row: tokens attend within their own only and positions restart with each. With a
        `cache` the T tokens continue what it holds.
        """
        length, device = input_ids_BT.shape[1], input_ids_BT.device
        offset = 0 if cache is None else cache.length
        starts_B = None if cache is None else cache.starts_B
        if attention_mask_BT is not None:
            starts_B = (attention_mask_BT == 0).sum(1)
        first_keys_BT = None if documents_BT is None else _document_starts(documents_BT)
        positions_BT = _positions(length, offset, starts_B, first_keys_BT, device)
        x_BTD = self.embed_tokens(input_ids_BT)
        if self.embed_positions is not None:
            where = torch.arange(offset, offset + length, device=device) if positions_BT is None else positions_BT
            x_BTD = x_BTD + self.embed_positions(where)
        x_BTD = F.dropout(x_BTD, self.config.dropout) if self.training and self.config.dropout else x_BTD
        rotation = None if self.rotary is None else self.rotary.lookup(positions_BT, length, offset, device)
        if rotation is not None:
            rotation = tuple(table.to(self._rotation_dtype(x_BTD)) for table in rotation)
        context = Context(_mask(length, offset, starts_B, device), first_keys_BT, rotation, cache)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, context, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, context)
        if cache is not None:
            cache.length += length
        return self.norm(x_BTD)

    @staticmethod
    def _rotation_dtype(x_BTD: torch.Tensor) -> torch.dtype:
        """Rotate in the precision of the projections, which autocast may have lowered."""
        kind = x_BTD.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype


def _embedding(count: int, width: int) -> nn.Embedding:
    # Given a weight, torch draws none: on the meta device that alone imports its compiler, which takes a second.
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


def _document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: where in its row each token's document begins."""
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    steps_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return torch.where(is_first_BT, steps_T, 0).cummax(1).values


def _positions(length, offset, starts_B, first_keys_BT, device) -> torch.Tensor | None:
    """[B, T] positions, or None when every row simply counts up from `offset`."""
    steps_T = torch.arange(offset, offset + length, device=device)
    if first_keys_BT is not None:
        return steps_T - first_keys_BT
    if starts_B is not None:
        return (steps_T - starts_B[:, None]).clamp(min=0)
    return None


def _mask(length, offset, starts_B, device) -> torch.Tensor | None:
    """[B, T, S] (B may be 1), true where a query may attend; None where plain causal attention says the same."""
    if starts_B is None and (offset == 0 or length == 1):
        return None
    queries_T1 = torch.arange(offset, offset + length, device=device)[:, None]
    keys_S = torch.arange(offset + length, device=device)
    mask_BTS = (keys_S <= queries_T1)[None]
    if starts_B is not None:
        # A padding query attends to itself, so that its softmax is finite.
        mask_BTS = mask_BTS & ((keys_S >= starts_B[:, None, None]) | (keys_S == queries_T1))
    return mask_BTS
