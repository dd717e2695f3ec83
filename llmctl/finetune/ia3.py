"""(IA)3 in a model: learned factors on what enters or leaves a Linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace as changed

import torch
from torch import nn

from llmctl.errors import UserError
from llmctl.finetune.methods import Ia3
from llmctl.finetune.sites import Site, adapted, by_their_name, choose, device_for, find_sites, replace, short_names


class ScaledLinear(nn.Module):
    """base(factors * x) or factors * base(x); `factors` float32, [in] or [out]."""

    def __init__(self, base: nn.Linear, scales_input: bool):
        super().__init__()
        self.base, self.scales_input = base, scales_input
        width = base.in_features if scales_input else base.out_features
        self.factors = nn.Parameter(torch.ones(width, device=device_for(base)))

    in_features = property(lambda self: self.base.in_features)
    out_features = property(lambda self: self.base.out_features)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        factors = self.factors.to(x_BTD.dtype)
        return self.base(x_BTD * factors) if self.scales_input else self.base(x_BTD) * factors


def attach(model: nn.Module, ia3: Ia3) -> None:
    """Wrap the modules that `ia3` names, with factors of one. Raises CalledWrongly for a name that fits no module."""
    sites = find_sites(model)
    for site in choose(sites, ia3.targets):
        replace(model, site.ours, lambda base: ScaledLinear(base, scales_input=False))
    for site in choose(sites, ia3.inputs):
        replace(model, site.ours, lambda base: ScaledLinear(base, scales_input=True))


def to_peft(model: nn.Module, ia3: Ia3) -> tuple[dict[str, torch.Tensor], Ia3]:
    """(tensors by Hugging Face module name, what adapter_config.json must say); parts without factors have ones."""
    sites = find_sites(model)
    modules = dict(adapted(model, ScaledLinear))
    tensors, outputs, inputs = {}, [], []
    for theirs, group in by_their_name(sites).items():
        parts = [modules.get(site.ours) for site in group]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        if present[0].scales_input:
            inputs.append(group[0])
            tensors[f"{theirs}.ia3_l"] = present[0].factors.detach()[None]
            continue
        outputs.append(group[0])
        factors = [torch.ones(site.rows) if part is None else part.factors.detach() for site, part in zip(group, parts)]
        tensors[f"{theirs}.ia3_l"] = torch.cat(factors)[:, None]
    return tensors, changed(ia3, targets=tuple(short_names(outputs, sites)), inputs=tuple(short_names(inputs, sites)))


@torch.no_grad()
def from_peft(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Wrap the modules that `tensors` speak of. Raises UserError for one that fits no module."""
    groups = by_their_name(find_sites(model))
    for name, factors in tensors.items():
        theirs = name.removesuffix(".ia3_l")
        if theirs not in groups:
            raise UserError(f"the adapter changes {theirs}, which this model does not have")
        scales_input = factors.shape[0] == 1
        group = groups[theirs]
        parts = factors.flatten().split([group[0].columns] if scales_input else [site.rows for site in group])
        for site, part in zip(group, parts):
            _fill(model, site, part, scales_input)


def _fill(model: nn.Module, site: Site, factors: torch.Tensor, scales_input: bool) -> None:
    module = replace(model, site.ours, lambda base: ScaledLinear(base, scales_input))
    if module.factors.shape != factors.shape:
        raise UserError(f"the adapter's factors of {site.theirs} do not fit it", hint="it was trained on another base")
    module.factors.copy_(factors)
