"""What the families that descend from Llama share: the keys of their configs and the names of their weights.

A family says what it does otherwise: each function takes changes, and DEFAULTS are the values of keys that its
configs may leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmctl.models.config import Attention, Block, GatedMlp, ModelConfig, Norm
from llmctl.models.families.common import ACTIVATIONS, HF_ACTIVATIONS, SCORE, Row, row, shortest
from llmctl.models.families.rope import context_from_hf, context_to_hf, rope_from_hf, rope_to_hf

IGNORABLE = (r"rotary_emb\.inv_freq$",)
_FULL, _SLIDING = "full_attention", "sliding_attention"


def norm(hf: dict, **changes: Any) -> Norm:
    return Norm("rms", hf.get("rms_norm_eps", 1e-6), **changes)


def attention(hf: dict, **changes: Any) -> Attention:
    n_heads = hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // n_heads
    bias = hf.get("attention_bias", False)
    usual = {
        "n_kv_heads": hf.get("num_key_value_heads") or n_heads,
        "head_dim": head_dim,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    if "rope" not in changes:
        usual["rope"] = rope_from_hf(hf, head_dim)
    return Attention(n_heads, **{**usual, **changes})


def gated_mlp(hf: dict, **changes: Any) -> GatedMlp:
    usual = {
        "d_ff": hf["intermediate_size"],
        "activation": ACTIVATIONS[hf.get("hidden_act", "silu")],
        "bias": hf.get("mlp_bias", False),
    }
    return GatedMlp(**{**usual, **changes})


def model(family: str, hf: dict, blocks: Sequence[Block], **changes: Any) -> ModelConfig:
    """`blocks`: one for each layer, or those that are repeated."""
    rope = next((block.mixer.rope for block in blocks if block.mixer.rope), None)
    usual = {
        "max_positions": context_from_hf(hf, rope),
        "final_norm": blocks[0].norm,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "initializer_range": hf.get("initializer_range", 0.02),
    }
    return ModelConfig(
        family=family,
        vocab_size=hf["vocab_size"],
        d_model=hf["hidden_size"],
        n_layers=hf["num_hidden_layers"],
        blocks=shortest(blocks),
        hf=hf,
        **{**usual, **changes},
    )


def to_hf(config: ModelConfig, architecture: str, **more: Any) -> dict:
    """config.json; `more` are the family's own keys."""
    mixers = [config.block(i).mixer for i in range(config.n_layers)]
    ffn = config.blocks[0].ffn
    ffn = getattr(ffn, "expert", ffn)
    rope = next((mixer.rope for mixer in mixers if mixer.rope), None)
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": ffn.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": mixers[0].n_heads,
        "num_key_value_heads": mixers[0].n_kv_heads,
        "head_dim": mixers[0].head_dim,
        "hidden_act": HF_ACTIVATIONS[ffn.activation],
        "max_position_embeddings": context_to_hf(config.max_positions, rope),
        "rms_norm_eps": config.final_norm.eps,
        "attention_bias": mixers[0].out_bias,
        "mlp_bias": ffn.bias,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        **(rope_to_hf(rope, mixers[0].head_dim) if rope else {}),
        **more,
    }


def windows(hf: dict, layer_types: Sequence[str] | None = None) -> list[int | None]:
    """Of each layer, as `layer_types` say; those of the config come before the argument's."""
    size = {_FULL: None, _SLIDING: hf.get("sliding_window")}
    return [size[kind] for kind in hf.get("layer_types") or layer_types]


def windows_to_hf(config: ModelConfig) -> dict:
    """`sliding_window` and, for each layer, whether it has it."""
    sizes = [config.block(i).mixer.window for i in range(config.n_layers)]
    return {
        "sliding_window": next((size for size in sizes if size), None),
        "layer_types": [_SLIDING if size else _FULL for size in sizes],
    }


def every(period: int, n_layers: int) -> list[str]:
    """Layer types of which each `period`-th has no window."""
    return [_SLIDING if (i + 1) % period else _FULL for i in range(n_layers)]


_PRE_NORMS = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "ffn_norm"}
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_FFN = tuple(
    row(f"model.layers.{{}}.mlp.{name}.{kind}", f"layers.{{}}.ffn.{name}.{kind}")
    for name in (*_GATE_UP, "down_proj")
    for kind in ("weight", "bias")
)


def weights(norms: dict[str, str] = _PRE_NORMS, ffn: tuple[Row, ...] = _FFN, fused: bool = False) -> tuple[Row, ...]:
    """The table of a family; `norms` map their names within a layer to ours, `fused` joins q, k, v in one matrix."""
    mixer, theirs = "layers.{}.mixer", "model.layers.{}.self_attn"
    separate = ("o_proj",) if fused else (*_QKV, "o_proj")
    qkv = row(f"{theirs}.qkv_proj.weight", *(f"{mixer}.{name}.weight" for name in _QKV), change="split_rows")
    return (
        row("model.embed_tokens.weight", "embed_tokens.weight"),
        *((qkv,) if fused else ()),
        *(row(f"{theirs}.{name}.{kind}", f"{mixer}.{name}.{kind}") for name in separate for kind in ("weight", "bias")),
        *(row(f"{theirs}.{name}.weight", f"{mixer}.{name}.weight") for name in ("q_norm", "k_norm")),
        *ffn,
        *(row(f"model.layers.{{}}.{name}.weight", f"layers.{{}}.{ours}.weight") for name, ours in norms.items()),
        row("model.norm.weight", "norm.weight"),
        row("lm_head.weight", "lm_head.weight"),
        SCORE,
    )


def expert_weights(router: str, expert: str, names: Sequence[str]) -> tuple[Row, ...]:
    """Rows of a mixture of experts; `names` are those of gate, up and down within `model.layers.{}.{expert}`."""
    ours = ("gate_proj", "up_proj", "down_proj")
    return (
        row(f"model.layers.{{}}.{router}.weight", "layers.{}.ffn.router.weight"),
        *(
            row(f"model.layers.{{}}.{expert}.{{}}.{name}.weight", f"layers.{{}}.ffn.experts.{{}}.{our}.weight")
            for name, our in zip(names, ours)
        ),
    )
