"""A model that remembers the text it has read: the next prompt costs only the tokens in which it differs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llmctl.models.cache import Cache
from llmctl.models.causal_lm import CausalLM
from llmctl.ops.sampling import Settings

_ROOM_AHEAD = 256  # so many more tokens than are needed, so that a cache is not copied at every turn


class RememberingModel:
    """A causal language model for `generation.decode`, whose cache outlives the text that filled it.

    `n_read` counts the tokens that the model has run over, `n_reused` those that it did not have to. Several
    completions of one prompt read it once; each goes on in a copy.
    """

    def __init__(self, model: CausalLM):
        self.model, self.config, self.device = model, model.config, model.device
        self.n_read = self.n_reused = 0
        self._cache: Cache | None = None
        self._ids: list[int] = []
        # Caches of other kinds of model are their own business if they do not say more, and virtual tokens stand in front
        # of a text.
        self._can_keep = getattr(model, "cuts_caches", isinstance(model, CausalLM)) and not model.n_virtual

    def forget(self) -> None:
        self._cache, self._ids = None, []

    def continued(self, prompt_ids: Sequence[int], start_id: int | None) -> Sequence[int]:
        return self.model.continued(prompt_ids, start_id)

    def begin(
        self, prompts: Sequence[Sequence[int]], continued: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Cache, torch.Tensor]:
        """As `CausalLM.begin`, but with what the cache holds of the prompt left out of the first inputs [B, T]."""
        ids = list(continued[0])
        if any(list(other) != ids for other in continued) or not self._can_keep:
            self.forget()
            return self.model.begin(prompts, continued, max_new_tokens)
        kept = self._keep(ids, len(ids) + max_new_tokens - 1)
        if not kept:
            self._cache, _ = self.model.begin([ids], [ids], max_new_tokens + _ROOM_AHEAD)
            self._ids = []
        self.n_reused += kept
        inputs_BT = torch.tensor([ids[kept:]], device=self.device)
        return self._for_rows(len(continued), inputs_BT)

    def next_logits(self, input_ids_BT: torch.Tensor, cache: Cache) -> torch.Tensor:
        return self._reading(input_ids_BT, cache, lambda: self.model.next_logits(input_ids_BT, cache))

    def next_tokens(
        self, input_ids_BT: torch.Tensor, cache: Cache, settings: Settings, position: int
    ) -> list[torch.Tensor] | None:
        draw = getattr(self.model, "next_tokens", lambda *_: None)
        return self._reading(input_ids_BT, cache, lambda: draw(input_ids_BT, cache, settings, position))

    def _reading(self, input_ids_BT: torch.Tensor, cache: Cache, read: Callable[[], Any]) -> Any:
        """What `read` gives; None says that it has read nothing."""
        is_own = cache is self._cache
        if is_own and len(input_ids_BT) > 1:  # a search has made several rows of it
            self._cache, is_own = None, False
        held, self._ids = self._ids, []  # after a failure or an interrupt in the middle nothing is known to be whole
        found = read()
        if found is None:
            self._ids = held
            return None
        self.n_read += input_ids_BT.numel()
        self._ids = held + input_ids_BT[0].tolist() if is_own else held
        return found

    def _keep(self, ids: list[int], capacity: int) -> int:
        """How many tokens of `ids` need not be read; the last always is, since what follows it is asked for."""
        common = min(len(os.path.commonprefix([self._ids, ids])), len(ids) - 1)
        if not common or self._cache is None:
            return 0
        is_full = capacity > self._cache.capacity
        if not self._cache.cut(common, capacity + _ROOM_AHEAD if is_full else capacity):
            return 0
        self._ids = self._ids[:common]
        return common

    def _for_rows(self, n_rows: int, inputs_BT: torch.Tensor) -> tuple[Cache, torch.Tensor]:
        """The cache itself for one row; for several a copy, behind all but the last token of the prompt."""
        if n_rows == 1:
            return self._cache, inputs_BT
        if inputs_BT.shape[1] > 1:
            self.next_logits(inputs_BT[:, :-1], self._cache)
        first = torch.zeros(n_rows, dtype=torch.int64, device=self.device)
        return self._cache.branch(first), inputs_BT[:, -1:].expand(n_rows, 1)
