"""Bottleneck adapters in a model: a small network beside or behind the mixer and the feed-forward layer of every block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.errors import UserError
from llmctl.finetune.methods import Bottleneck
from llmctl.finetune.sites import adapted
from llmctl.ops.linear import linear


class BottleneckBranch(nn.Module):
    """y + scale up(gelu(down(y))) with y = base(x), or with x in the small network when it is parallel.

    down [width, D] and up [D, width] are float32; up starts at zero, so that at first nothing changes.
    """

    def __init__(self, base: nn.Module, d_model: int, spec: Bottleneck, device: torch.device):
        super().__init__()
        self.base, self.parallel, self.scale = base, spec.parallel, spec.scale
        self.down = nn.Linear(d_model, spec.width, device=device)
        self.up = nn.Linear(spec.width, d_model, device=device)

    def forward(self, x_BTD: torch.Tensor, *rest) -> torch.Tensor:
        y_BTD = self.base(x_BTD, *rest)
        source_BTD = x_BTD if self.parallel else y_BTD
        low_BTR = F.gelu(_linear(self.down, source_BTD))
        return y_BTD + self.scale * _linear(self.up, low_BTR)


def attach(model: nn.Module, spec: Bottleneck, seed: int = 0) -> None:
    """Wrap the branches that `spec.places` names in every block of the model."""
    generator = torch.Generator().manual_seed(seed)
    d_model, device = model.config.d_model, model.head_weight.device
    for name, owner in list(model.named_modules()):
        for place in spec.places:
            if name.rpartition(".")[2].isdigit() and getattr(owner, place, None) is not None:
                branch = BottleneckBranch(getattr(owner, place), d_model, spec, device)
                _initialize(branch, generator)
                setattr(owner, place, branch)


def to_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """`layers.N.mixer.down.weight` and so on: our names, since no other tool has the method."""
    tensors = {}
    for name, branch in adapted(model, BottleneckBranch):
        for part in ("down", "up"):
            for kind, tensor in getattr(branch, part).named_parameters():
                tensors[f"{name}.{part}.{kind}"] = tensor.detach()
    return tensors


@torch.no_grad()
def from_tensors(model: nn.Module, spec: Bottleneck, tensors: Mapping[str, torch.Tensor]) -> None:
    attach(model, spec)
    for name, tensor in to_tensors(model).items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UserError(
                f"the adapter has no {name} of shape {list(tensor.shape)}", "it was trained on another base"
            )
        tensor.copy_(tensors[name])


@torch.no_grad()
def _initialize(branch: BottleneckBranch, generator: torch.Generator) -> None:
    branch.down.weight.normal_(0.0, branch.down.in_features**-0.5, generator=generator)
    for tensor in (branch.down.bias, branch.up.weight, branch.up.bias):
        tensor.zero_()


def _linear(layer: nn.Linear, x_BTD: torch.Tensor) -> torch.Tensor:
    return linear(x_BTD, layer.weight.to(x_BTD.dtype), layer.bias.to(x_BTD.dtype))
