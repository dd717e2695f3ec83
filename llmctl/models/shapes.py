"""Shapes for a number of parameters or a preset's name, as Hugging Face configs. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from llmctl.models import families
from llmctl.models.config import ModelConfig, parameter_count

PRESETS = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "llama-160m": {
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "tinyllama": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}


def preset(name: str, vocab_size: int, max_positions: int) -> ModelConfig:
    context = {"n_positions" if name.startswith("gpt2") else "max_position_embeddings": max_positions}
    return _config({**PRESETS[name], **context, "vocab_size": vocab_size})


def for_parameters(
    family: str, n_parameters: int, vocab_size: int, max_positions: int, token_ids: Mapping[str, int] | None = None
) -> ModelConfig:
    """The shape whose parameter count, embeddings included, comes nearest to `n_parameters`.

    `token_ids` are keys of a config.json that name special tokens: some families are built with them.
    """
    widths = [*range(32, 512, 32), *range(512, 2048, 64), *range(2048, 8193, 128)]

    def nearest(depths: Iterable[int]) -> ModelConfig:
        shapes = (_hf_shape(family, width, more, max_positions) for width in widths for more in depths)
        candidates = (_config({**shape, "vocab_size": vocab_size, **(token_ids or {})}) for shape in shapes)
        best = min(candidates, key=lambda config: abs(parameter_count(config) - n_parameters))
        # a table of positions may begin with rows that no position uses
        return replace(best, max_positions=max_positions) if best.positions else best

    usual = nearest([0])
    if abs(parameter_count(usual) - n_parameters) <= 0.1 * n_parameters:
        return usual
    return nearest(range(4))  # narrow models are few and far between


def _hf_shape(family: str, width: int, more_layers: int, max_positions: int) -> dict:
    # Depth grows with width as in GPT-2 and Llama: 12 layers at 768, 24 at 2048, and never fewer than 4.
    depth = max(4, round(width / 64)) if width <= 1024 else 16 + round((width - 1024) / 128)
    shape = families.find(family).usual_shape(family, width, depth + more_layers, max_positions)
    return {"model_type": family, **shape}


def _config(hf: dict) -> ModelConfig:
    return families.find(hf["model_type"]).config_from_hf(hf)
