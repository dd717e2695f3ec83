"""An encoder-decoder language model: one stack reads a source, another writes a target and looks back at the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from llmctl.errors import UserError
from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM
from llmctl.models.config import ModelConfig
from llmctl.models.context import Context, padding_of
from llmctl.models.memory import Memory
from llmctl.models.transformer import Stack


class Seq2SeqLM(CausalLM):
    """A decoder whose every layer attends to an encoder's output; both share the token embedding."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.encoder = Stack(dataclasses.replace(config.encoder, dropout=config.dropout))

    def stacks(self) -> tuple[Stack, ...]:
        return (self.encoder, self)

    def forward(
        self,
        source_ids_BS: torch.Tensor,
        source_mask_BS: torch.Tensor | None = None,
        *,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        source_documents_BS: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The decoder's logits [B, T, V] at the inputs `input_ids_BT`; the other arguments are those of `encode`, `hidden`."""
        memory = self.encode(source_ids_BS, source_mask_BS, documents_BS=source_documents_BS)
        return self.logits(self.hidden(input_ids_BT, attention_mask_BT, documents_BT=documents_BT, memory=memory))

    def encode(
        self,
        source_ids_BS: torch.Tensor,
        source_mask_BS: torch.Tensor | None = None,
        *,
        documents_BS: torch.Tensor | None = None,
        keep: bool = False,
        recorded_weights: list[torch.Tensor] | None = None,
        recorded_hidden: list[torch.Tensor] | None = None,
    ) -> Memory:
        """What the decoder attends to. `source_mask_BS` is 1 at real tokens and 0 at padding at the ends.

        `documents_BS` numbers the documents packed into a row: the decoder's document n sees the encoder's document n.
        `keep` is for decoding step by step (see `Memory`).
        """
        starts_B, ends_B = padding_of(source_mask_BS)
        context = Context(
            source_ids_BS.shape[1],
            source_ids_BS.device,
            starts_B=starts_B,
            ends_B=ends_B,
            documents_BT=documents_BS,
        )
        context.recorded_weights, context.recorded_hidden = recorded_weights, recorded_hidden
        hidden_BSD = self.encoder.run(self.embed(source_ids_BS), context)
        whole = self.encoder.whole(context)
        return Memory(hidden_BSD, whole.starts_B, whole.ends_B, whole.documents_BT, keep)

    def continued(self, prompt_ids: Sequence[int], start_id: int | None) -> list[int]:
        """The encoder reads the prompt; the decoder begins with `start_id`."""
        if start_id is None:
            raise UserError(
                "the checkpoint does not say with which token its decoder begins",
                hint='give "decoder_start_token_id" in its generation_config.json',
            )
        return [start_id]

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Cache, torch.Tensor]:
        cache, inputs_BT = super().begin(prompts, continued, max_new_tokens)
        length = max(map(len, prompts))
        padded = [[*prompt, *[0] * (length - len(prompt))] for prompt in prompts]
        mask = [[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
        source_BS, mask_BS = (torch.tensor(rows, device=inputs_BT.device) for rows in (padded, mask))
        cache.memory = self.encode(source_BS, mask_BS, keep=True)
        return cache, inputs_BT
