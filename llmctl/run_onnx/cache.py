"""What an exported decoder remembers of the tokens that it has read."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from llmctl.run_onnx.graph_session import GraphSession


class Rows:
    """How many real tokens each row of a batch has read, and where padding stands: in front of the rows or behind them.

    Behind them each row is as long as its text; in front, all are as long as the longest.
    """

    def __init__(self, lengths: Iterable[int], pads_right: bool):
        self.lengths_B = torch.tensor(list(lengths))
        self.pads_right, self.n_read = pads_right, 0
        self.starts_B = torch.zeros_like(self.lengths_B) if pads_right else self.lengths_B.max() - self.lengths_B
        self._is_first = True

    def counts_B(self, n_tokens: int) -> torch.Tensor:
        """Real tokens of each row, those included that are about to be read."""
        return self.lengths_B.clamp(max=n_tokens) if self._is_first else self.lengths_B + n_tokens

    def mask_BS(self, n_tokens: int) -> torch.Tensor:
        """1 at the real tokens read so far and at those about to be, int64."""
        total = self.n_read + n_tokens
        steps = torch.arange(total)
        if self.pads_right:
            return (steps < self.counts_B(n_tokens)[:, None]).long()
        return (steps >= self.starts_B[:, None]).long()

    def new_mask_BT(self, n_tokens: int) -> torch.Tensor:
        """1 at the real ones of the tokens about to be read, int64; padding behind a row comes with its first tokens."""
        if self.pads_right and self._is_first:
            return self.mask_BS(n_tokens)
        return torch.ones(len(self.lengths_B), n_tokens, dtype=torch.long)

    def positions_BT(self, n_tokens: int) -> torch.Tensor:
        """Of the tokens about to be read, within their texts."""
        steps = torch.arange(n_tokens)
        if self.pads_right:
            first_B = torch.zeros_like(self.lengths_B) if self._is_first else self.lengths_B
            return steps + first_B[:, None]
        return (self.n_read + steps - self.starts_B[:, None]).clamp(min=0)

    def last_B(self, n_tokens: int) -> torch.Tensor:
        """Which of them is the last of each row."""
        if self.pads_right and self._is_first:
            return self.counts_B(n_tokens) - 1
        return torch.full_like(self.lengths_B, n_tokens - 1)

    def advance(self, n_tokens: int) -> None:
        self.lengths_B = self.counts_B(n_tokens)
        self.n_read, self._is_first = self.n_read + n_tokens, False

    def select(self, rows: torch.Tensor) -> None:
        self.lengths_B, self.starts_B = self.lengths_B[rows], self.starts_B[rows]

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens of the only row."""
        self.n_read, self.lengths_B = length, torch.tensor([length])


class SharedBuffers:
    """Keys and values [B, G, capacity, K] that the graph reads and writes in place: what comes in goes out."""

    def __init__(self, graph: GraphSession, names: dict[str, str], batch_size: int, capacity: int):
        """`names` of inputs and what the graph gives them out as."""
        self.graph, self.names = graph, names
        self.tensors = {}
        for name in names:
            dtype, (_, heads, _, head_dim) = graph.inputs[name]
            self.tensors[name] = torch.zeros(batch_size, heads, capacity, head_dim, dtype=dtype, device=graph.device)

    def bind(self, binding, n_new: int) -> None:
        for name, tensor in self.tensors.items():
            self.graph.bind_input(binding, name, tensor)
            self.graph.bind_output(binding, self.names[name], tensor)

    def advance(self) -> None:
        """All is in place already."""

    def select(self, rows: torch.Tensor) -> None:
        self.tensors = {name: tensor[rows] for name, tensor in self.tensors.items()}

    def cut(self, length: int, capacity: int) -> None:
        """Room for `capacity`; what lies behind `length` is written over when it comes."""
        room = capacity - next(iter(self.tensors.values())).shape[2]
        if room > 0:
            self.tensors = {name: F.pad(tensor, (0, 0, 0, room)) for name, tensor in self.tensors.items()}


class GrowingBuffers:
    """Keys and values [B, G, length, K] that the graph gives out longer by the new tokens, or states [B, D].

    They lie in two sets of memory in turn: one is read while the other is written.
    """

    def __init__(self, graph: GraphSession, names: dict[str, str], batch_size: int, capacity: int):
        self.graph, self.names, self.batch_size, self.length = graph, names, batch_size, 0
        self.capacity, self._grown = capacity, 0
        self._memory = {name: [self._room(name), self._room(name)] for name in names}

    def bind(self, binding, n_new: int) -> None:
        self._grown = self.length + n_new
        for name, (old, new) in self._memory.items():
            self.graph.bind_input(binding, name, self._view(name, old, self.length))
            self.graph.bind_output(binding, self.names[name], self._view(name, new, self._grown))

    def advance(self) -> None:
        self.length = self._grown
        self._memory = {name: [new, old] for name, (old, new) in self._memory.items()}

    def select(self, rows: torch.Tensor) -> None:
        kept = {name: self._view(name, old, self.length)[rows] for name, (old, _) in self._memory.items()}
        self.batch_size = len(rows)
        self._take(kept)

    def cut(self, length: int, capacity: int) -> None:
        """Keep `length` tokens, with room for `capacity`."""
        kept = {name: self._view(name, old, self.length)[:, :, :length] for name, (old, _) in self._memory.items()}
        self.length, self.capacity = length, max(capacity, self.capacity)
        self._take(kept)

    def _take(self, kept: dict[str, torch.Tensor]) -> None:
        """In memory of its own: another cache may hold what was there."""
        fresh = {}
        for name, tensor in kept.items():
            old, new = self._room(name), self._room(name)
            old[: tensor.numel()] = tensor.flatten()
            fresh[name] = [old, new]
        self._memory = fresh

    def _room(self, name: str) -> torch.Tensor:
        dtype, (_, *rest) = self.graph.inputs[name]
        count = self.batch_size * rest[-1] * (rest[0] * self.capacity if len(rest) > 1 else 1)
        return torch.zeros(count, dtype=dtype, device=self.graph.device)

    def _view(self, name: str, memory: torch.Tensor, length: int) -> torch.Tensor:
        _, (_, *rest) = self.graph.inputs[name]
        shape = (self.batch_size, rest[0], length, rest[-1]) if len(rest) > 1 else (self.batch_size, rest[0])
        return memory[: torch.Size(shape).numel()].view(shape)


def cached_names(graph: GraphSession) -> dict[str, str]:
    """The inputs that hold a cache, and the outputs that hold it afterwards."""
    pairs = {"past_key_values": "present", "past_states": "present_states"}
    return {
        name: pairs[name.split(".")[0]] + name[name.index(".") :] for name in graph.inputs if name.startswith("past_")
    }
