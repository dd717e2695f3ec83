"""An encoder-only language model: every token sees those on both sides of it, and gaps are filled."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llmctl.models.context import Context, padding_of
from llmctl.models.language_model import LanguageModel
from llmctl.ops.local_attention import GlobalTokens


class MaskedLM(LanguageModel):
    """Token ids to logits over what stands, or should stand, at each of them."""

    def forward(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        global_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V]; the arguments are those of `hidden`."""
        hidden_BTD = self.hidden(
            input_ids_BT, attention_mask_BT, types_BT=types_BT, documents_BT=documents_BT, global_BT=global_BT
        )
        return self.logits(hidden_BTD)

    def logits_at(
        self, where_BT: torch.Tensor, input_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor
    ) -> torch.Tensor:
        """[N, V] at the tokens where `where_BT` is true, and nowhere else."""
        return self.logits(self.hidden(input_ids_BT, attention_mask_BT)[where_BT])

    def hidden(
        self,
        input_ids_BT: torch.Tensor,
        attention_mask_BT: torch.Tensor | None = None,
        *,
        types_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        global_BT: torch.Tensor | None = None,
        recorded_weights: list[torch.Tensor] | None = None,
        recorded_hidden: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The last layer's output after the final norm, [B, T, D].

        `attention_mask_BT` is 1 at real tokens and 0 at padding at the ends; padding on either side changes nothing.
        `documents_BT` (int, non-decreasing along T) numbers the documents packed into a row. `types_BT` are segment
        numbers. `global_BT` is true at the tokens that see all and are seen by all where attention is otherwise local.
        """
        starts_B, ends_B = padding_of(attention_mask_BT)
        context = Context(
            input_ids_BT.shape[1], input_ids_BT.device, starts_B=starts_B, ends_B=ends_B, documents_BT=documents_BT
        )
        if global_BT is not None and global_BT.any():
            context.global_tokens = GlobalTokens(global_BT)
        context.recorded_weights, context.recorded_hidden = recorded_weights, recorded_hidden
        x_BTD = self.embed(input_ids_BT)
        if self.config.token_dropout is not None:
            x_BTD = self._without_masks(x_BTD, input_ids_BT == self.config.token_dropout.mask_id, context)
        return self.run(x_BTD, context, types_BT)[:, self.n_virtual :]

    def _without_masks(self, x_BTD: torch.Tensor, masked_BT: torch.Tensor, context: Context) -> torch.Tensor:
        """Embeddings with the masked ones zero and the others scaled as if as many were masked as in training."""
        seen = context.visibility(causal=False)
        before_BT = F.pad(masked_BT.cumsum(1), (1, 0))
        first_BT = torch.zeros_like(masked_BT, dtype=torch.long) if seen.first_BT is None else seen.first_BT
        end_BT = torch.full_like(first_BT, context.length) if seen.end_BT is None else seen.end_BT
        first_BT, end_BT = first_BT.expand_as(masked_BT), end_BT.expand_as(masked_BT)
        length_BT = end_BT - first_BT
        n_left_BT = length_BT - before_BT.gather(1, end_BT) + before_BT.gather(1, first_BT)
        share_BT = n_left_BT.clamp(min=1) / length_BT
        factor_BT = (1 - self.config.token_dropout.trained_share) / share_BT
        return (x_BTD * factor_BT.unsqueeze(-1)).masked_fill(masked_BT.unsqueeze(-1), 0.0).to(x_BTD.dtype)
