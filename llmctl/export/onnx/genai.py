"""genai_config.json, with which onnxruntime-genai runs the directory as it is."""

from __future__ import annotations

import json
from typing import Any

from llmctl.export.onnx.attention import groups_queries
from llmctl.export.onnx.causal import KINDS, needs_positions
from llmctl.generation.settings import Marks
from llmctl.models import config
from llmctl.tokenizer import Tokenizer

_TYPES = {"mixtral": "mistral", "qwen3_moe": "qwen3", "olmo2": "olmo", "gpt2": "llama"}
"""onnxruntime-genai's name for decoders that run as these do. (Its own gpt2 has keys and values in one tensor.)"""
_PIECES = ("BPE", "Unigram")


def unreadable(tokenizer: Tokenizer) -> str | None:
    """Which part of a tokenizer onnxruntime-genai does not have; None where it has all."""
    content = json.loads(tokenizer.json)
    kind = content["model"].get("type")
    if kind not in _PIECES:
        return f"its model is {kind}; onnxruntime-genai has {' and '.join(_PIECES)}"
    if kind == "BPE" and content["model"].get("ignore_merges") and content["model"].get("byte_fallback"):
        return "its BPE has both ignore_merges and byte_fallback"
    return None


def genai_config(
    spec: config.ModelConfig, tokenizer: Tokenizer, marks: Marks, fuse: bool, recommended: dict[str, Any]
) -> dict[str, Any]:
    """`recommended` are the checkpoint's own settings of a draw (generation_config.json)."""
    mixer, context = spec.block(0).mixer, spec.max_positions
    groups = fuse and groups_queries(spec)
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if needs_positions(spec, groups):
        inputs["position_ids"] = "position_ids"
    ends = sorted(token for token in marks.ends if token < spec.vocab_size) or [
        tokenizer.eos_id if tokenizer.eos_id is not None else spec.vocab_size - 1
    ]
    first = next(token for token in (tokenizer.bos_id, tokenizer.eos_id, ends[0]) if token is not None)
    padding = tokenizer.pad_id if tokenizer.pad_id is not None else ends[0]
    return {
        "model": {
            "type": _TYPES.get(spec.family, spec.family),
            "bos_token_id": first,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": padding,
            "vocab_size": spec.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": spec.d_model,
                "head_size": mixer.head_dim,
                "num_attention_heads": mixer.n_heads,
                "num_key_value_heads": mixer.n_kv_heads,
                "num_hidden_layers": spec.n_layers,
                "inputs": inputs | {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in KINDS},
                "outputs": {"logits": "logits"} | {f"present_{kind}_names": f"present.%d.{kind}" for kind in KINDS},
            },
        },
        "search": {
            "max_length": context,
            "past_present_share_buffer": groups,
            **{key: recommended[key] for key in _SEARCH if recommended.get(key) is not None},
        },
    }


_SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty")
