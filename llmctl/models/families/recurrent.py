"""Our own LSTM and GRU language models: x + cell(norm(x)) in every layer; no other library loads them.

config.json has vocab_size, d_model, n_layers, norm_eps (RMSNorm's), dropout, tie_word_embeddings and initializer_range. The
weights are `embed_tokens.weight`, `layers.N.norm.weight`, `layers.N.rnn.*` with the names of a one-layer torch.nn.LSTM or
torch.nn.GRU (so that one loads them), `norm.weight`, and `lm_head.weight` where it is not the embedding.
"""

from __future__ import annotations

from llmctl.models.config import Block, ModelConfig, Norm
from llmctl.models.config_recurrent import Recurrent
from llmctl.models.families.common import SCORE, row

MODEL_TYPES = ("lstm", "gru")


def config_from_hf(hf: dict) -> ModelConfig:
    norm = Norm("rms", hf.get("norm_eps", 1e-5))
    return ModelConfig(
        family=hf["model_type"],
        vocab_size=hf["vocab_size"],
        d_model=hf["d_model"],
        n_layers=hf["n_layers"],
        max_positions=None,
        blocks=(Block(Recurrent(hf["model_type"], hf["d_model"]), None, norm),),
        final_norm=norm,
        tie_embeddings=hf.get("tie_word_embeddings", True),
        dropout=hf.get("dropout", 0.0),
        initializer_range=hf.get("initializer_range", 0.02),
        hf=hf,
    )


def config_to_hf(config: ModelConfig) -> dict:
    return {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "norm_eps": config.final_norm.eps,
        "dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
    }


def usual_shape(model_type: str, width: int, depth: int, context: int) -> dict:
    """Half as many layers as a transformer has: each step is sequential, and two thirds as heavy as one of its layers."""
    return {"d_model": width, "n_layers": depth // 2}


WEIGHTS = (
    row("embed_tokens.weight", "embed_tokens.weight"),
    row("layers.{}.norm.weight", "layers.{}.mixer_norm.weight"),
    *(
        row(f"layers.{{}}.rnn.{name}_l0", f"layers.{{}}.mixer.{name}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ),
    row("norm.weight", "norm.weight"),
    row("lm_head.weight", "lm_head.weight"),
    SCORE,
)
IGNORABLE = ()
