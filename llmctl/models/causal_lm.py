"""A decoder-only language model: one stack between an embedding and a head."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models.cache import Cache
from llmctl.models.config import ModelConfig
from llmctl.models.context import Context, padding_of
from llmctl.models.head import HeadTransform, logits
from llmctl.models.transformer import Stack, embedding


class CausalLM(Stack):
    """Token ids to logits over the vocabulary."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.embed_tokens = embedding(config.vocab_size, config.d_model)
        self.head_transform = HeadTransform(config.head.transform, config.d_model) if config.head.transform else None
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head_bias = nn.Parameter(torch.empty(config.vocab_size)) if config.head.bias else None

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D], whether or not it is the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]; the arguments are those of `hidden`."""
        hidden_BTD = self.hidden(
            input_ids_BT, attention_mask_BT, types_BT=types_BT, documents_BT=documents_BT, cache=cache
        )
        return self.logits(hidden_BTD)

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        recorded_weights: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last layer's output after the final norm, [B, T, D].

        `attention_mask_BT` is 1 at real tokens and 0 at padding at the ends. `documents_BT` (int, non-decreasing along T)
        numbers the documents packed into a row: tokens attend within their own only and positions restart with each. With a
        `cache` the T tokens continue what it holds. `types_BT` are the segment numbers of models that have such.
        `recorded_weights`, a list, gets every layer's attention weights [B, H, T, S].
        """
        starts_B, ends_B = padding_of(attention_mask_BT)
        if cache is not None:
            starts_B = cache.starts_B
        context = Context(
            input_ids_BT.shape[1],
            input_ids_BT.device,
            starts_B=starts_B,
            ends_B=ends_B,
            documents_BT=documents_BT,
            cache=cache,
        )
        context.recorded_weights = recorded_weights
        return self.run(self.embed(input_ids_BT), context, types_BT)

    def embed(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Token embeddings, scaled where the model scales them (in its own dtype, as Gemma does)."""
        x_BTD = self.embed_tokens(input_ids_BT)
        scale = self.config.embedding_scale
        return x_BTD if scale == 1.0 else x_BTD * torch.tensor(scale, dtype=x_BTD.dtype)

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V] of hidden states."""
        return logits(self.config.head, self.head_input(hidden_BTD), self.head_weight, self.head_bias)

    def head_input(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What meets the vocabulary matrix: the hidden states, transformed and scaled as the head says."""
        if self.head_transform is not None:
            hidden_BTD = self.head_transform(hidden_BTD)
        return hidden_BTD if self.config.head.scale == 1.0 else hidden_BTD * self.config.head.scale
