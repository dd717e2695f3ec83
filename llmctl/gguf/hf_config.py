"""The config.json that the keys of a GGUF file stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmctl.errors import UserError
from llmctl.gguf.own_layouts import OWN

_FAMILIES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "smollm3": "smollm3",
    "gpt2": "gpt2",
    "bert": "bert",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "t5": "t5",
}
_PERIODS = {"gemma2": 2, "gemma3_text": 6}


def of_keys(fields: dict[str, Any], tensors: set[str], read: Callable[[str], torch.Tensor]) -> dict[str, Any]:
    """`fields` are the file's keys, `tensors` its tensors' names, `read` gives one. Raises UserError, or KeyError for a key
    that is not there."""
    architecture = fields["general.architecture"]
    if architecture not in _FAMILIES:
        raise UserError(
            f"the architecture {architecture!r} is not one that llmctl reads from GGUF",
            hint=f"it reads {', '.join(sorted(_FAMILIES))}",
        )
    keys = {name.removeprefix(f"{architecture}."): value for name, value in fields.items()}
    family = _FAMILIES[architecture]
    if architecture == "llama" and keys.get("expert_count"):
        family = "mixtral"
    common = {
        "model_type": family,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]) if "vocab_size" not in keys else keys["vocab_size"],
        "tie_word_embeddings": "output.weight" not in tensors,
        **_ids(fields),
    }
    if family == "bert":
        types = len(read("token_types.weight")) if "token_types.weight" in tensors else 0
        return {**common, **_bert(keys), "type_vocab_size": types, "tie_word_embeddings": True}
    if family in OWN:
        return common | OWN[family].of_keys(family, keys, tensors)
    return common | (_gpt2(keys) if family == "gpt2" else _llama_like(family, keys, tensors, read))


def _ids(fields: dict[str, Any]) -> dict[str, int]:
    found = {role: fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    ends = [fields.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(each for each in ends if each is not None))
    ids = {f"{role}_token_id": value for role, value in found.items() if value is not None}
    return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})


def _gpt2(keys: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_embd": keys["embedding_length"],
        "n_layer": keys["block_count"],
        "n_head": keys["attention.head_count"],
        "n_positions": keys["context_length"],
        "n_inner": keys["feed_forward_length"],
        "layer_norm_epsilon": keys["attention.layer_norm_epsilon"],
    }


def _bert(keys: dict[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": keys["embedding_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": keys["attention.head_count"],
        "intermediate_size": keys["feed_forward_length"],
        "max_position_embeddings": keys["context_length"],
        "layer_norm_eps": keys["attention.layer_norm_epsilon"],
        "hidden_act": "gelu",
    }


def _llama_like(family: str, keys: dict[str, Any], tensors: set[str], read) -> dict[str, Any]:
    heads, width = keys["attention.head_count"], keys["embedding_length"]
    if isinstance(heads, list) or isinstance(keys["feed_forward_length"], list):
        raise UserError("layers of different widths are not read from GGUF")
    head_dim = keys.get("attention.key_length") or keys.get("rope.dimension_count") or width // heads
    hf = {
        "hidden_size": width,
        "intermediate_size": keys["feed_forward_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(keys, tensors, read),
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "sliding_window": keys.get("attention.sliding_window") or None,
    }
    if keys.get("rope.dimension_count", head_dim) != head_dim:
        hf["partial_rotary_factor"] = keys["rope.dimension_count"] / head_dim
    if family == "phi3":
        hf["original_max_position_embeddings"] = keys.get(
            "rope.scaling.original_context_length", keys["context_length"]
        )
    return hf | _experts(family, keys) | _gemma(family, keys, head_dim)


def _experts(family: str, keys: dict[str, Any]) -> dict[str, Any]:
    if not keys.get("expert_count"):
        return {}
    count = {"num_local_experts": keys["expert_count"], "num_experts_per_tok": keys["expert_used_count"]}
    if family == "mixtral":
        return count
    width = keys.get("expert_feed_forward_length") or keys["feed_forward_length"]
    return {**count, "num_experts": keys["expert_count"], "norm_topk_prob": True, "moe_intermediate_size": width}


def _gemma(family: str, keys: dict[str, Any], head_dim: int) -> dict[str, Any]:
    if family not in _PERIODS:
        return {}
    return {
        "query_pre_attn_scalar": head_dim,
        "sliding_window_pattern": _PERIODS[family],
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
        "final_logit_softcapping": keys.get("final_logit_softcapping", 30.0 if family == "gemma2" else None),
    }


def _rope_scaling(keys: dict[str, Any], tensors: set[str], read) -> dict[str, Any] | None:
    kind, factor = keys.get("rope.scaling.type"), keys.get("rope.scaling.factor")
    original = keys.get("rope.scaling.original_context_length")
    if "rope_freqs.weight" in tensors:
        # Only the factors themselves are in the file: the rule that takes such has one set for short texts, one for long.
        found = read("rope_freqs.weight").tolist()
        both = {"short_factor": found, "long_factor": found}
        return {"rope_type": "longrope", **both, "factor": 1.0, "attention_factor": 1.0}
    if "rope_factors_short.weight" in tensors:
        both = {f"{which}_factor": read(f"rope_factors_{which}.weight").tolist() for which in ("short", "long")}
        size = keys.get("rope.scaling.attn_factor")
        return {"rope_type": "longrope", **both, **({} if size is None else {"attention_factor": size})}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return None
