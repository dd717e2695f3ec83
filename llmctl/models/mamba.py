"""The Mamba mixer: a state space whose step size, input and output weights each token chooses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import config_recurrent
from llmctl.models.causal_conv import CausalConv, draw_step_sizes
from llmctl.models.context import Context
from llmctl.models.ffn import ACTIVATIONS
from llmctl.models.linear import Linear
from llmctl.ops.linear import linear
from llmctl.ops.selective_scan import selective_scan


class SelectiveScan(nn.Module):
    """`ops.selective_scan` where compilers see it, and pass by."""

    compiles = False
    forward = staticmethod(selective_scan)


class Mamba(nn.Module):
    """out(scan(activation(conv(x))) * silu(z)) with x, z = in(input); arXiv:2312.00752, figure 3."""

    def __init__(self, spec: config_recurrent.Mamba, d_model: int, layer: int, *_: object):
        super().__init__()
        self.spec, self.layer, self.activation = spec, layer, ACTIVATIONS[spec.activation]
        self.in_proj = Linear(d_model, 2 * spec.d_inner, bias=spec.bias)
        self.conv1d = CausalConv(spec.d_inner, spec.conv_width, spec.conv_bias)
        self.x_proj = Linear(spec.d_inner, spec.dt_rank + 2 * spec.d_state, bias=False)
        self.dt_proj = Linear(spec.dt_rank, spec.d_inner)
        self.A_log = nn.Parameter(torch.empty(spec.d_inner, spec.d_state))
        self.D = nn.Parameter(torch.empty(spec.d_inner))
        self.scan = SelectiveScan()
        self.out_proj = Linear(spec.d_inner, d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        x_BTI, z_BTI = self.in_proj(x_BTD).chunk(2, -1)
        positions_BT = context.positions_BT
        entry = None if context.cache is None else context.cache.layers[self.layer]
        window_BWI, state_BNI = (None, None) if entry is None else entry.tensors
        x_BTI, window_BWI = self.conv1d(x_BTI, positions_BT, window_BWI)
        x_BTI = self.activation(x_BTI).to(z_BTI.dtype)
        dt_BTR, b_BTN, c_BTN = self.x_proj(x_BTI).split([self.spec.dt_rank, *[self.spec.d_state] * 2], -1)
        dt_BTI = linear(dt_BTR, self.dt_proj.weight).float() + self.dt_proj.bias.float()
        y_BTI, state_BNI = self.scan(
            x_BTI.float(),
            F.softplus(dt_BTI),
            -self.A_log.float().exp().mT.contiguous(),
            b_BTN.float(),
            c_BTN.float(),
            starts_BT=None if positions_BT is None else positions_BT == 0,
            state_BND=state_BNI,
        )
        if entry is not None:
            entry.replace(window_BWI, state_BNI)
        y_BTI = (y_BTI + x_BTI.float() * self.D.float()) * F.silu(z_BTI)
        return self.out_proj(y_BTI.to(z_BTI.dtype))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """As published: A = -1, -2, ... along the state, D one, step sizes spread over the spec's range."""
        self.A_log.copy_(torch.arange(1, self.spec.d_state + 1, dtype=torch.float32).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        bound = self.spec.dt_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound, generator=generator)
        draw_step_sizes(self.dt_proj.bias, self.spec, generator)
