"""A teacher's probabilities beside the data's own targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmctl.errors import UserError
from llmctl.models.config import ModelConfig
from llmctl.models.head import logits
from llmctl.models.language_model import LanguageModel
from llmctl.train.objectives import NextToken

LOGITS_AT_ONCE = 1 << 23


def refuse_teacher(teacher: ModelConfig, model: ModelConfig, seq_len: int) -> None:
    """Raise UserError for one that cannot say what it makes of the model's own tokens, `seq_len` of them."""
    for what, theirs, ours in (
        ("kind", teacher.kind, model.kind),
        ("vocabulary", teacher.vocab_size, model.vocab_size),
    ):
        if theirs != ours:
            raise UserError(
                f"the teacher's {what} is {theirs}, the model's {ours}", "a teacher must have the model's own tokenizer"
            )
    if teacher.max_positions is not None and teacher.max_positions < seq_len:
        raise UserError(
            f"the teacher reads {teacher.max_positions} tokens, rows may have {seq_len}",
            f"--seq-len {teacher.max_positions}",
        )


class Distilled(nn.Module):
    """loss + weight * temperature^2 * KL(teacher || student) over the same targets, both at that temperature.

    In eval mode it gives the student's own loss alone (arXiv:1503.02531).
    """

    def __init__(self, student: NextToken, teacher: LanguageModel, weight: float, temperature: float):
        super().__init__()
        self.student, self.weight, self.temperature = student, weight, temperature
        # in a list: it is no part of what is trained, sharded or saved
        self._teacher = [type(student)(teacher.requires_grad_(False).eval(), 0.0).eval()]

    @property
    def model(self) -> LanguageModel:
        return self.student.model

    def forward(self, *batch: torch.Tensor | None) -> torch.Tensor:
        """Sum over all targets in training mode; the loss of each, without gradient, in eval mode."""
        hidden_ND, targets_N = self.student.features(*batch)
        loss = self.student.loss(hidden_ND, targets_N)
        if not self.training:
            return loss
        with torch.no_grad():
            theirs_ND, _ = self._teacher[0].features(*batch)
        is_target_N = targets_N >= 0
        return loss + self.weight * self._divergence(hidden_ND[is_target_N], theirs_ND[is_target_N])

    def _divergence(self, hidden_MD: torch.Tensor, theirs_MD: torch.Tensor) -> torch.Tensor:
        """Few logits exist at a time, in the backward pass again."""
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        parts = zip(hidden_MD.split(rows), theirs_MD.split(rows))
        return sum(
            (checkpoint(self._part, ours, theirs, use_reentrant=False) for ours, theirs in parts),
            start=torch.zeros((), device=hidden_MD.device),
        )

    def _part(self, hidden_MD: torch.Tensor, theirs_MD: torch.Tensor) -> torch.Tensor:
        ours_MV = self._logprobs(self.model, hidden_MD)
        theirs_MV = self._logprobs(self._teacher[0].model, theirs_MD)
        return F.kl_div(ours_MV, theirs_MV, reduction="sum", log_target=True) * self.temperature**2

    def _logprobs(self, model: LanguageModel, hidden_MD: torch.Tensor) -> torch.Tensor:
        found_MV = logits(model.config.head, model.head_input(hidden_MD), model.head_weight, model.output_bias)
        return (found_MV.float() / self.temperature).log_softmax(-1)
