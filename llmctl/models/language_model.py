"""What every language model has around its stack: token embeddings in front, a head over the vocabulary behind."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.models.config import ModelConfig
from llmctl.models.head import HeadTransform, logits, softcapped
from llmctl.models.linear import Linear
from llmctl.models.quantized_linear import QuantizedLinear
from llmctl.models.transformer import Stack, embedding
from llmctl.tensor_file import LazyTensor


class LanguageModel(Stack):
    """A stack with its embedding and, unless the config's head is None, its head: a Linear of its own or the embedding.

    A classifier's head is its own (see `sequence_classifier`).
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.quantized_tensors: dict[str, LazyTensor] = {}
        """Of a quantized checkpoint, what holds its matrices in the file."""
        self.embed_tokens = embedding(config.vocab_size, config.d_model)
        self.head_transform = self.lm_head = self.head_bias = None
        head = config.head
        if not config.predicts_tokens:
            return
        if head.transform:
            self.head_transform = HeadTransform(head.transform, config.d_model)
        if not config.tie_embeddings:
            self.lm_head = Linear(config.d_model, config.vocab_size, bias=head.bias is True)
        elif head.bias is True:
            self.head_bias = nn.Parameter(torch.empty(config.vocab_size))
        if head.bias == "fixed":
            self.register_buffer("logits_bias", torch.empty(config.vocab_size))

    def stacks(self) -> tuple[Stack, ...]:
        """All stacks of the model, of whose `layers` each may be sharded and compiled by itself."""
        return (self,)

    @property
    def device(self) -> torch.device:
        """Where inputs are to be."""
        return self.embed_tokens.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """[V, D], whether or not it is the embedding."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def output_bias(self) -> torch.Tensor | None:
        """[V], added to the logits."""
        if self.config.head.bias == "fixed":
            return self.logits_bias.to(self.embed_tokens.weight.dtype)
        return self.head_bias if self.lm_head is None else self.lm_head.bias

    def reset_buffers(self) -> None:
        """A checkpoint without a fixed bias has none to add."""
        if self.config.predicts_tokens and self.config.head.bias == "fixed":
            self.logits_bias = torch.zeros(self.config.vocab_size)

    def embed(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        """Token embeddings, scaled where the model scales them (in its own dtype, as Gemma does)."""
        x_BTD = self.embed_tokens(input_ids_BT)
        scale = self.config.embedding_scale
        # a number of the host is an argument of the product wherever that is taken
        return x_BTD if scale == 1.0 else x_BTD * torch.tensor(scale, dtype=x_BTD.dtype, device="cpu")

    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, V] of hidden states. Raises UserError where the checkpoint came without a head."""
        x_BTD = self.head_input(hidden_BTD)
        if isinstance(self.lm_head, QuantizedLinear):  # its matrix is not unpacked
            return softcapped(self.config.head, self.lm_head(x_BTD))
        return logits(self.config.head, x_BTD, self.head_weight, self.output_bias)

    def head_input(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """What meets the vocabulary matrix: the hidden states, transformed and scaled as the head says."""
        if self.config.classifier is not None:
            raise UserError(
                "this checkpoint is a classifier: it gives a number for each label, and predicts no tokens",
                hint="llmctl classify works with it",
            )
        if self.config.head is None:
            raise UserError(
                "this checkpoint is a base model: it holds no language-model head, so it predicts no tokens",
                hint="llmctl embed works with it",
            )
        if self.head_transform is not None:
            hidden_BTD = self.head_transform(hidden_BTD)
        return hidden_BTD if self.config.head.scale == 1.0 else hidden_BTD * self.config.head.scale
