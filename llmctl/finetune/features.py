"""Training a head alone: what the frozen backbone makes of every row is worked out once, and read from a file after that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from llmctl.data.packing import IGNORE, permuted
from llmctl.finetune.untying import untie
from llmctl.models.language_model import LanguageModel
from llmctl.train.feed import Rows
from llmctl.train.hardware import autocast

HEAD = ("classifier.", "lm_head.", "head_transform.", "head_bias")


@dataclass(frozen=True)
class FeatureBatch:
    """`parts` as the objective's `loss` takes them; the last is targets, or which examples count."""

    parts: tuple[torch.Tensor, ...]
    n_targets: int

    def tensors(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        return tuple(part.to(device) for part in self.parts)

    def without_targets(self) -> FeatureBatch:
        *others, last = self.parts
        nothing = torch.full_like(last, False if last.dtype == torch.bool else IGNORE)
        return replace(self, parts=(*others, nothing), n_targets=0)


class FeatureRows:
    """The rows of one epoch of `rows`, with the backbone's features in the file `path` in place of their tokens."""

    n_bytes = None

    def __init__(self, rows: Rows, objective: nn.Module, path: Path, dtype: torch.dtype, seed: int, shuffled: bool):
        self.unit, self.n_tokens, self._seed = rows.unit, rows.n_tokens, seed
        self._sequences = getattr(objective, "sequences", 1)
        self._rest: list[tuple[torch.Tensor, ...]] = []
        self._n_targets: list[int] = []
        batches = (
            (rows.train_batch(row, 1) for row in range(rows.rows_per_epoch)) if shuffled else rows.validation_batches(1)
        )
        counts, width = [0], objective.model.config.d_model
        with open(path, "wb") as file:
            for batch in batches:
                features_ND, rest = _features(objective, batch, dtype)
                kept = features_ND.dtype
                file.write(memoryview(features_ND.contiguous().view(torch.uint8).numpy()).cast("B"))
                counts.append(len(features_ND))
                self._rest.append(rest)
                self._n_targets.append(batch.n_targets)
        self._ends = torch.tensor(counts).cumsum(0).tolist()
        flat = torch.from_file(str(path), shared=False, size=self._ends[-1] * width, dtype=kept)
        self._features_ND = flat.view(-1, width)
        self.rows_per_epoch = len(self._rest)

    def train_batch(self, first_row: int, n_rows: int) -> FeatureBatch:
        """Rows `first_row` … of the endless shuffled sequence of epochs."""
        places = (divmod(number, self.rows_per_epoch) for number in range(first_row, first_row + n_rows))
        return self._batch([permuted(index, self.rows_per_epoch, self._seed, epoch) for epoch, index in places])

    def validation_batches(self, n_rows: int) -> Iterator[FeatureBatch]:
        """All rows once, in order; the last batch may be smaller."""
        for at in range(0, self.rows_per_epoch, n_rows):
            yield self._batch(range(at, min(at + n_rows, self.rows_per_epoch)))

    def _batch(self, rows: Sequence[int]) -> FeatureBatch:
        features = [self._features_ND[self._ends[row] : self._ends[row + 1]] for row in rows]
        halves = [part for each in zip(*(f.chunk(self._sequences) for f in features)) for part in each]
        rest = (torch.cat(parts) for parts in zip(*(self._rest[row] for row in rows)))
        return FeatureBatch((torch.cat(halves), *rest), sum(self._n_targets[row] for row in rows))


class HeadOnly(nn.Module):
    """An objective that begins behind the backbone."""

    def __init__(self, objective: nn.Module):
        super().__init__()
        self.objective = objective
        if hasattr(objective, "metrics"):
            self.metrics = objective.metrics
        if hasattr(objective, "as_saved"):
            self.as_saved = objective.as_saved
        self.measure = getattr(objective, "measure", "nats")

    @property
    def model(self) -> LanguageModel:
        return self.objective.model

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.objective.loss(*parts)


def freeze_backbone(model: LanguageModel) -> LanguageModel:
    """Leave only the head to train; one that is the embedding becomes a matrix of its own, except in an encoder.

    An encoder's head has a transform and a bias to learn with.
    """
    config = model.config
    if config.predicts_tokens and config.tie_embeddings and config.kind != "masked":
        untie(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))
    return model


@torch.no_grad()
def _features(objective: nn.Module, batch, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """What the head gets of a row, [N, D] on the CPU, and the rest of what the objective's loss takes.

    Of tokens in `dtype`; of texts in float32: what tells means over many tokens apart may be less than bfloat16 holds.
    """
    device = objective.model.embed_tokens.weight.device
    objective.eval()
    with autocast(device, dtype):
        features_ND, *rest = objective.features(*batch.tensors(device))
    if rest[-1].dtype == torch.bool:
        dtype = torch.float32
    else:  # targets: where nothing is predicted, nothing is kept
        is_target_N = rest[0] >= 0
        features_ND, rest = features_ND[is_target_N], [rest[0][is_target_N]]
    return features_ND.to("cpu", dtype), tuple(each.cpu() for each in rest)
