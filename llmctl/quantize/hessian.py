"""Second moments of what a layer's matrices read: the Hessian of their squared error, but for a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmctl.quantize.layerwise import Layer


class Hessians(dict):
    """mean(x^T x) over all tokens, float32 [K, K], by the name of the Linear; those that read nothing have none.

    `drifts` has mean((p - x)^T x) where p is what the Linear reads in the model as it was, if that runs beside and gives it
    the same tokens.
    """

    def __init__(self):
        super().__init__()
        self.drifts: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, layer: Layer, names: Sequence[str]) -> Hessians:
        """All calibration tokens through the layer once, as far as needed."""
        found, counts = cls(), dict.fromkeys(names, 0)
        chosen_by_router = set(layer.linears_of_experts())

        def take(name: str, x_NK: torch.Tensor, plain_NK: torch.Tensor | None) -> None:
            total = counts[name] + len(x_NK)
            if not total:
                return
            kept = counts[name] / total
            if plain_NK is not None and name not in chosen_by_router:
                # a small difference, which 8 bits of mantissa tell well enough
                moment_KK = ((plain_NK - x_NK).mT @ x_NK).float() / total
                found.drifts[name] = moment_KK.add_(found.drifts.get(name, 0.0), alpha=kept)
            x_NK = x_NK.float()
            if name not in found:
                found[name] = x_NK.new_zeros(x_NK.shape[1], x_NK.shape[1])
            found[name].mul_(kept).addmm_(x_NK.mT, x_NK, alpha=1 / total)
            counts[name] = total

        layer.each_input(names, take)
        return found
