"""The model before and after, on text that neither was fitted to."""

from __future__ import annotations

import torch

from llmctl import agreement
from llmctl.agreement import Agreement
from llmctl.models.streaming import StreamedModel


@torch.no_grad()
def compare(before: StreamedModel, ids_BT: torch.Tensor, *others: StreamedModel) -> list[Agreement]:
    """How far each of the others agrees with the first on rows [B, T]; logits exist for one row at a time."""
    if before.config.classifier is not None:
        first_BTV = before.logits(ids_BT)
        return [agreement.measure(lambda _: first_BTV, other.logits, ids_BT) for other in others]
    first_BTD, found = before.hidden(ids_BT), []
    for other in others:
        second_BTD = other.hidden(ids_BT)
        rows = (
            agreement.compare_row(before.head(first_BTD[i : i + 1])[0], other.head(second_BTD[i : i + 1])[0], ids_BT[i])
            for i in range(len(ids_BT))
        )
        found.append(agreement.of_rows(list(rows)))
    return found
