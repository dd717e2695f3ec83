"""Places in front of a text that hold no token: a stack gives them trained embeddings, or trained keys and values."""

from __future__ import annotations

import torch
from torch import nn


class VirtualPrompt(nn.Module):
    """N trained embeddings [N, D], as prompt tuning has them (arXiv:2104.08691); what layers make of them is theirs."""

    def __init__(self, weight_ND: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_ND)

    @property
    def count(self) -> int:
        return len(self.weight)

    def embeddings(self, d_model: int) -> torch.Tensor:
        """[N, D]"""
        return self.weight

    def keys_and_values(self, layer: int) -> None:
        """The layer's own."""
        return None


class VirtualPrefix(nn.Module):
    """N trained keys and values in every layer, [N, layers, 2, G, K], as prefix tuning has them (arXiv:2101.00190)."""

    def __init__(self, weight_NL2GK: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight_NL2GK)

    @property
    def count(self) -> int:
        return len(self.weight)

    def embeddings(self, d_model: int) -> torch.Tensor:
        """[N, D]: nobody sees them, since all that others take from these places is replaced."""
        return self.weight.new_zeros(self.count, d_model)

    def keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[G, N, K] twice."""
        k_GNK, v_GNK = self.weight[:, layer].permute(1, 2, 0, 3)
        return k_GNK, v_GNK


def put(x_BGTK: torch.Tensor, values_GNK: torch.Tensor, starts_B: torch.Tensor | None) -> torch.Tensor:
    """`x` with the N places behind each row's left padding replaced by `values`."""
    values_GNK = values_GNK.to(x_BGTK.dtype)
    count = values_GNK.shape[1]
    if starts_B is None:
        return torch.cat([values_GNK.expand(len(x_BGTK), -1, -1, -1), x_BGTK[:, :, count:]], 2)
    places_BT = torch.arange(x_BGTK.shape[2], device=x_BGTK.device) - starts_B[:, None]
    is_virtual_BT = (places_BT >= 0) & (places_BT < count)
    spread_BGTK = values_GNK[:, places_BT.clamp(0, count - 1)].transpose(0, 1)
    return torch.where(is_virtual_BT[:, None, :, None], spread_BGTK, x_BGTK)
