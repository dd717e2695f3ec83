"""What every layer of one forward pass shares."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llmctl.models.cache import Cache
from llmctl.models.memory import Memory
from llmctl.models.virtual_tokens import VirtualPrefix, VirtualPrompt, put
from llmctl.ops.local_attention import GlobalTokens
from llmctl.ops.visibility import Visibility

Rotation = tuple[torch.Tensor, torch.Tensor]


class Context:
    """Where the tokens of a forward stand, and what they may see; worked out once, read by all layers.

    Padding: real tokens of row b are those from `starts_B` on and in front of `ends_B` (int64, or None for all).
    Packing: `documents_BT` numbers the documents within a row. With a `cache` the tokens continue what it holds. `memory` is
    an encoder's output, for layers that attend to it; it may come with the cache.
    """

    def __init__(
        self,
        length: int,
        device: torch.device,
        *,
        starts_B: torch.Tensor | None = None,
        ends_B: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        cache: Cache | None = None,
        memory: Memory | None = None,
    ):
        self.length, self.device, self.cache = length, device, cache
        self.memory = cache.memory if memory is None and cache is not None else memory
        self.offset = 0 if cache is None else cache.length
        self.starts_B, self.ends_B, self.documents_BT = starts_B, ends_B, documents_BT
        self._first_BT = None if documents_BT is None else _document_starts(documents_BT)
        self._last_BT = None if documents_BT is None else _document_ends(documents_BT)
        self.rotations: Sequence[Rotation] = ()
        self.bias_HTS: torch.Tensor | None = None
        self.recorded_weights: list[torch.Tensor] | None = None
        """Set to a list, it gets every attention's weights [B, H, T, S], in the order of the layers."""
        self.recorded_hidden: list[torch.Tensor] | None = None
        """Set to a list, it gets what goes into each layer, and last what the final norm gives, [B, T, D] each."""
        self.recorded_keys: list[torch.Tensor] | None = None
        """Set to a list, it gets every self-attention's keys and values of the first row, [2, G, T, K]."""
        self.virtual: VirtualPrompt | VirtualPrefix | None = None
        """Whose places stand in front of every text here, among the `length`."""
        self.global_tokens: GlobalTokens | None = None
        """Those that see all and are seen by all, in layers whose attention is else local."""
        self._visibilities: dict[tuple[bool, int | None], Visibility] = {}

    @property
    def columns_T(self) -> torch.Tensor:
        """Where each token stands in its row, padding and other documents counted."""
        return torch.arange(self.offset, self.offset + self.length, device=self.device)

    @property
    def positions_BT(self) -> torch.Tensor | None:
        """Positions within the own text, or None where every row simply counts up from `offset`."""
        if self._first_BT is not None:
            return self.columns_T - self._first_BT
        if self.starts_B is not None:
            return (self.columns_T - self.starts_B[:, None]).clamp(min=0)
        return None

    @property
    def end(self) -> int:
        """How many tokens a row has with these, padding and other documents counted."""
        return self.offset + self.length

    @property
    def text_lengths_BT(self) -> torch.Tensor | None:
        """How long each token's own text is so far, or None where all are `end` tokens long; each dimension may be 1."""
        if self._first_BT is not None:
            return self._last_BT - self._first_BT + 1
        if self.starts_B is None and self.ends_B is None:
            return None
        starts_B = torch.zeros_like(self.ends_B) if self.starts_B is None else self.starts_B
        return ((self.end if self.ends_B is None else self.ends_B) - starts_B)[:, None]

    def behind(self, virtual: VirtualPrompt | VirtualPrefix) -> Context:
        """The same texts, in rows whose padding is followed by these places; they belong to a row's first document."""
        count, documents_BT = virtual.count, self.documents_BT
        if documents_BT is not None:
            documents_BT = torch.cat([documents_BT[:, :1].expand(-1, count), documents_BT], 1)
        longer = Context(
            self.length + count,
            self.device,
            starts_B=self.starts_B,
            ends_B=None if self.ends_B is None else self.ends_B + count,
            documents_BT=documents_BT,
            cache=self.cache,
            memory=self.memory,
        )
        longer.recorded_weights, longer.recorded_hidden = self.recorded_weights, self.recorded_hidden
        if self.global_tokens is not None:
            longer.global_tokens = GlobalTokens(F.pad(self.global_tokens.is_global_BT, (count, 0)))
        longer.virtual = virtual
        return longer

    def with_virtual(self, layer: int, k_BGTK: torch.Tensor, v_BGTK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values, with those that virtual places bring of their own."""
        if self.recorded_keys is not None:
            self.recorded_keys.append(torch.stack([k_BGTK[0], v_BGTK[0]]))
        own = None if self.virtual is None else self.virtual.keys_and_values(layer)
        if own is None:
            return k_BGTK, v_BGTK
        return put(k_BGTK, own[0], self.starts_B), put(v_BGTK, own[1], self.starts_B)

    def record(self, hidden_BTD: torch.Tensor) -> None:
        if self.recorded_hidden is not None:
            self.recorded_hidden.append(hidden_BTD)

    def visibility(self, causal: bool, window: int | None = None) -> Visibility:
        """Which keys of the same sequence a layer's queries see."""
        key = (causal, window)
        if key not in self._visibilities:
            self._visibilities[key] = self._new_visibility(causal, window)
        return self._visibilities[key]

    @functools.cached_property
    def memory_visibility(self) -> Visibility:
        """Which of an encoder's tokens a decoder's queries see."""
        return self.memory.visibility(self.documents_BT)

    def _new_visibility(self, causal: bool, window: int | None) -> Visibility:
        first_BT = self._first_BT
        if self.starts_B is not None:
            first_BT = self.starts_B[:, None].expand(-1, self.length)
            if causal:  # a padding query sees itself, so that its softmax is finite
                first_BT = torch.minimum(first_BT, self.columns_T)
        if window is not None and self.offset + self.length > window:
            recent_1T = (self.columns_T - window + 1).clamp(min=0)[None]
            first_BT = recent_1T if first_BT is None else torch.maximum(first_BT, recent_1T)
        if causal:
            return Visibility(True, self.offset, first_BT, origin_B=self.starts_B)
        end_BT = None if self._last_BT is None else self._last_BT + 1
        if self.ends_B is not None:
            end_BT = self.ends_B[:, None].expand(-1, self.length)
        return Visibility(False, self.offset, first_BT, end_BT, self.starts_B)


def padding_of(attention_mask_BT: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(starts_B, ends_B) of the ones in a mask, each None where no row is padded on that side.

    Raises ValueError where zeros stand between ones, or a row has no one.
    """
    if attention_mask_BT is None:
        return None, None
    real_BT = attention_mask_BT != 0
    length = real_BT.shape[1]
    starts_B = real_BT.int().argmax(1)
    ends_B = length - real_BT.flip(1).int().argmax(1)
    if not torch.equal(ends_B - starts_B, real_BT.sum(1)):
        raise ValueError(
            "an attention mask may have zeros at the ends of its rows, not between or in place of all tokens"
        )
    return starts_B if starts_B.any() else None, ends_B if (ends_B < length).any() else None


def _document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: where in its row each token's document begins."""
    is_first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    steps_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return torch.where(is_first_BT, steps_T, 0).cummax(1).values


def _document_ends(documents_BT: torch.Tensor) -> torch.Tensor:
    """[B, T]: where in its row each token's document has its last token."""
    return documents_BT.shape[1] - 1 - _document_starts(documents_BT.flip(1)).flip(1)
