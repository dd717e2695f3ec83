"""What an encoder hands to a decoder."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmctl.ops.visibility import Visibility

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class Memory:
    """An encoder's output [B, S, D]; real tokens of row b are those from `starts_B` on and in front of `ends_B` (None: all).

    `documents_BS` (int, non-decreasing along S) numbers the documents packed into a row. With `keep` each layer projects
    its keys and values once, and finds them here in every later step. A decoder may have several rows for each of these,
    one behind the other: the beams of a search share their source.
    """

    def __init__(
        self,
        hidden_BSD: torch.Tensor,
        starts_B: torch.Tensor | None = None,
        ends_B: torch.Tensor | None = None,
        documents_BS: torch.Tensor | None = None,
        keep: bool = False,
    ):
        self.hidden_BSD, self.documents_BS, self.keep = hidden_BSD, documents_BS, keep
        self.starts_B, self.ends_B = starts_B, ends_B
        self._kept: dict[int, KeysAndValues] = {}
        self._rows_per_source = 1

    def keys_and_values(self, layer: int, project: Callable[[torch.Tensor], KeysAndValues]) -> KeysAndValues:
        """[B, G, S, K] twice: what `project` makes of the hidden states, or made of them before."""
        if layer in self._kept:
            return self._kept[layer]
        projected = project(self.hidden_BSD)
        if self.keep:
            self._kept[layer] = projected
        return projected

    def visibility(self, documents_BT: torch.Tensor | None) -> Visibility:
        """What the decoder's tokens see: all real ones or, in packed rows, those of the document of the same number."""
        if self.documents_BS is not None and documents_BT is not None:
            # A document that the encoder has not got is the decoder's padding: it sees something, and nobody reads it.
            first_BT = torch.searchsorted(self.documents_BS, documents_BT).clamp(max=self.hidden_BSD.shape[1] - 1)
            end_BT = torch.searchsorted(self.documents_BS, documents_BT, right=True)
            return Visibility(first_BT=first_BT, end_BT=torch.maximum(end_BT, first_BT + 1))
        first_BT, end_BT = (None if at_B is None else at_B[:, None] for at_B in (self.starts_B, self.ends_B))
        return Visibility(first_BT=first_BT, end_BT=end_BT)

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the decoder's batch; what lies here moves only where a source comes or goes."""
        sources = rows // self._rows_per_source
        each, counts = sources.unique_consecutive(return_counts=True)
        self._rows_per_source = int(counts[0]) if (counts == counts[0]).all() else 1
        kept = each if self._rows_per_source > 1 else sources
        if len(kept) == len(self.hidden_BSD) and (kept.diff() > 0).all():
            return
        self.hidden_BSD = self.hidden_BSD[kept]
        self.starts_B, self.ends_B = (None if at_B is None else at_B[kept] for at_B in (self.starts_B, self.ends_B))
        self._kept = {layer: (keys[kept], values[kept]) for layer, (keys, values) in self._kept.items()}
