"""Objectives of a classifier: labels, measures, and which of two answers is better."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from llmctl.errors import UserError
from llmctl.evaluate import scores
from llmctl.finetune.distillation import Teacher, choice_divergences, verdict_divergences
from llmctl.models.language_model import LanguageModel
from llmctl.train import state

_RIDGE, _FITTED_TOKENS = 1e-3, 1024


class _Labelled(nn.Module):
    """Scores of whole texts, of which `lengths_B` says how long they are."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model
        self._teacher: list[Teacher | None] = [None]  # in a list: it is no part of what is trained, sharded or saved
        self.register_buffer("centre_ids_RT", None, persistent=False)
        self.register_buffer("centre_lengths_R", None, persistent=False)

    sequences = 1
    """Texts of an example."""

    def forward(self, *batch: torch.Tensor | None) -> torch.Tensor:
        """As `_result` has it, of the rows of an `ExampleBatch`; of one that says nothing of what counts, the whole features."""
        if batch[-1] is None:
            inputs_BT, _, lengths_B, *_ = batch
            return self.model.features(inputs_BT, _is_real(inputs_BT, lengths_B))
        features_BD, *rest = self.features(*batch)
        loss = self.loss(features_BD, *rest)
        (teacher,), (inputs_BT, _, lengths_B, *_) = self._teacher, batch
        if not self.training or teacher is None:
            return loss
        with torch.no_grad():
            theirs_BC = teacher.model(inputs_BT, _is_real(inputs_BT, lengths_B)).float()
        divergences_N = self._divergences(self._scores(features_BD), theirs_BC, teacher.temperature)
        return loss + teacher.weight * divergences_N[rest[-1]].sum()

    def learn_from(self, teacher: Teacher | None) -> None:
        """From here on what a teacher says of the same texts, with labels in the same order, is learned too."""
        self._teacher = [teacher]

    def features(self, inputs_BT, targets_BT, lengths_B, labels, counted) -> tuple[torch.Tensor, ...]:
        """What the head gets of each text, [B, D], and the rest of what `loss` takes."""
        if self.centre_ids_RT is None:
            features_BD = self.model.features(inputs_BT, _is_real(inputs_BT, lengths_B))
        else:
            features_BD = self._from_centre(inputs_BT, lengths_B)
        return features_BD, *([] if labels is None else [labels]), counted

    def _from_centre(self, inputs_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """The features [B, D] less the centre's, which go through the model beside them."""
        ids_RT, lengths_R = self.centre_ids_RT, self.centre_lengths_R
        width, count = max(inputs_BT.shape[1], ids_RT.shape[1]), len(inputs_BT)
        ids_NT = torch.cat([F.pad(ids, (0, width - ids.shape[1])) for ids in (inputs_BT, ids_RT)])
        features_ND = self.model.features(ids_NT, _is_real(ids_NT, torch.cat([lengths_B, lengths_R])))
        return features_ND[:count] - features_ND[count:].mean(0)

    def _scores(self, features_BD: torch.Tensor) -> torch.Tensor:
        """float32 [B, labels]."""
        return self.model.classifier(features_BD).float()

    @torch.no_grad()
    def begin_with(self, inputs_BT: torch.Tensor, lengths_B: torch.Tensor) -> None:
        """Fit a fresh head to what the model makes of these texts."""
        features_BD = self.model.eval().features(inputs_BT, _is_real(inputs_BT, lengths_B))
        self.model.classifier.standardize(features_BD)

    @torch.no_grad()
    def centre_on(self, inputs_RT: torch.Tensor, lengths_R: torch.Tensor) -> None:
        """From here on a head over means reads features less those that these texts have at the time.

        A few tokens are a small part of a mean, which `standardize` stretches to size; with it every step would stretch
        what it does to all texts alike, and that is more than what it teaches. `as_saved` makes the head do without.
        """
        learns = any(p.requires_grad for name, p in self.model.named_parameters() if not name.startswith("classifier."))
        if self.model.config.classifier.at == "mean" and self.model.classifier.dense is not None and learns:
            self.centre_ids_RT, self.centre_lengths_R = inputs_RT, lengths_R
            if not inputs_RT.is_meta:  # else this process gets its share of a head whose zero another has moved
                self._move_zero(1)

    def _move_zero(self, sign: int) -> None:
        """Let the head's first layer give for features less the centre's what it gave for whole ones (-1: the other way)."""
        dense = self.model.classifier.dense
        centre_D = self._centre_D().to(dense.weight.dtype)
        state.copy_into(dense.bias, _whole(dense.bias) + sign * _whole(dense.weight) @ centre_D)

    def _centre_D(self) -> torch.Tensor:
        """What the model makes of the centre's texts, their mean; of a sharded one every process must ask for it."""
        was_training = self.training
        features_RD = self.eval()(self.centre_ids_RT, None, self.centre_lengths_R, None, None)
        self.train(was_training)
        self._reshard()
        return features_RD.mean(0)

    def _reshard(self) -> None:
        """Of a sharded model every process lets go of the whole parameters that it has gathered, which would be stale soon."""
        if hasattr(self, "reshard"):
            self.reshard()

    @contextlib.contextmanager
    def as_saved(self) -> Iterator[None]:
        """Within the block the model alone gives what this objective makes of it; after it every bit is as before."""
        self._reshard()
        parameters = list(self.model.classifier.parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            self._finish()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def _finish(self) -> None:
        if self.centre_ids_RT is not None:
            self._move_zero(-1)

    def _result(self, losses_N: torch.Tensor, counted_N: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
        """The sum in training mode, else the losses and the rows beside them that `metrics` wants."""
        if self.training:
            return losses_N[counted_N].sum()
        return torch.stack([row[counted_N].double() for row in (losses_N, *beside)])


class Classification(_Labelled):
    """Cross-entropy of the one label, or the mean over all labels of that of having it or not."""

    def loss(self, features_BD, labels, counted_B) -> torch.Tensor:
        """`labels` are numbers int64 [B], or float32 [B, labels] of 0 and 1."""
        scores_BC = self._scores(features_BD)
        if self.model.config.classifier.kind == "single_label_classification":
            losses_B = F.cross_entropy(scores_BC, labels, reduction="none")
            return self._result(losses_B, counted_B, scores_BC.argmax(1), labels)
        if labels.dim() == 1:
            labels = F.one_hot(labels, scores_BC.shape[1]).float()
        losses_B = F.binary_cross_entropy_with_logits(scores_BC, labels, reduction="none").mean(1)
        return self._result(losses_B, counted_B, *(scores_BC > 0).unbind(1), *labels.unbind(1))

    def _divergences(self, ours_BC, theirs_BC, temperature: float) -> torch.Tensor:
        if self.model.config.classifier.kind == "single_label_classification":
            return choice_divergences(ours_BC, theirs_BC, temperature)
        return verdict_divergences(ours_BC, theirs_BC, temperature).mean(1)

    def metrics(self, rows: torch.Tensor) -> dict[str, float]:
        predicted, true = (half.mT.squeeze(1).numpy() if len(half) == 1 else half.mT.numpy() for half in rows.chunk(2))
        return {"accuracy": scores.accuracy(predicted, true), "macro_f1": scores.macro_f1(predicted, true)}


class Regression(_Labelled):
    """Squared error of standardized targets.

    While it trains, the head gives standardized numbers; `as_saved` puts it into the data's units. A head without a bias
    can only stretch, so there the targets keep their mean, at which it starts.
    """

    measure = "squared deviations"

    def __init__(self, model: LanguageModel, targets_N: np.ndarray, has_head: bool):
        """`targets_N` are all that are trained on; `has_head`: the model's head knows the data's units already."""
        super().__init__(model)
        self._scale = float(targets_N.std())
        if self._scale == 0:
            raise UserError(f"all {len(targets_N)} values to train on are {targets_N[0]:g}: nothing to learn")
        self._mean = float(targets_N.mean())
        self._shift = 0.0 if model.classifier.out.bias is None else self._mean
        if has_head:
            self._change_units(1 / self._scale, -self._shift / self._scale)

    def loss(self, features_BD, labels_B, counted_B) -> torch.Tensor:
        """`labels_B` float64 in the data's units."""
        scores_B = self._scores(features_BD)[:, 0]
        wanted_B = ((labels_B - self._shift) / self._scale).float()
        losses_B = (scores_B - wanted_B).square()
        return self._result(losses_B, counted_B, scores_B.double() * self._scale + self._shift, labels_B)

    def _divergences(self, ours_B1, theirs_B1, temperature: float) -> torch.Tensor:
        """Of normal distributions, as much as the squared error is: no temperature changes it."""
        return (ours_B1 - (theirs_B1 - self._shift) / self._scale).square()[:, 0]

    def metrics(self, rows_2N: torch.Tensor) -> dict[str, float]:
        predicted_N, true_N = rows_2N.numpy()
        return {"spearman": scores.spearman(predicted_N, true_N), "rmse": scores.rmse(predicted_N, true_N)}

    @torch.no_grad()
    def begin_with(self, inputs_BT: torch.Tensor, lengths_B: torch.Tensor) -> None:
        """A head without a bias gets the weights, by ridge regression, with which texts come nearest to the mean.

        It is fitted to every token of these texts, not to what the head reads alone: a text that ends otherwise than these
        do has no bias either to bring it near.
        """
        super().begin_with(inputs_BT, lengths_B)
        if self.model.classifier.out.bias is not None:
            return
        is_real_BT = _is_real(inputs_BT, lengths_B)
        hidden_ND = self.model.read(inputs_BT, is_real_BT)[is_real_BT]
        hidden_ND = hidden_ND[:: -(-len(hidden_ND) // _FITTED_TOKENS)].double().cpu()
        products_NN = hidden_ND @ hidden_ND.mT
        ridge = _RIDGE * products_NN.diagonal().mean() * torch.eye(len(hidden_ND))
        constant_D = hidden_ND.mT @ torch.linalg.solve(products_NN + ridge, torch.ones(len(hidden_ND)).double())
        self.model.classifier.out.weight.copy_(self._mean / self._scale * constant_D)

    def _finish(self) -> None:
        super()._finish()
        self._change_units(self._scale, self._shift)

    @torch.no_grad()
    def _change_units(self, scale: float, shift: float) -> None:
        head = self.model.classifier.out
        head.weight.mul_(scale)
        if head.bias is not None:
            head.bias.mul_(scale).add_(shift)


class Reward(_Labelled):
    """-log sigmoid(reward of the chosen answer - reward of the rejected one): Bradley and Terry's model."""

    sequences = 2

    def loss(self, features_BD, counted_P) -> torch.Tensor:
        """Rows are the chosen texts of all pairs, then the rejected ones."""
        chosen_P, rejected_P = self._scores(features_BD)[:, 0].chunk(2)
        margin_P = chosen_P - rejected_P
        return self._result(-F.logsigmoid(margin_P), counted_P, margin_P > 0)

    def _divergences(self, ours_B1, theirs_B1, temperature: float) -> torch.Tensor:
        ours_P, theirs_P = (chosen_P - rejected_P for chosen_P, rejected_P in (ours_B1.chunk(2), theirs_B1.chunk(2)))
        return verdict_divergences(ours_P[:, 0], theirs_P[:, 0], temperature)

    def metrics(self, is_right_1P: torch.Tensor) -> dict[str, float]:
        return {"accuracy": is_right_1P.mean().item()}


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    """Of which this process may hold a shard; then every process must ask for it."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def _is_real(inputs_BT: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
    return torch.arange(inputs_BT.shape[1], device=inputs_BT.device) < lengths_B[:, None]
