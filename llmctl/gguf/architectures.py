"""What llmctl's families are called in GGUF, which keys describe them there, and what llama.cpp cannot be told of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from gguf import PoolingType

from llmctl.errors import UserError
from llmctl.gguf.own_layouts import OWN
from llmctl.models import rope_scaling
from llmctl.models.config import Attention, GatedMlp, LearnedPositions, ModelConfig, Moe, Rope

NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "gpt2": "gpt2",
    "bert": "bert",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "t5": "t5",
}
"""Of GGUF, by our family."""

_BIASES = {"llama": "all", "mistral": "all", "mixtral": "attention", "gpt2": "all", "bert": "all", "qwen2": "qkv"}
"""Which biases an architecture of llama.cpp has; none where nothing is said."""
_PERIODS = {"gemma2": 2, "gemma3_text": 6}
"""Of those architectures whose last layer of so many has no window; others have no windows at all."""
_FACTORS = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "smollm3")
"""Those that read a factor for each frequency of their positions."""
_NO_ROPE_EVERY = 4
_GEMMA_LOCAL_THETA = 10000.0


def refuse(config: ModelConfig) -> None:
    """Raise UserError naming what of a model has no form in GGUF, as llama.cpp reads it."""
    if config.family not in NAMES:
        raise UserError(
            f"{config.family} has no GGUF form that llmctl writes", hint=f"these have: {', '.join(sorted(NAMES))}"
        )
    for reason in _obstacles(config):
        raise UserError(f"{config.family} cannot be exported to GGUF: {reason}", hint="llama.cpp computes it otherwise")


def in_file(config: ModelConfig) -> ModelConfig:
    """What of a model a file holds: encoders are there for their hidden states, without a head."""
    if config.kind != "masked":
        return config
    return replace(config, head=None, classifier=None, carried=(), tie_embeddings=False)


def _obstacles(config: ModelConfig) -> Iterator[str]:
    if config.family in OWN:
        yield from OWN[config.family].obstacles(config)
        return
    if config.kind == "causal" and (config.classifier is not None or config.head is None):
        yield "it has no head that predicts tokens"
        return
    if config.head is not None and (config.head.bias or config.head.scale != 1.0):
        yield "its head has a bias or a scale"
    for layer in range(config.n_layers):
        block = config.block(layer)
        yield from _attention_obstacles(config, block.mixer, layer)
        yield from _ffn_obstacles(config, block.ffn, layer)
    if config.family.startswith("gemma") and config.family != "gemma3_text" and not config.tie_embeddings:
        yield "its head is not its embedding"
    if config.family == "gemma2" and (config.head.softcap is None or config.blocks[0].mixer.softcap is None):
        yield "it has no soft caps"
    if config.family in _PERIODS and any(bool(window) != expected for window, expected in _windows(config)):
        yield f"its layers without a window are not every {_PERIODS[config.family]}th"


def _windows(config: ModelConfig) -> Iterator[tuple[int | None, bool]]:
    """Of each layer: its window, and whether llama.cpp takes it to have one."""
    period = _PERIODS[config.family]
    return ((config.block(i).mixer.window, (i + 1) % period != 0) for i in range(config.n_layers))


def _attention_obstacles(config: ModelConfig, mixer: Attention, layer: int) -> Iterator[str]:
    allowed = _BIASES.get(config.family)
    if (mixer.qkv_bias and allowed is None) or (mixer.out_bias and allowed in (None, "qkv")):
        yield f"layer {layer} has biases in its attention"
    if mixer.scale is not None and abs(mixer.scale - mixer.head_dim**-0.5) > 1e-6 * mixer.scale:
        yield f"layer {layer} scales its scores by {mixer.scale:.4g}, not by 1 / sqrt({mixer.head_dim})"
    if config.family == "smollm3" and (mixer.rope is None) != ((layer + 1) % _NO_ROPE_EVERY == 0):
        yield f"its layers without positions are not every {_NO_ROPE_EVERY}th"
    if mixer.rope is not None:
        yield from _rope_obstacles(config, mixer, layer)


def _rope_obstacles(config: ModelConfig, mixer: Attention, layer: int) -> Iterator[str]:
    scaling = mixer.rope.scaling or {}
    kind = scaling.get("rope_type")
    if kind == "llama3" and config.family not in _FACTORS:
        yield f"positions of the kind {kind}"
    if kind == "longrope" and config.family != "phi3":
        yield f"positions of the kind {kind}"
    tuned = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
    usual = {"beta_fast": 32, "beta_slow": 1}
    if kind == "yarn" and (
        any(scaling.get(key) not in (None, usual.get(key)) for key in tuned) or not scaling.get("truncate", True)
    ):
        yield "its YaRN positions have settings of their own"
    if config.family == "gemma3_text" and mixer.window and mixer.rope.theta != _GEMMA_LOCAL_THETA:
        yield f"layer {layer}'s local positions have the base {mixer.rope.theta:g}, not {_GEMMA_LOCAL_THETA:g}"
    if mixer.rope.dims is not None and config.family != "phi3":
        yield "only a part of each head turns"


def _ffn_obstacles(config: ModelConfig, ffn: Any, layer: int) -> Iterator[str]:
    expert = ffn.expert if isinstance(ffn, Moe) else ffn
    wanted = "gelu_tanh" if config.family.startswith("gemma") or config.family in ("gpt2", "bert") else "silu"
    # llama.cpp has one GELU, by tanh, for both kinds of BERT; the two differ by 0.0005 at most.
    if expert.activation != wanted and (config.family, expert.activation) != ("bert", "gelu"):
        yield f"layer {layer} has the activation {expert.activation}, not {wanted}"
    if isinstance(expert, GatedMlp) and expert.bias and _BIASES.get(config.family) != "all":
        yield f"layer {layer} has biases in its feed-forward part"
    if config.family == "qwen3_moe":
        if not isinstance(ffn, Moe):
            yield f"layer {layer} has no experts"
        elif not ffn.normalize:
            yield "the weights of its experts do not sum to one (norm_topk_prob)"


def context(config: ModelConfig) -> int:
    """Positions up to which llama.cpp computes the same: it has no windows in most families, nor angles that follow the length."""
    if config.family in OWN:
        return OWN[config.family].context(config)
    longest = config.max_positions
    for block in config.blocks:
        mixer = block.mixer
        if mixer.window and config.family not in _PERIODS:
            longest = min(longest, mixer.window)
        if mixer.rope and (mixer.rope.scaling or {}).get("rope_type") == "dynamic":
            longest = min(longest, mixer.rope.scaling["original_max_position_embeddings"])
    return longest


def far_rope(config: ModelConfig) -> Rope | None:
    """The rope of layers without a window, where there are such."""
    mixers = [mixer for i in range(config.n_layers) if isinstance(mixer := config.block(i).mixer, Attention)]
    found = [mixer.rope for mixer in sorted(mixers, key=lambda mixer: bool(mixer.window)) if mixer.rope]
    return found[0] if found else None


def metadata(config: ModelConfig) -> dict[str, Any]:
    """The architecture's keys, without its name in front of them."""
    if config.family in OWN:
        return OWN[config.family].metadata(config)
    block, rope = config.blocks[0], far_rope(config)
    mixer, ffn = block.mixer, block.ffn
    expert = ffn.expert if isinstance(ffn, Moe) else ffn
    norm = "attention.layer_norm_epsilon" if block.norm.kind == "layer" else "attention.layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": context(config),
        "embedding_length": config.d_model,
        "block_count": config.n_layers,
        "feed_forward_length": expert.d_ff,
        "attention.head_count": mixer.n_heads,
        "attention.head_count_kv": mixer.n_kv_heads,
        norm: float(block.norm.eps),
    }
    if not isinstance(config.positions, LearnedPositions):
        keys |= {"attention.key_length": mixer.head_dim, "attention.value_length": mixer.head_dim}
    if config.kind == "masked":
        keys |= {"attention.causal": False, "pooling_type": int(PoolingType.MEAN)}
    if isinstance(ffn, Moe):
        keys |= {"expert_count": ffn.n_experts, "expert_used_count": ffn.top_k}
        keys["expert_feed_forward_length"] = expert.d_ff
    if config.family in _PERIODS:
        keys["attention.sliding_window"] = max(config.block(i).mixer.window or 0 for i in range(config.n_layers))
        keys["attention.sliding_window"] = keys["attention.sliding_window"] or config.max_positions
    elif config.family == "phi3":
        keys["attention.sliding_window"] = mixer.window or 0
    if mixer.softcap:
        keys["attn_logit_softcapping"] = float(mixer.softcap)
    if config.head is not None and config.head.softcap:
        keys["final_logit_softcapping"] = float(config.head.softcap)
    return keys | (_rope_keys(rope, mixer) if rope else {})


def _rope_keys(rope: Rope, mixer: Attention) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.dims or mixer.head_dim}
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if kind == "longrope":
        keys |= {"rope.scaling.type": kind, "rope.scaling.attn_factor": float(rope_scaling.magnitude(rope))}
    return keys


def factors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors by which the frequencies of positions are divided, float32 [pairs], by their names in the file."""
    rope = far_rope(config)
    scaling = (rope and rope.scaling) or {}
    dims = rope and (rope.dims or config.blocks[0].mixer.head_dim)
    if scaling.get("rope_type") == "llama3":
        plain = rope_scaling.frequencies(Rope(rope.theta), dims)
        return {"rope_freqs.weight": plain / rope_scaling.frequencies(rope, dims)}
    if scaling.get("rope_type") == "longrope":
        return {f"rope_factors_{which}.weight": torch.tensor(scaling[f"{which}_factor"]) for which in ("long", "short")}
    return {}
