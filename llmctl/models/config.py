"""What a model is made of, as plain values: no torch here, so that commands can reason about shapes before it loads.

A model is an embedding, a stack of blocks and a head. A block is norm -> mixer -> residual -> norm -> ffn, and each part
is a value of its own; a family (families/) builds these from a Hugging Face config and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True)
class Norm:
    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; `n_kv_heads` < `n_heads` shares keys and values within groups (GQA, arXiv:2305.13245)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Norm | None = None


@dataclass(frozen=True)
class Mlp:
    d_ff: int
    activation: Activation = "gelu_tanh"
    bias: bool = True


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)), arXiv:2002.05202."""

    d_ff: int
    activation: Activation = "silu"
    bias: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864). `scaling` is the Hugging Face dictionary (rope_type, factor, ...) or None."""

    theta: float = 10000.0
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class LearnedPositions:
    """One trained vector per position, added to the token embedding."""


@dataclass(frozen=True)
class Block:
    mixer: Attention
    ffn: Mlp | GatedMlp
    norm: Norm


@dataclass(frozen=True)
class ModelConfig:
    """`blocks` is repeated in order until there are `n_layers`: one entry for a uniform stack."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    max_positions: int
    blocks: tuple[Block, ...]
    positions: Rope | LearnedPositions
    final_norm: Norm
    tie_embeddings: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The Hugging Face config that this was read from: keys that we do not interpret survive a save."""

    def block(self, layer: int) -> Block:
        return self.blocks[layer % len(self.blocks)]


def parameter_count(config: ModelConfig) -> int:
    """Number of distinct parameters, without building the model."""
    embedding = config.vocab_size * config.d_model
    total = embedding * (1 if config.tie_embeddings else 2) + _norm_parameters(config.final_norm, config.d_model)
    if isinstance(config.positions, LearnedPositions):
        total += config.max_positions * config.d_model
    return total + sum(_block_parameters(config.block(i), config.d_model) for i in range(config.n_layers))


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: 6 per weight in a matrix product, and causal attention.

    The PaLM appendix's count (arXiv:2204.02311, B), with attention halved because half of the scores are masked.
    """
    embedding = config.vocab_size * config.d_model
    matrices = parameter_count(config) - (0 if config.tie_embeddings else embedding)
    if isinstance(config.positions, LearnedPositions):
        matrices -= config.max_positions * config.d_model
    blocks = (config.block(i).mixer for i in range(config.n_layers))
    return 6 * matrices + sum(6 * mixer.n_heads * mixer.head_dim * seq_len for mixer in blocks)


def _norm_parameters(norm: Norm, width: int) -> int:
    return width * (2 if norm.kind == "layer" else 1)


def _block_parameters(block: Block, d_model: int) -> int:
    mixer, ffn = block.mixer, block.ffn
    q_width, kv_width = mixer.n_heads * mixer.head_dim, mixer.n_kv_heads * mixer.head_dim
    total = d_model * (2 * q_width + 2 * kv_width) + 2 * _norm_parameters(block.norm, d_model)
    total += (q_width + 2 * kv_width) * mixer.qkv_bias + d_model * mixer.out_bias
    if mixer.qk_norm:
        total += 2 * _norm_parameters(mixer.qk_norm, mixer.head_dim)
    n_in = 2 if isinstance(ffn, GatedMlp) else 1
    return total + (n_in + 1) * d_model * ffn.d_ff + (n_in * ffn.d_ff + d_model) * ffn.bias
