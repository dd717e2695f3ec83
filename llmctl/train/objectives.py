"""What training minimizes, each a module around the model, so that sharding gathers head and embedding around it.

In training mode an objective gives the sum over a batch's targets, in eval mode the loss of each, without gradient; the
trainer divides by the number of targets. One that has `metrics(rows_KN) -> {name: number}` gives in eval mode K more rows
beside the losses, which it gets back of the whole validation; `measure` names a loss that is not in nats. `model` is the
language model whose blocks are sharded and compiled one by one.
"""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models.language_model import LanguageModel
from llmctl.train.loss import cross_entropy, token_losses


class NextToken(nn.Module):
    """The next-token loss of a batch."""

    def __init__(self, model: LanguageModel, z_loss: float):
        super().__init__()
        self.model, self.z_loss = model, z_loss

    def forward(self, *batch: torch.Tensor | None) -> torch.Tensor:
        """Sum of nats over all targets in training mode; nats of each of the N, without gradient, in eval mode."""
        return self.loss(*self.features(*batch))

    def features(self, inputs_BT, targets_BT, documents_BT=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The stack's output [N, D] where something is predicted, and the targets [N]; negative ones count nothing."""
        return self.model.hidden(inputs_BT, documents_BT=documents_BT).flatten(0, 1), targets_BT.flatten()

    def loss(self, hidden_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        model = self.model
        hidden_ND = model.head_input(hidden_ND)
        head = {"bias_V": model.output_bias, "softcap": model.config.head.softcap}
        if self.training:
            return cross_entropy(hidden_ND, model.head_weight, targets_N, self.z_loss, **head)
        return token_losses(hidden_ND, model.head_weight, targets_N, **head)


class MaskedToken(NextToken):
    """The loss of the tokens that were masked; the head sees only those."""

    def features(self, inputs_BT, targets_BT, documents_BT=None) -> tuple[torch.Tensor, torch.Tensor]:
        is_target_BT = targets_BT >= 0
        return self.model.hidden(inputs_BT, documents_BT=documents_BT)[is_target_BT], targets_BT[is_target_BT]


class TargetToken(NextToken):
    """The next-token loss of the targets that an encoder-decoder writes behind their sources."""

    def features(
        self, sources_BS, inputs_BT, targets_BT, source_documents_BS=None, documents_BT=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.model.encode(sources_BS, documents_BS=source_documents_BS)
        hidden_BTD = self.model.hidden(inputs_BT, documents_BT=documents_BT, memory=memory)
        return hidden_BTD.flatten(0, 1), targets_BT.flatten()
