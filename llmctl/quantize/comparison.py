"""The model before and after, on text that neither was fitted to."""

from __future__ import annotations

import torch

from llmctl import agreement
from llmctl.agreement import Agreement
from llmctl.models.streaming import StreamedModel


@torch.no_grad()
def compare(before: StreamedModel, after: StreamedModel, ids_BT: torch.Tensor) -> Agreement:
    """How far two models agree on rows [B, T]; logits exist for one row at a time."""
    if before.config.classifier is not None:
        return agreement.measure(before.logits, after.logits, ids_BT)
    first_BTD, second_BTD = before.hidden(ids_BT), after.hidden(ids_BT)
    rows = (
        agreement.compare_row(before.head(first_BTD[i : i + 1])[0], after.head(second_BTD[i : i + 1])[0], ids_BT[i])
        for i in range(len(ids_BT))
    )
    return agreement.of_rows(list(rows))
