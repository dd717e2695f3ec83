"""NEFTune (arXiv:2310.05914): noise on the token embeddings while a model is fine-tuned."""

from __future__ import annotations

import torch

from llmctl.models.language_model import LanguageModel


def add_noise(model: LanguageModel, alpha: float) -> None:
    """From now on embeddings in training get noise, uniform within alpha / sqrt(T D), T tokens to a row.

    Its generator is torch's own, which the trainer seeds anew for every step.
    """

    def noisy(module, inputs, x_BTD):
        if not module.training:
            return x_BTD
        limit = alpha / (x_BTD.shape[-2] * x_BTD.shape[-1]) ** 0.5
        return x_BTD + torch.empty_like(x_BTD).uniform_(-limit, limit)

    model.embed_tokens.register_forward_hook(noisy)
