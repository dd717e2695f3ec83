"""The Mamba-2 mixer: heads with one decay each, so that a chunk of tokens is a few matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llmctl.models import config_recurrent
from llmctl.models.causal_conv import CausalConv, draw_step_sizes
from llmctl.models.context import Context
from llmctl.models.ffn import ACTIVATIONS
from llmctl.models.linear import Linear
from llmctl.ops.ssd import chunked_scan


class GatedRMSNorm(nn.Module):
    """RMSNorm of x * silu(z) within each of `n_groups` parts of the channels, in float32."""

    def __init__(self, width: int, n_groups: int, eps: float):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BTI: torch.Tensor, z_BTI: torch.Tensor) -> torch.Tensor:
        gated_BTGI = (x_BTI.float() * F.silu(z_BTI.float())).unflatten(-1, (self.n_groups, -1))
        normal_BTGI = F.rms_norm(gated_BTGI, gated_BTGI.shape[-1:], eps=self.eps)
        return (normal_BTGI.flatten(-2) * self.weight.float()).to(z_BTI.dtype)


class Mamba2(nn.Module):
    """out(norm(scan(x, B, C), z)) with z, conv(x, B, C), dt = in(input); arXiv:2405.21060, figure 6."""

    def __init__(self, spec: config_recurrent.Mamba2, d_model: int, layer: int, *_: object):
        super().__init__()
        self.spec, self.layer, self.activation = spec, layer, ACTIVATIONS[spec.activation]
        self.in_proj = Linear(d_model, spec.d_inner + spec.conv_channels + spec.n_heads, bias=spec.bias)
        self.conv1d = CausalConv(spec.conv_channels, spec.conv_width, spec.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads))
        self.A_log = nn.Parameter(torch.empty(spec.n_heads))
        self.D = nn.Parameter(torch.empty(spec.n_heads))
        self.norm = GatedRMSNorm(spec.d_inner, spec.n_groups, spec.norm_eps)
        self.out_proj = Linear(spec.d_inner, d_model, bias=spec.bias)

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        spec = self.spec
        z_BTI, x_BTC, dt_BTH = self.in_proj(x_BTD).split([spec.d_inner, spec.conv_channels, spec.n_heads], -1)
        entry = None if context.cache is None else context.cache.layers[self.layer]
        window_BWC, state_BHPN = (None, None) if entry is None else entry.tensors
        x_BTC, window_BWC = self.conv1d(x_BTC, context.positions_BT, window_BWC)
        x_BTC = self.activation(x_BTC).to(z_BTI.dtype).float()
        x_BTI, b_BTM, c_BTM = x_BTC.split([spec.d_inner, *[spec.n_groups * spec.d_state] * 2], -1)
        x_BTHP = x_BTI.unflatten(-1, (spec.n_heads, -1))
        y_BTHP, state_BHPN = chunked_scan(
            x_BTHP,
            F.softplus(dt_BTH.float() + self.dt_bias.float()).clamp(*spec.dt_limit),
            -self.A_log.float().exp(),
            b_BTM.unflatten(-1, (spec.n_groups, -1)),
            c_BTM.unflatten(-1, (spec.n_groups, -1)),
            config_recurrent.SSD_CHUNK,
            positions_BT=context.positions_BT,
            state_BHPN=state_BHPN,
        )
        if entry is not None:
            entry.replace(window_BWC, state_BHPN)
        y_BTHP = y_BTHP + x_BTHP * self.D.float().unsqueeze(-1)
        return self.out_proj(self.norm(y_BTHP.flatten(-2), z_BTI))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """As published: A uniform in [-16, -1], D one, step sizes spread over the spec's range."""
        self.A_log.copy_(self.A_log.uniform_(1.0, 16.0, generator=generator).log())
        self.D.fill_(1.0)
        draw_step_sizes(self.dt_bias, self.spec, generator)
