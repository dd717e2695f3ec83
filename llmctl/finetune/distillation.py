"""A teacher's probabilities beside the data's own targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmctl.errors import UserError
from llmctl.models.config import Classifier, ModelConfig
from llmctl.models.head import logits
from llmctl.models.language_model import LanguageModel
from llmctl.train.objectives import NextToken

LOGITS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Teacher:
    """A model that does not learn, how much it counts beside the data, and the temperature of both models' probabilities.

    What it adds is weight * temperature^2 * KL(teacher || student), in training only (arXiv:1503.02531).
    """

    model: LanguageModel
    weight: float
    temperature: float

    def __post_init__(self):
        self.model.requires_grad_(False).eval()


def refuse_teacher(teacher: ModelConfig, model: ModelConfig, seq_len: int) -> None:
    """Raise UserError for one that cannot say what it makes of the model's own tokens, `seq_len` of them, or its labels."""
    compared = [("vocabulary", teacher.vocab_size, model.vocab_size)]
    if model.classifier is None:
        compared.append(("kind", _kind(teacher), _kind(model)))
    else:
        compared.append(("head", _answers(teacher.classifier), _answers(model.classifier)))
    for what, theirs, ours in compared:
        if theirs != ours:
            hint = "a teacher must have the model's own tokenizer, and say the same kind of thing"
            raise UserError(f"the teacher's {what} is {theirs}, the model's {ours}", hint)
    if teacher.max_positions is not None and teacher.max_positions < seq_len:
        raise UserError(
            f"the teacher reads {teacher.max_positions} tokens, rows may have {seq_len}",
            f"--seq-len {teacher.max_positions}",
        )


def _kind(config: ModelConfig) -> str:
    return "that of a classifier" if config.classifier is not None else config.kind


def _answers(classifier: Classifier | None) -> str:
    if classifier is None:
        return "that of a language model"
    is_named = classifier.kind != "regression"
    return f"{classifier.kind} of {', '.join(map(repr, classifier.labels))}" if is_named else classifier.kind


def token_divergences(
    student: LanguageModel, teacher: Teacher, ours_MD: torch.Tensor, theirs_MD: torch.Tensor
) -> torch.Tensor:
    """temperature^2 * KL(teacher || student) at each of M tokens, from what the two stacks make of them.

    Few logits exist at a time, in the backward pass again.
    """
    if not len(ours_MD):
        return ours_MD.new_zeros(0, dtype=torch.float32)

    def logprobs(model: LanguageModel, hidden_ND: torch.Tensor) -> torch.Tensor:
        found_NV = logits(model.config.head, model.head_input(hidden_ND), model.head_weight, model.output_bias)
        return (found_NV.float() / teacher.temperature).log_softmax(-1)

    def part(ours_ND: torch.Tensor, theirs_ND: torch.Tensor) -> torch.Tensor:
        ours_NV, theirs_NV = logprobs(student, ours_ND), logprobs(teacher.model, theirs_ND)
        return F.kl_div(ours_NV, theirs_NV, reduction="none", log_target=True).sum(-1) * teacher.temperature**2

    rows = max(1, LOGITS_AT_ONCE // student.config.vocab_size)
    parts = zip(ours_MD.split(rows), theirs_MD.split(rows))
    return torch.cat([checkpoint(part, ours, theirs, use_reentrant=False) for ours, theirs in parts])


def choice_divergences(ours_NC: torch.Tensor, theirs_NC: torch.Tensor, temperature: float) -> torch.Tensor:
    """The same of one choice among C, from scores [N, C] of both."""
    ours_NC, theirs_NC = ((scores / temperature).log_softmax(-1) for scores in (ours_NC, theirs_NC))
    return F.kl_div(ours_NC, theirs_NC, reduction="none", log_target=True).sum(-1) * temperature**2


def verdict_divergences(ours: torch.Tensor, theirs: torch.Tensor, temperature: float) -> torch.Tensor:
    """The same of yes or no each, from log odds of any one shape."""
    ours, theirs = (torch.stack([scores, torch.zeros_like(scores)], -1) for scores in (ours, theirs))
    return choice_divergences(ours, theirs, temperature)


class Distilled(nn.Module):
    """The loss of tokens and, in training, what the teacher adds at the same targets."""

    def __init__(self, student: NextToken, teacher: Teacher):
        super().__init__()
        self.student = student
        # in a list: it is no part of what is trained, sharded or saved
        self._teacher = [teacher, type(student)(teacher.model, 0.0).eval()]

    @property
    def model(self) -> LanguageModel:
        return self.student.model

    def forward(self, *batch: torch.Tensor | None) -> torch.Tensor:
        """Sum over all targets in training mode; the loss of each, without gradient, in eval mode."""
        hidden_ND, targets_N = self.student.features(*batch)
        loss = self.student.loss(hidden_ND, targets_N)
        if not self.training:
            return loss
        teacher, its_tokens = self._teacher
        with torch.no_grad():
            theirs_ND, _ = its_tokens.features(*batch)
        is_target_N = targets_N >= 0
        divergences_M = token_divergences(self.model, teacher, hidden_ND[is_target_N], theirs_ND[is_target_N])
        return loss + teacher.weight * divergences_M.sum()
