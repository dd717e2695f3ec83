"""What training minimizes, each a module around the model, so that sharding gathers head and embedding around it.

In training mode an objective gives the sum over a batch's targets, in eval mode the loss of each, without gradient; the
trainer divides by the number of targets. `model` is the module whose `layers` are sharded and compiled one by one.
"""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models.causal_lm import CausalLM
from llmctl.train.loss import cross_entropy, token_losses


class NextToken(nn.Module):
    """The next-token loss of a batch."""

    def __init__(self, model: CausalLM, z_loss: float):
        super().__init__()
        self.model, self.z_loss = model, z_loss

    def forward(self, inputs_BT, targets_BT, documents_BT=None) -> torch.Tensor:
        """Sum of nats over all targets in training mode; [B * T] nats of each, without gradient, in eval mode."""
        model, targets_N = self.model, targets_BT.flatten()
        hidden_ND = model.head_input(model.hidden(inputs_BT, documents_BT=documents_BT)).flatten(0, 1)
        head = {"bias_V": model.output_bias, "softcap": model.config.head.softcap}
        if self.training:
            return cross_entropy(hidden_ND, model.head_weight, targets_N, self.z_loss, **head)
        return token_losses(hidden_ND, model.head_weight, targets_N, **head)
