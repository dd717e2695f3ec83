"""Feed-forward layers."""

from __future__ import annotations

import functools

import torch
from torch import nn

from llmctl.models import config
from llmctl.models.linear import Linear
from llmctl.ops.activation import KINDS, activate

ACTIVATIONS = {kind: functools.partial(activate, kind) for kind in KINDS}


class Mlp(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, spec: config.Mlp, d_model: int):
        super().__init__()
        self.up_proj = Linear(d_model, spec.d_ff, bias=spec.bias)
        self.down_proj = Linear(spec.d_ff, d_model, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x_BTD)))


class GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), arXiv:2002.05202."""

    def __init__(self, spec: config.GatedMlp, d_model: int):
        super().__init__()
        self.gate_proj = Linear(d_model, spec.d_ff, bias=spec.bias)
        self.up_proj = Linear(d_model, spec.d_ff, bias=spec.bias)
        self.down_proj = Linear(spec.d_ff, d_model, bias=spec.bias)
        self.activation = ACTIVATIONS[spec.activation]

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_BTD), self.up_proj(x_BTD)))


class Moe(nn.Module):
    """Each token through the experts that its router scores highest, weighted by the router's softmax."""

    compiles = False  # how many tokens an expert gets shows only as it runs

    def __init__(self, spec: config.Moe, d_model: int):
        super().__init__()
        self.spec = spec
        self.router = Linear(d_model, spec.n_experts, bias=False)
        self.experts = nn.ModuleList(GatedMlp(spec.expert, d_model) for _ in range(spec.n_experts))
        self.routing: tuple[torch.Tensor, torch.Tensor] | None = None
        """In training, of the last forward: share of the tokens that each expert got, and its mean probability, [E]."""

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BTD.flatten(0, -2)
        probabilities_NE = self.router(x_ND).float().softmax(-1)
        weights_NC, chosen_NC = probabilities_NE.topk(self.spec.top_k, dim=-1)
        if self.spec.normalize:
            weights_NC = weights_NC / weights_NC.sum(-1, keepdim=True)
        counts_E = torch.bincount(chosen_NC.flatten(), minlength=self.spec.n_experts)
        # A token and one of its choices make a pair; in the order of the experts, each has its pairs side by side.
        pairs_M = chosen_NC.flatten().argsort(stable=True)
        y_ND = torch.zeros_like(x_ND)
        for expert, some_M in zip(self.experts, pairs_M.split(counts_E.tolist())):
            if len(some_M) or self.training:  # in training every expert gets a gradient, if only zeros
                rows_M, weights_M1 = some_M // self.spec.top_k, weights_NC.flatten()[some_M, None]
                y_ND = y_ND.index_add(0, rows_M, (expert(x_ND[rows_M]) * weights_M1).to(y_ND.dtype))
        if self.training:
            self.routing = counts_E / len(x_ND), probabilities_NE.mean(0)
        return y_ND.view_as(x_BTD)


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(layer, Moe) for layer in model.modules())


def balance_loss(model: nn.Module) -> torch.Tensor | None:
    """How unevenly the last forward in training used the experts, times its coefficient; None without experts.

    As transformers has it: n_experts * sum over experts of (share of tokens * mean probability), both over the routers of
    all layers together (arXiv:2101.03961, equation 4). Taken once: what it is made of is let go.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Moe) and layer.routing is not None]
    if not layers:
        return None
    shares_LE, probabilities_LE = (torch.stack(parts) for parts in zip(*(layer.routing for layer in layers)))
    for layer in layers:
        layer.routing = None
    spec = layers[0].spec
    return spec.balance_loss * spec.n_experts * (shares_LE.mean(0) @ probabilities_LE.mean(0))


def build(spec: config.Mlp | config.GatedMlp | config.Moe, d_model: int) -> nn.Module:
    return {config.Mlp: Mlp, config.GatedMlp: GatedMlp, config.Moe: Moe}[type(spec)](spec, d_model)
