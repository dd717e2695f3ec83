"""Block and stack: the one forward pass under every model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmctl.models import config, ffn, norm
from llmctl.models.attention import Attention, CrossAttention
from llmctl.models.context import Context
from llmctl.models.local_attention import LocalAttention
from llmctl.models.mamba import Mamba
from llmctl.models.mamba2 import Mamba2
from llmctl.models.position import RelativeBias, RotaryTable
from llmctl.models.recurrent import Recurrent
from llmctl.models.virtual_tokens import VirtualPrefix, VirtualPrompt, put


class Block(nn.Module):
    """x + mixer(x), x + cross(x), x + ffn(x); the norms that its placement lacks are identities (see `config.Block`)."""

    def __init__(self, spec: config.Block, d_model: int, layer: int, rotary: int | None, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.mixer = build_mixer(spec.mixer, d_model, layer, rotary, dropout)
        self.mixer_norm, self.mixer_output_norm, self.mixer_sum_norm = _norms(spec, d_model)
        self.cross = self.ffn = None
        if spec.cross_attention is not None:
            self.cross = CrossAttention(spec.cross_attention, d_model, layer, None, dropout)
            self.cross_norm, self.cross_output_norm, self.cross_sum_norm = _norms(spec, d_model)
        if spec.ffn is not None:
            self.ffn = ffn.build(spec.ffn, d_model)
            self.ffn_norm, self.ffn_output_norm, self.ffn_sum_norm = _norms(spec, d_model)

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        y_BTD = self.mixer_output_norm(self.mixer(self.mixer_norm(x_BTD), context))
        x_BTD = self.mixer_sum_norm(x_BTD + self._drop(y_BTD))
        if self.cross is not None:
            y_BTD = self.cross_output_norm(self.cross(self.cross_norm(x_BTD), context))
            x_BTD = self.cross_sum_norm(x_BTD + self._drop(y_BTD))
        if self.ffn is None:
            return x_BTD
        y_BTD = self.ffn_output_norm(self.ffn(self.ffn_norm(x_BTD)))
        return self.ffn_sum_norm(x_BTD + self._drop(y_BTD))

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BTD, self.dropout) if self.training and self.dropout else x_BTD


class Stack(nn.Module):
    """Positions, blocks and the final norm: from token embeddings to hidden states."""

    def __init__(self, config_: config.ModelConfig):
        super().__init__()
        self.config = config_
        self.activation_checkpointing = False
        self.virtual: VirtualPrompt | VirtualPrefix | None = None
        """Trained places in front of every text (see `virtual_tokens`)."""
        self.embed_positions = self.relative_bias = None
        match config_.positions:
            case config.LearnedPositions(offset):
                self.embed_positions = embedding(config_.max_positions + offset, config_.d_model)
            case config.RelativeBias() as spec:
                self.relative_bias = RelativeBias(spec)
        self.embed_types = embedding(config_.token_types, config_.d_model) if config_.token_types else None
        self.embed_norm = norm.build(config_.embedding_norm, config_.d_model)
        tables, numbers = _rotary_tables(config_)
        self.rotaries = nn.ModuleList(tables)
        self.layers = nn.ModuleList(
            Block(config_.block(i), config_.d_model, i, numbers[i], config_.dropout) for i in range(config_.n_layers)
        )
        self.norm = norm.build(config_.final_norm, config_.d_model)
        self.carried = Carried(config_.carried)

    def run(self, x_BTD: torch.Tensor, context: Context, types_BT: torch.Tensor | None = None) -> torch.Tensor:
        """The last layer's output after the final norm, [B, T, D], for scaled token embeddings; advances the cache.

        With virtual places the rows get as many longer (`whole` has their context).
        """
        if (longer := self.whole(context)) is not context:
            context, count = longer, self.virtual.count
            x_BTD, types_BT = F.pad(x_BTD, (0, 0, count, 0)), None if types_BT is None else F.pad(types_BT, (count, 0))
            values_1ND = self.virtual.embeddings(x_BTD.shape[-1])[None]
            x_BTD = put(x_BTD[:, None], values_1ND, context.starts_B)[:, 0]
        x_BTD = self._drop(self.embed_norm(x_BTD + self._position_embeddings(context, types_BT)))
        if self.config.float32_residual:
            x_BTD = x_BTD.float()
        where = (context.positions_BT, context.text_lengths_BT, context.offset, context.end, context.device)
        dtype = _rotation_dtype(x_BTD)
        tables = (table.lookup(*where) for table in self.rotaries)
        context.rotations = [(cos.to(dtype), sin.to(dtype)) for cos, sin in tables]
        if self.relative_bias is not None:
            context.bias_HTS = self.relative_bias(context.offset, context.end, context.device)
        for layer in self.layers:
            context.record(x_BTD)
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, context, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, context)
        if context.cache is not None:
            context.cache.length += context.length
        x_BTD = self.norm(x_BTD)
        context.record(x_BTD)
        return x_BTD

    def whole(self, context: Context) -> Context:
        """The context of what `run` runs: with the virtual places, where a text begins."""
        return context if self.virtual is None or context.offset else context.behind(self.virtual)

    @property
    def n_virtual(self) -> int:
        return 0 if self.virtual is None else self.virtual.count

    def _position_embeddings(self, context: Context, types_BT: torch.Tensor | None) -> torch.Tensor | float:
        """What positions and token types (all 0 where not given) add to an embedding."""
        added = 0.0
        if self.embed_positions is not None:
            where = context.columns_T if context.positions_BT is None else context.positions_BT
            added = self.embed_positions(where + self.config.positions.offset)
        if self.embed_types is not None:
            added = added + (self.embed_types.weight[0] if types_BT is None else self.embed_types(types_BT))
        return added

    def _drop(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_BTD, self.config.dropout) if self.training and self.config.dropout else x_BTD


class Carried(nn.Module):
    """Tensors of a checkpoint that nothing computes with (see `config.Carried`)."""

    def __init__(self, entries: tuple[config.Carried, ...]):
        super().__init__()
        self.entries = entries
        for entry in entries:
            self.register_buffer(entry.name, torch.empty(entry.shape))

    def reset_buffers(self) -> None:
        for entry in self.entries:
            setattr(self, entry.name, torch.zeros(entry.shape))


_MIXERS = {
    config.Attention: Attention,
    config.LocalAttention: LocalAttention,
    config.Mamba: Mamba,
    config.Mamba2: Mamba2,
    config.Recurrent: Recurrent,
}


def build_mixer(spec, d_model: int, layer: int, rotary: int | None, dropout: float) -> nn.Module:
    """The module of a mixer; one without positions or weights to drop heeds the first three alone."""
    return _MIXERS[type(spec)](spec, d_model, layer, rotary, dropout)


def embedding(count: int, width: int) -> nn.Embedding:
    # Given a weight, torch draws none: on the meta device that alone imports its compiler, which takes a second.
    return nn.Embedding(count, width, _weight=torch.empty(count, width))


def _norms(spec: config.Block, d_model: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """In front of a branch, on its output, and on the sum with the residual."""
    places = {"pre": (0,), "output": (1,), "sandwich": (0, 1), "post": (2,)}[spec.norm_placement]
    return tuple(norm.build(spec.norm if i in places else None, d_model) for i in range(3))


def _rotary_tables(config_: config.ModelConfig) -> tuple[list[RotaryTable], list[int | None]]:
    """The distinct tables of a stack, and each layer's number among them (None without rotary positions)."""
    kinds, numbers = [], []
    for i in range(config_.n_layers):
        mixer = config_.block(i).mixer
        rope = getattr(mixer, "rope", None)
        kind = None if rope is None else (rope, mixer.head_dim)
        if kind is not None and kind not in kinds:
            kinds.append(kind)
        numbers.append(None if kind is None else kinds.index(kind))
    return [RotaryTable(*kind) for kind in kinds], numbers


def _rotation_dtype(x_BTD: torch.Tensor) -> torch.dtype:
    """Rotate in the precision of the projections, which autocast may have lowered."""
    kind = x_BTD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_BTD.dtype
