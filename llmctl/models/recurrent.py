"""Layers of an LSTM or a GRU as a mixer, through torch's own kernels."""

from __future__ import annotations

import torch
from torch import nn

from llmctl.models import config_recurrent
from llmctl.models.context import Context

_State = tuple[torch.Tensor, ...]


class Recurrent(nn.Module):
    """h_t = cell(x_t, h_(t-1)); the parameters are those of one layer of torch.nn.LSTM or torch.nn.GRU."""

    compiles = False

    def __init__(self, spec: config_recurrent.Recurrent, d_model: int, layer: int, *_: object):
        super().__init__()
        self.spec, self.layer = spec, layer
        gates = spec.n_gates * d_model
        self.weight_ih, self.weight_hh = (nn.Parameter(torch.empty(gates, d_model)) for _ in range(2))
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.empty(gates)) for _ in range(2))

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        entry = None if context.cache is None else context.cache.layers[self.layer]
        state = self._no_state(x_BTD) if entry is None else tuple(t.to(x_BTD.dtype) for t in entry.tensors)
        positions_BT = context.positions_BT
        if positions_BT is None or (entry is not None and positions_BT.all()):
            y_BTD, state = self._run(x_BTD, state)
        else:
            y_BTD, state = self._run_texts(x_BTD, positions_BT, state, exact=entry is not None)
        if entry is not None:
            entry.replace(*state)
        return y_BTD

    def _run(self, x_BTD: torch.Tensor, state: _State) -> tuple[torch.Tensor, _State]:
        weights = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh]
        state = tuple(t.unsqueeze(0).contiguous() for t in state)
        how = (weights, True, 1, 0.0, self.training, False, True)  # biases, layers, dropout, one direction, batch first
        if self.spec.cell == "lstm":
            y_BTD, *state = torch.lstm(x_BTD, state, *how)
        else:
            y_BTD, *state = torch.gru(x_BTD, *state, *how)
        return y_BTD, tuple(t.squeeze(0) for t in state)

    def _run_texts(self, x_BTD, positions_BT, state: _State, exact: bool) -> tuple[torch.Tensor, _State]:
        """The texts within the rows, each from a state of its own: as a batch for every class of lengths.

        A class is filled up to its longest, so the state at the ends is right only where classes are `exact` lengths.
        """
        n_rows, n_tokens = positions_BT.shape
        is_start_BT = positions_BT == 0
        is_start_BT[:, 0] = True
        starts_S = is_start_BT.flatten().nonzero().squeeze(1)
        end = torch.full((1,), n_rows * n_tokens, device=starts_S.device)
        lengths_S = torch.cat([starts_S, end]).diff()
        x_ND = x_BTD.flatten(0, 1)
        places_N = torch.empty(len(x_ND), dtype=torch.long, device=x_ND.device)
        outputs, n_placed, ends = [], 0, [t.clone() for t in state]
        classes_S = lengths_S if exact else (lengths_S - 1).float().log2().floor()
        for which in classes_S.unique():
            chosen = classes_S == which
            firsts_C, lengths_C = starts_S[chosen], lengths_S[chosen]
            steps_L = torch.arange(int(lengths_C.max()), device=starts_S.device)
            index_CL = firsts_C[:, None] + steps_L.minimum(lengths_C[:, None] - 1)
            rows_C = firsts_C // n_tokens
            goes_on_C1 = (positions_BT.flatten()[firsts_C] > 0).unsqueeze(1)
            y_CLD, after = self._run(x_ND[index_CL], tuple(t[rows_C] * goes_on_C1 for t in state))
            outputs.append(y_CLD.flatten(0, 1))
            is_real_CL = steps_L < lengths_C[:, None]
            places_N[index_CL[is_real_CL]] = n_placed + is_real_CL.flatten().nonzero().squeeze(1)
            n_placed += index_CL.numel()
            is_last_C = (firsts_C + lengths_C) % n_tokens == 0
            for t, value in zip(ends, after):
                t[rows_C[is_last_C]] = value[is_last_C].to(t.dtype)
        return torch.cat(outputs)[places_N].unflatten(0, (n_rows, n_tokens)), tuple(ends)

    def _no_state(self, x_BTD: torch.Tensor) -> _State:
        return tuple(x_BTD.new_zeros(len(x_BTD), *shape) for shape in self.spec.state_shapes)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Biases zero; an LSTM's forget gates begin open, with a bias of one (Jozefowicz et al. 2015)."""
        for bias in (self.bias_ih, self.bias_hh):
            bias.zero_()
        if self.spec.cell == "lstm":
            width = self.spec.d_model
            self.bias_ih[width : 2 * width] = 1.0
