"""Second moments of what a layer's matrices read: the Hessian of their squared error, but for a factor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmctl.quantize.layerwise import Layer


class Hessians(dict):
    """mean(x^T x) over all tokens, float32 [K, K], by the name of the Linear; those that read nothing have none."""

    @classmethod
    def of(cls, layer: Layer, names: Sequence[str]) -> Hessians:
        """All calibration tokens through the layer once, as far as needed."""
        found, counts = cls(), dict.fromkeys(names, 0)

        def take(name: str, x_NK: torch.Tensor) -> None:
            x_NK = x_NK.float()
            if name not in found:
                found[name] = x_NK.new_zeros(x_NK.shape[1], x_NK.shape[1])
            total = counts[name] + len(x_NK)
            if total:
                found[name].mul_(counts[name] / total).addmm_(x_NK.mT, x_NK, alpha=1 / total)
            counts[name] = total

        layer.each_input(names, take)
        return found
