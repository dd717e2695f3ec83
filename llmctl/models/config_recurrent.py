"""Mixers that carry a state along the text instead of looking back at it, as plain values: the other part of `config`.

`state_shapes` are the tensors that such a layer carries for one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SSD_CHUNK = 64
"""Tokens that a Mamba-2 layer takes through one set of matrix products; the result does not depend on it."""


@dataclass(frozen=True)
class Mamba:
    """Selective state space (arXiv:2312.00752): each of `d_inner` channels has a state of `d_state` numbers.

    `dt_range` and `dt_floor` bound the step sizes of a fresh model.
    """

    d_inner: int
    d_state: int
    dt_rank: int
    conv_width: int = 4
    bias: bool = False
    conv_bias: bool = True
    activation: str = "silu"
    dt_range: tuple[float, float] = (1e-3, 0.1)
    dt_floor: float = 1e-4

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The last inputs of the convolution, and the state."""
        return (self.conv_width - 1, self.d_inner), (self.d_state, self.d_inner)

    def parameters(self, d_model: int) -> int:
        inner = self.d_inner
        total = 3 * d_model * inner + (2 * inner + d_model) * self.bias
        total += inner * (self.conv_width + self.conv_bias)
        total += inner * (self.dt_rank + 2 * self.d_state) + (self.dt_rank + 1) * inner
        return total + inner * self.d_state + inner

    def sequence_flops(self, seq_len: int) -> float:
        """Per token and forward pass: decay, input, update (2) and output (2) of every number of the state."""
        return 6 * self.d_inner * self.d_state


@dataclass(frozen=True)
class Mamba2:
    """State space duality (arXiv:2405.21060): heads of `head_dim` channels share one decay, groups of heads share B and C.

    The output is normalized within each group (RMS, `norm_eps`) after the gate. `dt_limit` clamps the step sizes,
    `dt_range` and `dt_floor` bound those of a fresh model.
    """

    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int = 1
    conv_width: int = 4
    bias: bool = False
    conv_bias: bool = True
    activation: str = "silu"
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dt_range: tuple[float, float] = (1e-3, 0.1)
    dt_floor: float = 1e-4

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        """x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return (self.conv_width - 1, self.conv_channels), (self.n_heads, self.head_dim, self.d_state)

    def parameters(self, d_model: int) -> int:
        projected = self.d_inner + self.conv_channels + self.n_heads
        total = d_model * (projected + self.d_inner) + (projected + d_model) * self.bias
        return total + self.conv_channels * (self.conv_width + self.conv_bias) + 3 * self.n_heads + self.d_inner

    def sequence_flops(self, seq_len: int) -> float:
        """Per token and forward pass: the products within a chunk, and those with the state."""
        chunk = min(seq_len, SSD_CHUNK)
        return 2 * chunk * (self.n_groups * self.d_state + self.d_inner) + 4 * self.d_inner * self.d_state


@dataclass(frozen=True)
class Recurrent:
    """One layer of an LSTM (Hochreiter and Schmidhuber 1997) or a GRU (arXiv:1406.1078), as wide as the model."""

    cell: Literal["lstm", "gru"]
    d_model: int

    @property
    def n_gates(self) -> int:
        return {"lstm": 4, "gru": 3}[self.cell]

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.d_model,),) * {"lstm": 2, "gru": 1}[self.cell]

    def parameters(self, d_model: int) -> int:
        return self.n_gates * d_model * (2 * d_model + 2)

    def sequence_flops(self, seq_len: int) -> float:
        """None beside the products with its weights."""
        return 0.0
