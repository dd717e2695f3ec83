"""What a model remembers of the tokens that it has read, so that each new one costs one step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from llmctl.models import rope_scaling
from llmctl.models.config import Attention, Mamba, Mamba2, ModelConfig, Recurrent
from llmctl.models.memory import Memory
from llmctl.ops.cached_attention import InBytes

if TYPE_CHECKING:
    from llmctl.models.decode_graph import DecodeGraph
    from llmctl.models.decode_step import DecodeStep


class Cache:
    """One entry per layer, of the kind that the layer's mixer needs; `dtype` int8 keeps keys and values in bytes.

    Layers write at `length`; the stack alone advances it, once per forward. With left-padded rows, `starts_B` (int64) is the
    number of padding slots in front of each row: those are never attended to and positions count from behind them.
    `step` runs the model in one call where it can (see `decode_step`, and `decode_graph` of CUDA devices).
    `memory` is what an encoder made of each row's source. Where the angles of a rope jump at some length (LongRoPE), the token
    ids are kept too: a row that outgrows it is read again, or its keys would have both kinds.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        starts_B: torch.Tensor | None = None,
        memory: Memory | None = None,
    ):
        self.length, self.capacity, self.starts_B, self.memory = 0, capacity, starts_B, memory
        self._switch_length = rope_scaling.switch_length(config)
        self._ids_BT: torch.Tensor | None = None
        self.step: DecodeStep | DecodeGraph | None = None
        self.layers = [
            _new_entry(config.block(i).mixer, batch_size, capacity, dtype, device) for i in range(config.n_layers)
        ]

    def to_read(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """What a model must read to go on with these ids: they alone, or, from now on, all of the text again."""
        if self._switch_length is None:
            return ids_BT
        self._ids_BT = ids_BT if self._ids_BT is None else torch.cat([self._ids_BT, ids_BT], 1)
        read = self.length - (torch.zeros(1) if self.starts_B is None else self.starts_B)
        outgrows = (read > 0) & (read <= self._switch_length) & (read + ids_BT.shape[1] > self._switch_length)
        if not outgrows.any():
            return ids_BT
        self.length = 0
        return self._ids_BT

    def cut(self, length: int, capacity: int) -> bool:
        """Forget all but the first `length` tokens and make room for `capacity`; False, and unchanged, where it cannot.

        Keys and values can be forgotten one by one, a recurrent layer's state cannot. Angles that jump at some length
        (LongRoPE) are those of the longer text, so that a text cut to below it is to be read again.
        """
        has_state = any(isinstance(entry, State) for entry in self.layers)
        jumps = self._switch_length is not None and length <= self._switch_length < max(self.length, capacity)
        if length > self.length or (length < self.length and has_state) or jumps:
            return False
        self.length = length
        if self._ids_BT is not None:
            self._ids_BT = self._ids_BT[:, :length]
        if capacity > self.capacity:
            for entry in self.layers:
                entry.grow(capacity)
            self.capacity = capacity
        return True

    def select(self, rows: torch.Tensor) -> None:
        """Keep only these rows of the batch (finished sequences leave; a beam is reordered)."""
        for entry in self.layers:
            entry.select(rows)
        if self.starts_B is not None:
            self.starts_B = self.starts_B[rows]
        if self._ids_BT is not None:
            self._ids_BT = self._ids_BT[rows]
        if self.memory is not None:
            self.memory.select(rows)

    def branch(self, rows: torch.Tensor) -> Cache:
        """A copy that holds these rows (one may come several times) and goes its own way; this one stays as it is."""
        other = copy.copy(self)
        other.layers, other.memory = [copy.copy(entry) for entry in self.layers], copy.copy(self.memory)
        other.select(rows)
        return other

    def begin_with(self, prefix: Cache, length: int, counts: Sequence[int]) -> None:
        """Let this fresh cache hold `length` positions, of which row b's last `counts[b]` are the first of `prefix`.

        `prefix` has one row without padding, and layers of keys and values only.
        """
        for entry, source in zip(self.layers, prefix.layers, strict=True):
            entry.copy_from(source, length, counts)
        self.length = length


class KeyValues:
    """Keys and values, preallocated: [B, G, capacity, K] twice."""

    NAMES: tuple[str, ...] = ("keys", "values")

    def __init__(self, spec: Attention, batch_size: int, capacity: int, dtype: torch.dtype, device):
        shape = (batch_size, spec.n_kv_heads, capacity, spec.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, at: int, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T entries at `at` and return all keys and values up to them, as views."""
        end, capacity = at + k_BGTK.shape[2], self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"the cache holds {capacity} positions; {end} were asked of it")
        for to, new in zip(self.tensors, self._stored(k_BGTK, v_BGTK), strict=True):
            to[:, :, at:end] = new
        return self._up_to(end, k_BGTK.dtype)

    def put(
        self, at_1: torch.Tensor, k_BG1K: torch.Tensor, v_BG1K: torch.Tensor, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one entry where a tensor says, and return all keys and values in front of `end`."""
        for to, new in zip(self.tensors, self._stored(k_BG1K, v_BG1K), strict=True):
            to.index_copy_(2, at_1, new)
        return self._up_to(end, k_BG1K.dtype)

    def _stored(self, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the `tensors` hold of them."""
        return k_BGTK.to(self.keys.dtype), v_BGTK.to(self.values.dtype)

    def _up_to(self, end: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:, :, :end].to(dtype), self.values[:, :, :end].to(dtype)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, name) for name in self.NAMES)

    def grow(self, capacity: int) -> None:
        more = capacity - self.keys.shape[2]
        self._change(lambda tensor: torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 3) + (0, more)))

    def copy_from(self, other: KeyValues, end: int, counts: Sequence[int]) -> None:
        """Row b's entries up to `end` are the first `counts[b]` of the one row of `other`."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            for row, count in enumerate(counts):
                mine[row, :, end - count : end] = theirs[0, :, :count]

    def select(self, rows: torch.Tensor) -> None:
        self._change(lambda tensor: tensor[rows])

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name in self.NAMES:
            setattr(self, name, change(getattr(self, name)))


class QuantizedKeyValues(KeyValues):
    """The same in bytes, (byte - 128) * scale, with a scale [B, G, capacity] for each token and head: the largest of its
    elements is 127 times that. One with NaN or infinity has the scale NaN. What `append` returns is `InBytes`, too."""

    NAMES = (*KeyValues.NAMES, "key_scales", "value_scales")

    def __init__(self, spec: Attention, batch_size: int, capacity: int, dtype: torch.dtype, device):
        super().__init__(spec, batch_size, capacity, torch.uint8, device)
        self.key_scales = torch.zeros(self.keys.shape[:3], device=device)
        self.value_scales = torch.zeros_like(self.key_scales)

    def _stored(self, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (keys, key_scales), (values, value_scales) = _encoded(k_BGTK), _encoded(v_BGTK)
        return keys, values, key_scales, value_scales

    def _up_to(self, end: int, dtype: torch.dtype) -> tuple[InBytes, InBytes]:
        keys, values, key_scales, value_scales = (tensor[:, :, :end] for tensor in self.tensors)
        return InBytes(keys, key_scales), InBytes(values, value_scales)


def _encoded(x_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes like x, and scales [B, G, T]."""
    x_BGTK = x_BGTK.float()
    scales = x_BGTK.abs().amax(-1) / 127
    is_usable = scales.isfinite() & (scales >= torch.finfo(torch.float32).tiny)
    codes = (x_BGTK / scales[..., None]).round().masked_fill(~is_usable[..., None], 0.0)
    scales = torch.where(is_usable, scales, torch.where(scales.isfinite(), 0.0, math.nan))
    return (codes + 128).to(torch.uint8), scales


class State:
    """What a recurrent layer carries, whatever the length: float32 `tensors` [B, ...] of the spec's `state_shapes`."""

    def __init__(self, spec: Mamba | Mamba2 | Recurrent, batch_size: int, capacity: int, dtype: torch.dtype, device):
        self.tensors = tuple(torch.zeros(batch_size, *shape, device=device) for shape in spec.state_shapes)

    def replace(self, *tensors: torch.Tensor) -> None:
        self.tensors = tuple(tensor.float() for tensor in tensors)

    def grow(self, capacity: int) -> None:
        """A state has one size."""

    def select(self, rows: torch.Tensor) -> None:
        self.tensors = tuple(tensor[rows] for tensor in self.tensors)


_ENTRIES = {Attention: KeyValues, Mamba: State, Mamba2: State, Recurrent: State}


def _new_entry(spec, batch_size: int, capacity: int, dtype: torch.dtype, device) -> KeyValues | State:
    kind = QuantizedKeyValues if dtype == torch.int8 and type(spec) is Attention else _ENTRIES[type(spec)]
    return kind(spec, batch_size, capacity, dtype, device)
