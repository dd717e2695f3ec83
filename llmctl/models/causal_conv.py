"""The short convolution in front of a state space, along the text and for each channel alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class CausalConv(nn.Module):
    """y_t = bias + the sum over lags of weight * x_(t - lag), for `width` lags from 0; what lies before the text is 0.

    The sum over shifted copies is as fast as torch's grouped convolution, and a lag that would reach into another document
    is a mask.
    """

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(
        self, x_BTC: torch.Tensor, positions_BT: torch.Tensor | None, window_BWC: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [B, T, C], and the inputs [B, width - 1, C] that the next tokens will see.

        `window_BWC` are those of the tokens before; a token at position p sees p tokens in front of it at most.
        """
        n_tokens, width = x_BTC.shape[1], self.weight.shape[2]
        if window_BWC is None:
            x_BTC = F.pad(x_BTC, (0, 0, width - 1, 0))
        else:
            x_BTC = torch.cat([window_BWC.to(x_BTC.dtype), x_BTC], 1)
        taps = self.weight.float().squeeze(1).mT
        y_BTC = 0.0 if self.bias is None else self.bias.float()
        for lag in range(width):
            past_BTC = x_BTC[:, width - 1 - lag :][:, :n_tokens].float()
            if lag and positions_BT is not None:
                past_BTC = past_BTC * (positions_BT >= lag).unsqueeze(-1)
            y_BTC = y_BTC + past_BTC * taps[width - 1 - lag]
        return y_BTC, x_BTC[:, n_tokens:]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Uniform within 1 / sqrt(width), as torch's convolutions begin; bias zero."""
        bound = self.weight.shape[2] ** -0.5
        self.weight.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.zero_()


@torch.no_grad()
def draw_step_sizes(bias: torch.Tensor, spec, generator: torch.Generator) -> None:
    """Biases whose softplus is spread evenly, on a logarithmic scale, over the spec's `dt_range` (arXiv:2312.00752, 3.6)."""
    low, high = spec.dt_range
    dt = low * (high / low) ** torch.rand(bias.shape, generator=generator)
    dt.clamp_(min=spec.dt_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))
