"""What `llmctl pretrain` can be told beside the settings of every run. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmctl.data.corruption_settings import CorruptionSettings
from llmctl.data.masking_settings import MaskingSettings
from llmctl.train.settings import OPTIMIZER, SPEED, RunSettings, flag

SHAPE = "Model shape"


@dataclass(frozen=True)
class ShapeSettings:
    params: int | None = flag(
        None,
        "About how many parameters, embeddings included; by default as many as the corpus can teach.",
        SHAPE,
        type="count",
        metavar="10M",
    )
    preset: str | None = flag(None, "A known shape.", SHAPE, type=("gpt2", "gpt2-medium", "tinyllama", "llama-160m"))
    model_config: str | None = flag(None, "Take the shape from a Hugging Face config.json.", SHAPE, type="path")
    init_from: str | None = flag(None, "Go on training this checkpoint's weights.", SHAPE, type="path")
    family: Literal[
        "llama", "gpt2", "mamba", "mamba2", "lstm", "gru", "bert", "roberta", "esm", "longformer", "t5", "bart"
    ] = flag("llama", "Kind of model for --params.", SHAPE)
    seq_len: int | None = flag(
        None, "Tokens per sequence; by default 256, or the model's context when that is shorter.", SHAPE, at_least=2
    )


@dataclass(frozen=True)
class PretrainSettings(RunSettings, CorruptionSettings, MaskingSettings, ShapeSettings):
    objective: Literal["auto", "causal", "mlm", "seq2seq"] = flag(
        "auto",
        "causal predicts each token from those before it, mlm hidden tokens from all others, seq2seq restores spoilt "
        "texts; auto is what the model was made for.",
        SHAPE,
    )
    isolate_documents: bool = flag(True, "Tokens attend to their own document only when several share a row.", SPEED)
    learning_rate: float | None = flag(
        None,
        "Peak rate; by default 0.02 (muon) or 0.003 (adamw) at width 128, less for wider models and deep post-norm ones.",
        OPTIMIZER,
        flags=["--lr"],
        above=0,
    )
    embedding_learning_rate: float | None = flag(
        None,
        "Peak rate of embeddings and head; by default --learning-rate, or half of muon's own default.",
        OPTIMIZER,
        above=0,
    )
