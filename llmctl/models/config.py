"""What a model is made of, as plain values: no torch here, so that commands can reason about shapes before it loads.

A model is an embedding, a stack of blocks and a head. A block is norm -> mixer -> residual -> norm -> ffn, and each part
is a value of its own that knows its size; a family (families/) builds these from a Hugging Face config and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmctl.models.config_classifier import Classifier
from llmctl.models.config_recurrent import Mamba, Mamba2, Recurrent

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
NormPlacement = Literal["pre", "post", "sandwich", "output"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm (arXiv:1910.07467) or LayerNorm; `offset` is added to the stored weight (Gemma keeps its distance from 1).

    `casts`: the output has the weight's dtype whatever the input has.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-5
    offset: float = 0.0
    casts: bool = False

    def parameters(self, width: int) -> int:
        return width * (2 if self.kind == "layer" else 1)


@dataclass(frozen=True)
class Rope:
    """Rotary positions (arXiv:2104.09864). `scaling` is the Hugging Face dictionary (rope_type, factor, ...) or None.

    Only the first `dims` elements of a head turn; None means all. `stored`: the checkpoint holds the frequencies
    themselves, which may differ from those that theta gives (ESM-2's were rounded in training).
    """

    theta: float = 10000.0
    scaling: dict[str, Any] | None = None
    dims: int | None = None
    stored: bool = False


@dataclass(frozen=True)
class Attention:
    """Multi-head attention; `n_kv_heads` < `n_heads` shares keys and values within groups (GQA, arXiv:2305.13245).

    `window`: a token sees itself and the window - 1 before it. `scale` multiplies the scores (None: 1 / sqrt(head_dim));
    `softcap` bounds them by softcap * tanh(scores / softcap). `qk_norm` works on each head, or on the whole projection.
    """

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rope: Rope | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    qk_norm: Norm | None = None
    qk_norm_over: Literal["head", "projection"] = "head"

    def parameters(self, d_model: int) -> int:
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        total = d_model * (2 * q_width + 2 * kv_width)
        total += (q_width + 2 * kv_width) * self.qkv_bias + d_model * self.out_bias
        if self.qk_norm:
            per_head = self.qk_norm_over == "head"
            total += sum(self.qk_norm.parameters(self.head_dim if per_head else n) for n in (q_width, kv_width))
        return total

    def sequence_flops(self, seq_len: int) -> float:
        """Per token and forward pass, what the products of queries with keys and of weights with values take."""
        seen = min(seq_len, self.window or seq_len)
        return 4 * self.n_heads * self.head_dim * seen * (0.5 if self.causal and seen == seq_len else 1.0)


@dataclass(frozen=True)
class LocalAttention:
    """Longformer's (arXiv:2004.05150): a token sees the `radius` tokens on each side of it, and those chosen as global.

    Global tokens see, through projections of their own, all others.
    """

    n_heads: int
    head_dim: int
    radius: int
    causal = False

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads

    def parameters(self, d_model: int) -> int:
        width = self.n_heads * self.head_dim
        return 6 * (d_model + 1) * width + (width + 1) * d_model

    def active_parameters(self, d_model: int) -> int:
        """Without the projections for global tokens, of which there are few."""
        width = self.n_heads * self.head_dim
        return 3 * (d_model + 1) * width + (width + 1) * d_model

    def sequence_flops(self, seq_len: int) -> float:
        """Per token and forward pass, what the products of queries with keys and of weights with values take."""
        return 4 * self.n_heads * self.head_dim * min(seq_len, 3 * self.radius)


@dataclass(frozen=True)
class Mlp:
    """down(activation(up(x)))."""

    d_ff: int
    activation: Activation = "gelu_tanh"
    bias: bool = True

    def parameters(self, d_model: int) -> int:
        return 2 * d_model * self.d_ff + (self.d_ff + d_model) * self.bias

    active_parameters = parameters


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x)), arXiv:2002.05202."""

    d_ff: int
    activation: Activation = "silu"
    bias: bool = False

    def parameters(self, d_model: int) -> int:
        return 3 * d_model * self.d_ff + (2 * self.d_ff + d_model) * self.bias

    active_parameters = parameters


@dataclass(frozen=True)
class Moe:
    """A mixture of experts: each token goes to the `top_k` that its router scores highest (arXiv:2101.03961, 2401.04088).

    `normalize` makes the chosen weights sum to one. `balance_loss` is the coefficient of the load-balancing loss in
    training (arXiv:2101.03961, equations 4 to 6).
    """

    n_experts: int
    top_k: int
    expert: GatedMlp
    normalize: bool = True
    balance_loss: float = 0.0

    def parameters(self, d_model: int) -> int:
        return d_model * self.n_experts + self.n_experts * self.expert.parameters(d_model)

    def active_parameters(self, d_model: int) -> int:
        """What one token meets."""
        return d_model * self.n_experts + self.top_k * self.expert.parameters(d_model)


@dataclass(frozen=True)
class LearnedPositions:
    """One trained vector per position, added to the token embedding; the table begins with `offset` rows that no
    position uses (RoBERTa, BART)."""

    offset: int = 0


@dataclass(frozen=True)
class RelativeBias:
    """One trained number per head and bucket of distances from query to key, added to the scores of self-attention by all
    layers of a stack alike (T5, arXiv:1910.10683).

    Half of the buckets are exact distances, the others grow to `max_distance` and beyond; with `both_ways` half of all are
    for keys behind the query.
    """

    n_heads: int
    n_buckets: int = 32
    max_distance: int = 128
    both_ways: bool = False


@dataclass(frozen=True)
class Block:
    """`pre`: x + f(norm(x)). `post`: norm(x + f(x)). `sandwich`: x + norm(f(norm(x))). `output`: x + norm(f(x)).

    With `cross_attention` (to an encoder's output) its branch stands between mixer and ffn.
    """

    mixer: Attention | LocalAttention | Mamba | Mamba2 | Recurrent
    ffn: Mlp | GatedMlp | Moe | None
    norm: Norm
    norm_placement: NormPlacement = "pre"
    cross_attention: Attention | None = None

    @property
    def branches(self) -> tuple[Any, ...]:
        return tuple(part for part in (self.mixer, self.cross_attention, self.ffn) if part is not None)

    def parameters(self, d_model: int, active: bool = False) -> int:
        norms_per_branch = 2 if self.norm_placement == "sandwich" else 1
        total = len(self.branches) * norms_per_branch * self.norm.parameters(d_model)
        for part in self.branches:
            count = getattr(part, "active_parameters", part.parameters) if active else part.parameters
            total += count(d_model)
        return total


@dataclass(frozen=True)
class HeadTransform:
    """norm(activation(dense(x))) in front of the vocabulary matrix, as BERT has it."""

    activation: Activation
    norm: Norm

    def parameters(self, d_model: int) -> int:
        return d_model * d_model + d_model + self.norm.parameters(d_model)


@dataclass(frozen=True)
class Head:
    """From the last hidden state to logits: x -> transform -> scale * x @ weight.T + bias -> softcap.

    A "fixed" bias is a constant of the model, which no training changes.
    """

    transform: HeadTransform | None = None
    scale: float = 1.0
    bias: bool | Literal["fixed"] = False
    softcap: float | None = None


@dataclass(frozen=True)
class TokenDropout:
    """Masked tokens are embedded as zero, and the others scaled to the sum that they had in training, when
    `trained_share` of the tokens was masked (ESM-2)."""

    mask_id: int
    trained_share: float = 0.15 * 0.8


@dataclass(frozen=True)
class Carried:
    """A tensor of the checkpoint that nothing here computes with: kept so that what we save is whole.

    `of_head`: one of the language-model head, which a classifier does not have.
    """

    name: str
    shape: tuple[int, ...]
    of_head: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """`blocks` is repeated in order until there are `n_layers`: one entry for a uniform stack.

    `max_positions` None: nothing in the model limits the length. `head` None: a base model, which only embeds. `encoder`, where there is one, is a stack of its own
    that shares the token embedding, the blocks here are the decoder's, and `decoder_start_id` is the token that it reads
    first.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    max_positions: int | None
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    positions: LearnedPositions | RelativeBias | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    token_types: int = 0
    token_dropout: TokenDropout | None = None
    head: Head | None = Head()
    classifier: Classifier | None = None
    """Of a model that classifies texts: stands in place of the head over the vocabulary."""
    tie_embeddings: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
    encoder: ModelConfig | None = None
    decoder_start_id: int | None = None
    carried: tuple[Carried, ...] = ()
    float32_residual: bool = False
    """What the blocks add to stays in float32 where weights are of lower precision; their norms cast."""
    hf: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """The Hugging Face config that this was read from: keys that we do not interpret survive a save."""

    def block(self, layer: int) -> Block:
        return self.blocks[layer % len(self.blocks)]

    @property
    def predicts_tokens(self) -> bool:
        return self.head is not None and self.classifier is None

    def classifying(self, classifier: Classifier) -> ModelConfig:
        """The same model with a classifier as its head."""
        kept = tuple(entry for entry in self.carried if not entry.of_head)
        return replace(self, classifier=classifier, carried=kept)

    @property
    def kind(self) -> Literal["causal", "masked", "seq2seq"]:
        """What it was made for: to continue a text, to fill its gaps, or to turn one text into another."""
        if self.encoder is not None:
            return "seq2seq"
        return "causal" if getattr(self.blocks[0].mixer, "causal", True) else "masked"


def parameter_count(config: ModelConfig, active: bool = False) -> int:
    """Number of distinct parameters, without building the model; with `active`, of those that one token meets."""
    total = config.vocab_size * config.d_model + _head_parameters(config)
    total += _stack_parameters(config, active)
    return total + (_stack_parameters(config.encoder, active) if config.encoder else 0)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The numbers that the first block's mixer and feed-forward layer have, by name."""
    block = config.block(0)
    parts = (block.mixer, block.ffn, getattr(block.ffn, "expert", None))
    values = {name: getattr(part, name, None) for part in parts for name in _SIZES if hasattr(part, name)}
    return {name: values[name] for name in _SIZES if values.get(name) is not None}


_SIZES = ("n_heads", "n_kv_heads", "head_dim", "window", "d_inner", "d_state", "n_groups", "n_experts", "top_k", "d_ff")


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Floating-point operations to train on one token: 6 per weight in a matrix product, and attention.

    The PaLM appendix's count (arXiv:2204.02311, B), with causal attention halved because half of the scores are masked. Of an
    encoder-decoder both stacks are counted for each token, which is the most that it may cost.
    """
    embedding = config.vocab_size * config.d_model
    matrices = parameter_count(config, active=True) - (
        0 if config.predicts_tokens and config.tie_embeddings else embedding
    )
    matrices -= _position_parameters(config)
    mixers = [config.block(i).mixer for i in range(config.n_layers)]
    return 6 * matrices + sum(3 * mixer.sequence_flops(seq_len) for mixer in mixers)


def _head_parameters(config: ModelConfig) -> int:
    head = config.head
    if config.classifier is not None:
        return config.classifier.parameters(config.d_model)
    if head is None:
        return 0
    total = config.vocab_size * ((0 if config.tie_embeddings else config.d_model) + (head.bias is True))
    return total + (head.transform.parameters(config.d_model) if head.transform else 0)


def _stack_parameters(config: ModelConfig, active: bool) -> int:
    total = _position_parameters(config) + config.token_types * config.d_model
    total += sum(norm.parameters(config.d_model) for norm in (config.final_norm, config.embedding_norm) if norm)
    return total + sum(config.block(i).parameters(config.d_model, active) for i in range(config.n_layers))


def _position_parameters(config: ModelConfig) -> int:
    match config.positions:
        case LearnedPositions(offset):
            return (config.max_positions + offset) * config.d_model
        case RelativeBias(n_heads, n_buckets):
            return n_buckets * n_heads
    return 0
