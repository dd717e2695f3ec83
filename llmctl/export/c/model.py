"""Shape and weights of a model in the order in which run.c reads them, one tensor in memory at a time."""

from __future__ import annotations

import torch

from llmctl.errors import UserError
from llmctl.export.c.writer import Writer
from llmctl.export.weights import Weights
from llmctl.models import rope_scaling
from llmctl.models.config import Attention, Block, GatedMlp, LearnedPositions, Mlp, ModelConfig, Moe, Norm, Rope

_NORMS = {None: 0, "rms": 1, "layer": 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
_LIMITED = ("dynamic", "longrope")


def refuse(config: ModelConfig) -> None:
    """Raise UserError naming what run.c has no form for."""
    for reason in _obstacles(config):
        raise UserError(
            f"{config.family} cannot be exported to C: {reason}",
            hint="export-c takes decoders of attention and feed-forward layers, such as llama, qwen3, gemma or gpt2",
        )


def _obstacles(config: ModelConfig):
    if config.encoder is not None:
        yield "it is an encoder-decoder"
    if config.classifier is not None or config.head is None:
        yield "it has no head that predicts tokens"
    for i in range(config.n_layers):
        block = config.block(i)
        if not isinstance(block.mixer, Attention):
            yield f"layer {i} is {type(block.mixer).__name__}, no attention"
        elif not block.mixer.causal:
            yield "it is an encoder"
        elif block.mixer.rope and block.mixer.rope.stored:
            yield f"layer {i} has position frequencies of its own"
        if block.norm.casts or config.float32_residual:
            yield "its norms change the precision"
    if config.positions is not None and not isinstance(config.positions, LearnedPositions):
        yield f"positions of the kind {type(config.positions).__name__}"
    if config.head is not None and (config.head.transform or config.head.bias == "fixed"):
        yield "its head is more than one matrix"
    if config.token_types or config.token_dropout:
        yield "its embeddings depend on more than tokens and positions"


def context(config: ModelConfig) -> int:
    """Positions that run.c can read: angles that depend on a text's length are fixed up to the length of training."""
    longest = config.max_positions
    for rope in _ropes(config):
        if (rope.scaling or {}).get("rope_type") in _LIMITED:
            longest = min(longest, rope.scaling["original_max_position_embeddings"])
    return longest


def write(out: Writer, config: ModelConfig, source: Weights, int8: bool) -> None:
    """Everything behind the tokenizer: numbers of the model, then its tensors layer by layer."""
    head, ropes = config.head, _ropes(config)
    out.word(int(int8), config.vocab_size, config.d_model, config.n_layers, context(config))
    out.float(config.embedding_scale, head.scale, head.softcap or 0.0)
    out.word(len(ropes))
    for rope in ropes:
        _write_rope(out, rope, _rope_dims(config, rope))
    out.matrix([source.get("embed_tokens.weight")], int8)
    out.word(int(config.positions is not None))
    if config.positions is not None:
        first = config.positions.offset
        out.floats(source.get("embed_positions.weight")[first : first + context(config)])
    _write_norm(out, config.embedding_norm, source, "embed_norm")
    for layer in range(config.n_layers):
        _write_block(out, config.block(layer), ropes, source, f"layers.{layer}", int8)
    _write_norm(out, config.final_norm, source, "norm")
    out.word(int("lm_head.weight" in source))
    if "lm_head.weight" in source:
        out.matrix([source.get("lm_head.weight")], int8)
    _write_bias(out, source, "head_bias" if "head_bias" in source else "lm_head.bias")


def _ropes(config: ModelConfig) -> list[Rope]:
    found: list[Rope] = []
    for block in config.blocks:
        if block.mixer.rope is not None and block.mixer.rope not in found:
            found.append(block.mixer.rope)
    return found


def _rope_dims(config: ModelConfig, rope: Rope) -> int:
    return rope.dims or next(block.mixer.head_dim for block in config.blocks if block.mixer.rope == rope)


def _write_rope(out: Writer, rope: Rope, dims: int) -> None:
    short = torch.tensor([1]) if rope_scaling.heeds_length(rope) else None
    frequencies = rope_scaling.frequencies(rope, dims, short).reshape(-1)
    out.word(len(frequencies))
    out.float(rope_scaling.magnitude(rope))
    out.floats(frequencies)


def _write_norm(out: Writer, norm: Norm | None, source: Weights, name: str) -> None:
    """The stored offset of a weight is added here, once for all."""
    if norm is None or f"{name}.weight" not in source:
        out.word(0)
        return
    out.word(_NORMS[norm.kind])
    out.float(norm.eps)
    out.floats(source.get(f"{name}.weight") + norm.offset)
    if norm.kind == "layer":
        out.floats(source.get(f"{name}.bias"))


def _write_bias(out: Writer, source: Weights, *names: str) -> None:
    has = all(name in source for name in names)
    out.word(int(has))
    for name in names if has else ():
        out.floats(source.get(name))


def _write_block(out: Writer, block: Block, ropes: list[Rope], source: Weights, name: str, int8: bool) -> None:
    for branch in ("mixer", "ffn"):
        for place in ("norm", "output_norm", "sum_norm"):
            _write_norm(out, block.norm, source, f"{name}.{branch}_{place}")
        if branch == "mixer":
            _write_attention(out, block.mixer, ropes, source, f"{name}.mixer", int8)
        else:
            _write_ffn(out, block.ffn, source, f"{name}.ffn", int8)


def _write_attention(out: Writer, spec: Attention, ropes: list[Rope], source: Weights, name: str, int8: bool) -> None:
    out.word(spec.n_heads, spec.n_kv_heads, spec.head_dim, spec.window or 0)
    out.word(0 if spec.rope is None else 1 + ropes.index(spec.rope))
    out.float(spec.head_dim**-0.5 if spec.scale is None else spec.scale, spec.softcap or 0.0)
    out.word(0 if spec.qk_norm is None else {"head": 1, "projection": 2}[spec.qk_norm_over])
    for which in ("q_norm", "k_norm"):
        _write_norm(out, spec.qk_norm, source, f"{name}.{which}")
    qkv = [f"{name}.{which}_proj" for which in "qkv"]
    out.matrix([source.get(f"{part}.weight") for part in qkv], int8)
    _write_bias(out, source, *(f"{part}.bias" for part in qkv))
    out.matrix([source.get(f"{name}.o_proj.weight")], int8)
    _write_bias(out, source, f"{name}.o_proj.bias")


def _write_ffn(out: Writer, spec: Mlp | GatedMlp | Moe | None, source: Weights, name: str, int8: bool) -> None:
    out.word({type(None): 0, Mlp: 1, GatedMlp: 2, Moe: 3}[type(spec)])
    if spec is None:
        return
    experts, expert = [name], spec
    if isinstance(spec, Moe):
        expert, experts = spec.expert, [f"{name}.experts.{i}" for i in range(spec.n_experts)]
        out.word(expert.d_ff, _ACTIVATIONS[expert.activation], spec.n_experts, spec.top_k, int(spec.normalize))
        out.matrix([source.get(f"{name}.router.weight")], False)
    else:
        out.word(spec.d_ff, _ACTIVATIONS[spec.activation], 1, 1, 0)
    ups = ("up_proj",) if isinstance(expert, Mlp) else ("gate_proj", "up_proj")
    for one in experts:
        out.matrix([source.get(f"{one}.{up}.weight") for up in ups], int8)
        _write_bias(out, source, *(f"{one}.{up}.bias" for up in ups))
        out.matrix([source.get(f"{one}.down_proj.weight")], int8)
        _write_bias(out, source, f"{one}.down_proj.bias")
