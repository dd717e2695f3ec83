"""A model layer by layer over calibration text: one layer's weights in memory, and what goes into it of every token.

The states between layers have the dtype of the layers; float32 ones that do not fit in `MOST_STATE_BYTES` become bfloat16.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llmctl.models.context import Context
from llmctl.models.ffn import Moe
from llmctl.models.linear import Linear
from llmctl.models.streaming import StreamedModel
from llmctl.models.transformer import Stack

TOKENS_AT_ONCE = 4096
MOST_STATE_BYTES = 1 << 30


class _Stop(Exception):
    """Everything asked for has been seen."""


@dataclass
class _State:
    x_BTD: torch.Tensor
    context: Context


Take = Callable[[str, torch.Tensor, torch.Tensor | None], None]
"""Given a Linear's path, what it reads [N, K], and what it reads in the model as it was (None where that does not run)."""


class Layer:
    """One block with its weights in memory; `name` is its path in the model. `plain` is the block of the model as it was."""

    def __init__(self, name: str, module: nn.Module, states: list[_State], plain: Layer | None = None):
        self.name, self.module, self.plain, self._states = name, module, plain, states

    def linears(self) -> dict[str, Linear]:
        """By their paths in the model."""
        return {
            f"{self.name}.{path}": module for path, module in self.module.named_modules() if isinstance(module, Linear)
        }

    def linears_of_experts(self) -> list[str]:
        """Those that read only the tokens which a router gives them."""
        experts = [path for path, module in self.module.named_modules() if isinstance(module, Moe)]
        return [name for name in self.linears() for path in experts if name.startswith(f"{self.name}.{path}.experts.")]

    def stages(self) -> list[list[list[str]]]:
        """The Linears in the order in which they run: in a stage, those that do not read each other; in a list, those that
        read the same. Experts that no token chose are missing."""
        order: list[tuple[str, torch.Tensor]] = []
        for state in self._states:
            self._run(state, lambda name, x: order.append((name, x)), self.linears())
            if state.x_BTD.shape[0] * state.x_BTD.shape[1] >= TOKENS_AT_ONCE // 2 or len(order) >= len(self.linears()):
                break
        stages: list[list[list[str]]] = []
        kinds: dict[str, int] = {}
        seen: set[str] = set()
        for position, (name, x) in enumerate(order):
            if name in seen:
                continue
            seen.add(name)
            kind = re.sub(r"\d+", "#", name)
            shares = position > 0 and x is order[position - 1][1]
            if kind not in kinds:
                if not shares:
                    stages.append([])
                kinds[kind] = len(stages) - 1
            stage = stages[kinds[kind]]
            if shares and stage and order[position - 1][0] in stage[-1]:
                stage[-1].append(name)
            else:
                stage.append([name])
        return stages

    def each_input(self, names: Collection[str], take: Take) -> None:
        """Give `take` what each of the named Linears reads, batch by batch."""
        for number in range(len(self._states)):
            plain: dict[str, torch.Tensor] = {}
            if self.plain is not None:
                self.plain._watch(number, names, plain.__setitem__)
            self._watch(number, names, lambda name, x_NK, plain=plain: take(name, x_NK, plain.pop(name, None)))

    def _watch(self, number: int, names: Collection[str], see: Callable[[str, torch.Tensor], None]) -> None:
        linears = self.linears()
        wanted = {name: linears[name] for name in names}
        self._run(self._states[number], lambda name, x: see(name, x.flatten(0, -2)), wanted, True)

    def advance(self) -> None:
        """From the layer's input to that of the next, by the weights that it has now."""
        for state in self._states:
            state.x_BTD = self.module(state.x_BTD.to(_dtype_of(self.module)), state.context).to(state.x_BTD.dtype)
        if self.plain is not None:
            self.plain.advance()

    def _run(self, state: _State, take: Callable[[str, torch.Tensor], None], linears, stops: bool = False) -> None:
        left = set(linears)

        def before(name: str):
            def hook(_, inputs):
                take(name, inputs[0])
                left.discard(name)
                if stops and not left:
                    raise _Stop

            return hook

        handles = [linear.register_forward_pre_hook(before(name)) for name, linear in linears.items()]
        try:
            self.module(state.x_BTD.to(_dtype_of(self.module)), state.context)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


class _Catcher(nn.Module):
    """In the place of the layers: what goes into the first of them."""

    def forward(self, x_BTD: torch.Tensor, context: Context):
        raise _Caught(x_BTD, context)


class _Caught(Exception):
    def __init__(self, x_BTD: torch.Tensor, context: Context):
        super().__init__()
        self.state = _State(x_BTD, context)


class _Replay(nn.Module):
    """In the place of an encoder's layers that have been through: what came out of them."""

    def __init__(self, x_BTD: torch.Tensor):
        super().__init__()
        self.x_BTD = x_BTD

    def forward(self, x_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return self.x_BTD.to(x_BTD.dtype)


class Layerwise:
    """The layers of a checkpoint in their order, each with what goes into it; `streamed` reads the weights.

    With `beside` the model as it was runs too, next to what `visit` makes of it.
    """

    def __init__(self, path: Path, ids_BT: torch.Tensor, dtype: torch.dtype, beside: bool = False):
        self.streamed = StreamedModel(path, dtype)
        rows = max(1, TOKENS_AT_ONCE // ids_BT.shape[1])
        self._batches = ids_BT.split(rows)
        width = self.streamed.config.d_model
        n_bytes = ids_BT.numel() * width * 4 * (2 if beside else 1)
        self._state_dtype = dtype if n_bytes <= MOST_STATE_BYTES else torch.bfloat16
        self._encoded: list[list[torch.Tensor]] = [[], []][: 2 if beside else 1]

    @property
    def n_layers(self) -> int:
        return sum(len(stack.layers) for stack in self.streamed.model.stacks())

    @torch.no_grad()
    def run(self, visit: Callable[[Layer], None]) -> Iterator[str]:
        """Call `visit` with every layer, and take its output with the weights that it leaves; yields their names."""
        model = self.streamed.model
        for stack in model.stacks():
            prefix = "" if stack is model else "encoder."
            runs = [
                [self._entering(stack, number, encoded) for number in range(len(self._batches))]
                for encoded in self._encoded
            ]
            for number, module in enumerate(stack.layers):
                name = f"{prefix}layers.{number}"
                with self.streamed.holding(module):
                    plain = Layer(name, copy.deepcopy(module), runs[1]) if len(runs) > 1 else None
                    layer = Layer(name, module, runs[0], plain)
                    visit(layer)
                    layer.advance()
                yield name
            if stack is not model:
                self._encoded = [[state.x_BTD for state in states] for states in runs]

    def _entering(self, stack: Stack, number: int, encoded: list[torch.Tensor]) -> _State:
        """What goes into the first layer of a stack, of one batch; behind an encoder that gave `encoded`."""
        model, ids_BT = self.streamed.model, self._batches[number]
        layers = {stack: nn.ModuleList([_Catcher()])}
        if stack is model and model.config.encoder is not None:
            layers[model.encoder] = nn.ModuleList([_Replay(encoded[number])])
        kept = {one: one.layers for one in layers}
        for one, others in layers.items():
            one.layers = others
        try:
            self.streamed.hidden(ids_BT)
        except _Caught as caught:
            state = caught.state
        finally:
            for one, others in kept.items():
                one.layers = others
        state.x_BTD = state.x_BTD.to(self._state_dtype)
        return state
