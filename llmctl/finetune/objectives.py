"""What each objective asks of a model: the loss of a batch, and what its rows are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmctl.finetune.distillation import Teacher, token_divergences
from llmctl.finetune.settings import PreferenceSettings
from llmctl.models.head import logits
from llmctl.models.language_model import LanguageModel
from llmctl.train.objectives import NextToken

LOGITS_AT_ONCE = 1 << 24


def sequence_logprobs(model: LanguageModel, hidden_ND: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Sum of log p over each row's targets that are not negative, float32 [B]; `hidden_ND` is the stack's output at them.

    Logits exist for a few tokens at a time, in the backward pass again.
    """
    hidden_ND, targets_N = model.head_input(hidden_ND), targets_BT[targets_BT >= 0]

    def part(hidden_MD: torch.Tensor, targets_M: torch.Tensor) -> torch.Tensor:
        logits_MV = logits(model.config.head, hidden_MD, model.head_weight, model.output_bias)
        return -F.cross_entropy(logits_MV.float(), targets_M, reduction="none")

    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [
        checkpoint(part, h_MD, t_M, use_reentrant=False) if torch.is_grad_enabled() else part(h_MD, t_M)
        for h_MD, t_M in zip(hidden_ND.split(at_once), targets_N.split(at_once))
    ]
    return _sums(torch.cat(parts), targets_BT)


def _sums(values_N: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Of what belongs to the targets of each row, float32 [B]."""
    rows_N = (targets_BT >= 0).nonzero()[:, 0]
    return torch.zeros(len(targets_BT), device=targets_BT.device).index_add(0, rows_N, values_N)


class Comparison(nn.Module):
    """Preferences between two answers, or verdicts on one, from the log-probabilities of whole answers.

    `reference` is the model before training, which dpo and kto compare with. What a teacher adds is the mean over the tokens
    of a pair's answers.
    """

    def __init__(
        self,
        model: LanguageModel,
        rule: Rule,
        settings: PreferenceSettings,
        reference: LanguageModel | None,
        teacher: Teacher | None = None,
    ):
        super().__init__()
        self.model, self.rule, self.settings = model, rule, settings
        self._others = [reference, teacher]  # in a list: they are no part of what is trained, sharded or saved

    def forward(self, inputs_BT, targets_BT, lengths_B, labels_P, counted_P) -> torch.Tensor:
        """The sum of the losses of the pairs (or answers) that count; in eval mode the loss of each, then of each 1.0 where
        the better answer is the likelier one."""
        reference, teacher = self._others
        is_target_BT = targets_BT >= 0
        hidden_ND = self.model.hidden(inputs_BT)[is_target_BT]
        policy_B, reference_B = sequence_logprobs(self.model, hidden_ND, targets_BT), None
        with torch.no_grad():
            if reference is not None:
                theirs_ND = reference.hidden(inputs_BT)[is_target_BT]
                reference_B = sequence_logprobs(reference, theirs_ND, targets_BT)
        lengths_B = is_target_BT.sum(1)
        losses_P, is_right_P = self.rule.losses(policy_B, reference_B, lengths_B, labels_P, self.settings)
        if self.training and teacher is not None:
            with torch.no_grad():
                theirs_ND = teacher.model.hidden(inputs_BT)[is_target_BT]
            sums_B = _sums(token_divergences(self.model, teacher, hidden_ND, theirs_ND), targets_BT)
            pairs, lengths = (each.view(-1, len(losses_P)).sum(0) for each in (sums_B, lengths_B))
            losses_P = losses_P + teacher.weight * pairs / lengths
        if self.training:
            return losses_P[counted_P].sum()
        return torch.stack([losses_P[counted_P], is_right_P[counted_P].float()])

    def metrics(self, is_right_1P: torch.Tensor) -> dict[str, float]:
        return {"accuracy": is_right_1P.mean().item()}


class SourceToTarget(NextToken):
    """The next-token loss of what an encoder-decoder writes, with one source and its target to a row."""

    def features(self, sources_BS, source_lengths_B, inputs_BT, targets_BT) -> tuple[torch.Tensor, torch.Tensor]:
        mask_BS = torch.arange(sources_BS.shape[1], device=sources_BS.device) < source_lengths_B[:, None]
        hidden_BTD = self.model.hidden(inputs_BT, memory=self.model.encode(sources_BS, mask_BS))
        return hidden_BTD.flatten(0, 1), targets_BT.flatten()


@dataclass(frozen=True)
class Rule:
    losses: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    needs_reference: bool = False
    beta: float = 0.1


def _dpo(policy_B, reference_B, lengths_B, labels, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv:2305.18290, equation 7."""
    chosen_P, rejected_P = (policy_B - reference_B).chunk(2)
    margin_P = chosen_P - rejected_P
    return -F.logsigmoid((settings.beta or 0.1) * margin_P), margin_P > 0


def _simpo(policy_B, reference_B, lengths_B, labels, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv:2405.14734, equation 6: per token, without a reference, and with a margin."""
    chosen_P, rejected_P = (policy_B / lengths_B).chunk(2)
    margin_P = chosen_P - rejected_P
    return -F.logsigmoid((settings.beta or 2.0) * margin_P - settings.simpo_gamma), margin_P > 0


def _orpo(policy_B, reference_B, lengths_B, labels, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv:2403.07691, equation 6: the chosen answer's loss, and the log of the odds ratio."""
    chosen_P, rejected_P = (policy_B / lengths_B).chunk(2)
    odds_P = (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))
    return -chosen_P - (settings.beta or 0.1) * F.logsigmoid(odds_P), odds_P > 0


def _kto(policy_B, reference_B, lengths_B, labels_B, settings) -> tuple[torch.Tensor, torch.Tensor]:
    """arXiv:2402.01306, equation 8; the batch's own mean stands for the divergence from the reference."""
    beta, gain_B = settings.beta or 0.1, policy_B - reference_B
    baseline = gain_B.detach().mean().clamp(min=0)
    is_good_B = labels_B > 0
    good_B = settings.kto_desirable * (1 - torch.sigmoid(beta * (gain_B - baseline)))
    bad_B = settings.kto_undesirable * (1 - torch.sigmoid(beta * (baseline - gain_B)))
    return torch.where(is_good_B, good_B, bad_B), (gain_B > baseline) == is_good_B


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0."""
    return torch.log1p(-x.exp().clamp(max=1 - 1e-7))


RULES = {
    "dpo": Rule(_dpo, needs_reference=True),
    "simpo": Rule(_simpo),
    "orpo": Rule(_orpo),
    "kto": Rule(_kto, needs_reference=True),
}
