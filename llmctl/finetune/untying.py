"""A head that is the embedding becomes a matrix of its own."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from llmctl.models.language_model import LanguageModel
from llmctl.models.linear import Linear


def untie(model: LanguageModel) -> None:
    """Give the model a head with the values that its embedding has now, in its place."""
    config = model.config
    model.lm_head = Linear(config.d_model, config.vocab_size, bias=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.detach().clone(), requires_grad=False)
    model.config = replace(config, tie_embeddings=False)
